"""Capacity on whole traces: tables that add up, sites that differ, native drops, real models' figures, sentences."""

from __future__ import annotations

import json
import math
import pickletools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from analysis import apply_capacity, expert_capacity, open_run
from analysis.balance import maxvio
from analysis.capacity import capacity_curves, check_policy, compare_policies, expert_shape, pool_curves, rank_trace, with_shares
from analysis.capture import capture
from analysis.overflow import curve_of_loads
from analysis.policies import MissingScores, site_curve
from analysis.slots import CapacityError, ExpertShape, capacity_rule, make_batches
from analysis.trace import SiteRouting, Trace, TraceError
from tests import tiny
from tests.synthetic import MANY, PLAIN, TWO_STREAMS, make_part, make_parts, make_trace, site

ROOT = Path(__file__).parent.parent
UNLIKE = (site(0, 8, 2), site(1, 4, 3), site(2, 16, 1))  # sites of one model that differ in E and k
TRACES = {"plain": PLAIN, "300 experts": MANY, "two streams, dropping": TWO_STREAMS, "unlike sites": UNLIKE}
COUNTS = ("tokens", "assignments", "dropped", "fully_dropped", "partly_dropped", "top1_dropped")


@pytest.mark.parametrize("layers", TRACES.values(), ids=TRACES)
@pytest.mark.parametrize(("scope", "size", "mixed"), [("document", None, None), ("documents", 2, 3), ("tokens", 7, None), ("run", None, 1)])
def test_every_table_adds_up_to_the_layer(layers: tuple, scope: str, size: int | None, mixed: int | None) -> None:
    trace = make_trace(layers)
    applied = apply_capacity(trace, 1.0, "random", scope, size=size, mixed=mixed)
    rows = applied.by_layer().to_pylist()
    for layer, row in zip(trace.layers, rows, strict=True):
        experts, kept = trace.chosen(layer.index), applied.kept(layer.index)
        assert kept.shape == experts.shape and (row["site"], row["layer"], row["stack"]) == (layer.index, layer.layer, layer.stack)
        assert row["dropped"] == applied.dropped(layer.index).sum() == ((experts >= 0) & ~kept).sum()
        assert row["kept"] + row["dropped"] == row["assignments"] and row["kept"] + row["idle"] == row["slots"]
        assert row["dropped_share"] == row["dropped"] / row["assignments"] and row["slot_use"] == row["kept"] / row["slots"]
    for table in (applied.by_label(), applied.by_position(), applied.by_position(4), applied.by_document(), applied.by_token()):
        summed = table.group_by("site", use_threads=False).aggregate([(c, "sum") for c in COUNTS]).to_pylist()
        assert [[r[f"{c}_sum"] for c in COUNTS] for r in summed] == [[r[c] for c in COUNTS] for r in rows]
    counts = [(c, "sum") for c in ("dropped", "kept", "slots", "idle")]
    experts = applied.by_expert().group_by("site", use_threads=False).aggregate(counts).to_pylist()
    assert [[r[f"{c}_sum"] for c in ("dropped", "kept", "slots", "idle")] for r in experts] == [
        [r[c] for c in ("dropped", "kept", "slots", "idle")] for r in rows]  # fmt: skip
    summary = applied.summary()
    assert summary["dropped"] == sum(r["dropped"] for r in rows) and summary["slots"] == sum(r["slots"] for r in rows)


def test_who_pays_is_told_by_the_tokens_table() -> None:
    """by_label, by_document, by_position and by_token against the tokens table, row by row."""
    trace = make_trace(PLAIN, make_parts(PLAIN, 4))
    applied = apply_capacity(trace, 0.75, "probability", "tokens", size=11)
    tokens, lost = trace.stream_tokens("decoder").to_pylist(), applied.dropped(1).sum(1)
    for table, column, bins in ((applied.by_label(), "label", None), (applied.by_document(), "document", None),
                                (applied.by_token(), "token_id", None), (applied.by_position(4), "position", 4)):  # fmt: skip
        expected: dict = {}
        for row, n in zip(tokens, lost, strict=True):
            key = row[column] if bins is None else row[column] // bins * bins
            expected[key] = expected.get(key, 0) + int(n)
        name = "first_position" if bins else column
        found = {r[name]: r["dropped"] for r in table.to_pylist() if r["site"] == 1}
        assert found == expected
    doubling = {r["first_position"]: r["tokens"] for r in applied.by_position().to_pylist() if r["site"] == 0}
    positions = np.array([r["position"] for r in tokens])
    assert doubling == {2**b - 1: int(((positions >= 2**b - 1) & (positions < 2 ** (b + 1) - 1)).sum()) for b in range(len(doubling))}


def test_unlabelled_documents_share_the_label_null() -> None:
    part = make_part(PLAIN, [4, 3, 5], labels=("a", None))
    labels = {r["label"]: r["tokens"] for r in apply_capacity(make_trace(PLAIN, [part])).by_label().to_pylist() if r["site"] == 0}
    assert labels == {"a": 9, None: 3}


@pytest.mark.parametrize("policy", ["position", "choice", "probability", "batch_priority", "random"])
def test_curves_meet_single_settings_and_pool(policy: str) -> None:
    trace = make_trace(UNLIKE)
    ranked = rank_trace(trace, policy, "documents", size=2, seed=4)
    curves = capacity_curves(trace, [0.5, 1.0, 2.0], policy, "documents", size=2, seed=4, preset="deepspeed")
    for row in curves.to_pylist():
        other = ranked.at(row["factor"], "deepspeed").by_layer().to_pylist()[row["site"]]
        same = (*COUNTS, "kept", "slots", "idle", "dropped_share", "top1_dropped_share", "slot_use")
        assert {c: row[c] for c in same} == {c: other[c] for c in same}
        assert row["gate_mass_lost"] == pytest.approx(other["gate_mass_lost"], rel=1e-12) and 0 <= row["chance_dropped_share"] < 1
    pooled = pool_curves(curves).to_pylist()
    assert [r["factor"] for r in pooled] == [0.5, 1.0, 2.0]
    for r in pooled:
        one = ranked.at(r["factor"], "deepspeed").summary()
        assert (r["dropped"], r["dropped_share"], r["slot_use"]) == (one["dropped"], one["dropped_share"], one["slot_use"])


def test_curves_of_chosen_layers_are_in_their_order() -> None:
    trace, options = make_trace(TWO_STREAMS), {"size": 2, "mixed": 5, "seed": 3, "preset": "mesh"}
    curves = capacity_curves(trace, [0.5, 1.5], "random", "documents", layers=[2, 0], **options).to_pylist()
    assert [(r["site"], r["factor"]) for r in curves] == [(2, 0.5), (2, 1.5), (0, 0.5), (0, 1.5)]
    for row in curves:
        [one] = apply_capacity(trace, row["factor"], "random", "documents", layers=[row["site"]], **options).by_layer().to_pylist()
        same = row.keys() & one.keys() - {"stack"}
        assert {c: row[c] for c in same} == pytest.approx({c: one[c] for c in same}, rel=1e-12, nan_ok=True)  # native drops hide gate mass


def test_policies_are_compared_and_what_cannot_be_answered_says_why() -> None:
    rows = {r["policy"]: r for r in compare_policies(make_trace(PLAIN), 0.75, "run").to_pylist()}
    told = [p for p in rows if rows[p]["unanswered"] is None]
    assert set(rows) - set(told) == {"reroute"} and "capture the run" in rows["reroute"]["unanswered"]
    assert len({rows[p]["dropped"] for p in told if p != "dropless"}) == 1 and rows["dropless"]["dropped"] == 0
    assert rows["probability"]["gate_mass_lost"] == min(rows[p]["gate_mass_lost"] for p in told if p != "dropless")
    with pytest.raises(CapacityError, match="no policy"):
        compare_policies(make_trace(PLAIN), policies=["luck"])


@pytest.mark.parametrize("layers", TRACES.values(), ids=TRACES)
def test_the_comparison_is_of_what_each_policy_alone_gives(layers: tuple) -> None:
    trace, asked = make_trace(layers), {"scope": "documents", "size": 2, "mixed": 1, "seed": 3}
    for row in compare_policies(trace, 0.75, **asked).to_pylist():
        if row["unanswered"] is None:
            alone = apply_capacity(trace, 0.75, row["policy"], **asked).summary()
            assert {c: row[c] for c in alone} == pytest.approx(alone, rel=1e-12, nan_ok=True)


def test_a_site_read_in_pieces_is_the_same_and_can_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, told = make_trace(PLAIN), []
    whole = rank_trace(trace, "probability", "run", layers=[1]).queues[1]
    monkeypatch.setattr("analysis.capacity.PIECE", 7)
    pieces = rank_trace(trace, "probability", "run", layers=[1], tell=lambda done, total: told.append((done, total))).queues[1]
    for name in ("experts", "weights", "ranks", "loads"):
        assert np.array_equal(getattr(whole, name), getattr(pieces, name)), name
    n = trace.n_tokens()
    assert told == [(min(i, n), n) for i in range(7, n + 7, 7)]

    def leave(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        rank_trace(trace, layers=[1], tell=leave)
    native, alone = make_trace(TWO_STREAMS), rank_trace(make_trace(TWO_STREAMS), layers=[2]).queues[2]
    assert np.array_equal(rank_trace(native, layers=[2], tell=leave).queues[2].ranks, alone.ranks)  # its chosen are apart: read at once


def test_what_a_policy_lacks_is_told_by_one_token() -> None:
    trace = make_trace(PLAIN)
    for policy in ("position", "choice", "probability", "batch_priority", "random", "dropless"):
        check_policy(trace, 0, policy)
    with pytest.raises(MissingScores, match="capture the run with them"):
        check_policy(trace, 0, "reroute")


def test_layers_preset_rule_and_slots_can_be_chosen() -> None:
    trace = make_trace(UNLIKE)
    applied = apply_capacity(trace, 1.0, scope="run", layers=[2], preset=capacity_rule("megatron", minimum=5))
    (row,) = applied.by_layer().to_pylist()
    assert (row["site"], row["least_capacity"]) == (2, expert_capacity(trace.n_tokens(), 16, 1, minimum=5))
    assert {r["largest_capacity"] for r in apply_capacity(trace, slots=3).by_layer().to_pylist()} == {3}
    assert not apply_capacity(trace, 4.0, scope="run").by_layer()["dropped"].to_pylist()[1]  # 4 experts at CF 4 hold any load


def test_random_differs_between_sites_and_not_between_calls() -> None:
    trace = make_trace((site(0, 4, 1), site(1, 4, 1)), [make_part((site(0, 4, 1), site(1, 4, 1)), [200])])
    same = replace(trace, source=_Twice(trace))
    a, b = (apply_capacity(same, 0.5, "random", seed=1) for _ in range(2))
    assert np.array_equal(a.kept(0), b.kept(0)) and not np.array_equal(a.kept(0), a.kept(1))


class _Twice:
    """Every site routes as site 0 does."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def routings(self, sites: Sequence[int], start: int, stop: int) -> tuple[SiteRouting, ...]:
        return tuple(self.trace.routing(0, start, stop) for _ in sites)


def test_native_drops_of_a_recorded_switch_model_are_reproduced() -> None:
    trace = capture(tiny.build("switch_transformers"), tiny.tokenizer(), ["aaaaaaaaaaaa", "abababab", "hello routers"])
    applied = apply_capacity(trace, slots=3)
    for layer in trace.layers:
        assert np.array_equal(applied.kept(layer.index), trace.experts(layer.index) >= 0)
    assert applied.dropped(0).any() and math.isnan(applied.by_layer()["gate_mass_lost"].to_pylist()[0])
    with pytest.raises(CapacityError, match="natively dropped"):
        apply_capacity(trace, policy="probability")


def test_reroute_needs_and_uses_recorded_probabilities() -> None:
    model, texts = tiny.build("mixtral"), ["def f(x): return x", "Il pleut."]
    with pytest.raises(CapacityError, match="capture the run with them"):
        apply_capacity(capture(model, tiny.tokenizer(), texts), policy="reroute")
    trace = capture(model, tiny.tokenizer(), texts, probabilities=True)
    plain, moved = (apply_capacity(trace, 1.0, policy) for policy in ("position", "reroute"))
    assert moved.summary()["dropped"] < plain.summary()["dropped"]
    assert moved.summary()["rerouted"] == plain.summary()["dropped"] - moved.summary()["dropped"] > 0


def test_shares_are_nan_where_there_is_nothing_to_share() -> None:
    part = make_part(PLAIN, [3, 2])
    nobody, nothing = np.full((5, 2), -1, np.int16), np.zeros((5, 2), np.float32)
    trace = make_trace(PLAIN, [replace(part, routing=(SiteRouting(nobody, nothing, nobody),) * 2)])
    row = apply_capacity(trace, 0.0).by_layer().to_pylist()[0]
    assert (row["assignments"], row["dropped"], row["slots"]) == (0, 0, 0)
    assert all(math.isnan(row[c]) for c in ("dropped_share", "gate_mass_lost_share", "slot_use")) and row["fully_dropped_share"] == 0
    curves = capacity_curves(trace, [0.0, 1.0])
    assert with_shares(curves).column_names == curves.column_names  # nothing is added twice
    assert np.isnan(curves["dropped_share"].to_numpy()).all() and np.isnan(pool_curves(curves)["dropped_share"].to_numpy()).all()


def test_a_run_of_one_token_and_settings_without_meaning() -> None:
    one = make_trace(PLAIN, [make_part(PLAIN, [1])])
    assert apply_capacity(one, 1.0).summary()["dropped"] == 0 and apply_capacity(one, 0).summary()["dropped"] == 4
    for arguments, message in (({"factor": math.nan}, "capacity factor"), ({"policy": "luck"}, "no policy"), ({"scope": "epoch"}, "no scope"),
                               ({"scope": "tokens"}, "give size"), ({"preset": "x"}, "no preset"), ({"slots": -2}, "slots")):  # fmt: skip
        with pytest.raises(CapacityError, match=message):
            apply_capacity(one, **arguments)
    with pytest.raises(CapacityError, match="no layer is chosen"):
        apply_capacity(one, layers=[])
    for layer in (2, -1):
        with pytest.raises(TraceError, match=f"no site {layer}"):
            apply_capacity(one, layers=[layer])
    with pytest.raises(CapacityError, match="bins of 0"):
        apply_capacity(one).by_position(0)
    with pytest.raises(TraceError, match="statistics only"):
        apply_capacity(replace(one, source=None, load_tokens=None))
    with pytest.raises(CapacityError, match="do not follow one another"):
        apply_capacity(replace(one, documents=one.documents.set_column(4, "first_row", [[3]])))


def test_demo_run() -> None:
    """Scope decides what overflows: one document alone always more than the mixed run; policies agree on the total."""
    trace = open_run(ROOT / "data/demo-run")
    alone, together = apply_capacity(trace).summary(), apply_capacity(trace, scope="run").summary()
    assert alone["dropped_share"] > 2 * together["dropped_share"]
    totals = {
        p: apply_capacity(trace, 1.0, p, "documents", size=8, mixed=0, layers=[1]).summary() for p in ("position", "choice", "probability")
    }
    assert len({t["dropped"] for t in totals.values()}) == 1
    assert totals["probability"]["gate_mass_lost"] < totals["choice"]["gate_mass_lost"] < totals["position"]["gate_mass_lost"]
    for layer in trace.layers:  # dropless from the largest load on: CF = max load / mean load
        enough = maxvio(trace.stats.load(layer.index)) + 1
        ranked = rank_trace(trace, scope="run", layers=[layer.index])
        assert ranked.at(enough).summary()["dropped"] == 0 < ranked.at(0.99 * enough).summary()["dropped"]


def test_cost_follows_from_the_models_card() -> None:
    trace = open_run(ROOT / "data/demo-run")
    config = json.loads((ROOT / "data/demo-model/config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    assert config["dtype"] == "bfloat16" and expert_shape(trace.model) == ExpertShape(hidden, 3 * hidden * inner, 2)
    row = apply_capacity(trace, 1.25, scope="run").cost(devices=4).to_pylist()[0]
    assert row["flops"] == row["slots"] * 6 * hidden * inner and row["padding_flops"] == row["idle"] * 6 * hidden * inner
    assert row["all_to_all_bytes"] == row["slots"] * 2 * hidden * 2 * 3 // 4
    own = apply_capacity(trace, 1.25, scope="run").cost(ExpertShape(4, 10)).to_pylist()[0]
    assert own["flops"] == 20 * own["slots"] and own["all_to_all_bytes"] == 0
    with pytest.raises(CapacityError, match="does not follow from its card"):
        expert_shape(replace(trace.model, active_parameters=trace.model.parameters))


@pytest.mark.parametrize("task", ["intent", "law"])
def test_real_deepseek_v2_lite(real: Path, task: str) -> None:
    """Share dropped at four factors in 26 layers, to every digit given; the same total under every policy."""
    golden = json.loads((real / "golden.json").read_text())["deepseek-v2-lite"][task]
    table = pq.read_table(real / "deepseek-v2-lite" / "routing.parquet", filters=[("task", "==", task)]).to_pandas()
    table = table.sort_values(["layer", "seq", "pos", "slot"])
    whole = make_batches([golden["tokens"]], "run")
    for layer, figures in golden["layers"].items():
        mine = table[table["layer"] == int(layer)]
        experts, weights = (mine[c].to_numpy().reshape(-1, 6) for c in ("expert", "weight"))
        factors = [float(cf) for cf in figures["drop_pct"]]
        for policy in ("position", "choice", "probability", "batch_priority") if layer in ("1", "26") else ("position",):
            curve = site_curve(experts, weights, 64, whole, policy, factors)
            ours = 100 * curve.dropped / curve.assignments
            assert [float(f"{x:.8g}") for x in ours] == list(figures["drop_pct"].values()), (layer, policy)


def counters(path: Path) -> Iterator[np.ndarray]:
    """Expert loads out of a pickled list of Counters {int64: int}, from its opcodes: nothing of the file is run."""
    load: dict[int, int] = {}
    key = None
    for op, value, _ in pickletools.genops(path.read_bytes()):
        if op.name == "EMPTY_DICT" and load:
            yield np.array([load.get(e, 0) for e in range(max(load) + 1)])
            load = {}
        elif op.name == "SHORT_BINBYTES":
            key = int.from_bytes(value, "little")
        elif op.name.startswith("BININT") and key is not None:
            load[key], key = value, None
    yield np.array([load.get(e, 0) for e in range(max(load) + 1)])


@pytest.mark.parametrize("domain", ["github", "wikipedia", "c4"])
@pytest.mark.parametrize(("model", "n_experts", "top_k"), [("olmoe", 64, 8), ("mixtral", 8, 2)])
def test_real_olmoe_and_mixtral(real: Path, model: str, n_experts: int, top_k: int, domain: str) -> None:
    """From loads alone, which is all that was published: what overflows does not depend on the order."""
    golden = json.loads((real / "golden.json").read_text())[model]
    loads = list(counters(real / "olmoe" / model / f"expert_counts_{domain}.pkl"))
    assert len(loads) == 3
    for name, load in zip(("L0", "L7", "L15"), loads, strict=True):
        figures = golden[f"{domain}/{name}"]
        experts = np.repeat(np.arange(len(load), dtype=np.int16), load).reshape(-1, top_k)
        assert len(experts) == figures["tokens"]
        factors = [float(cf) for cf in figures["drop_pct"]]
        curve = site_curve(experts, np.ones(experts.shape, np.float32), n_experts, make_batches([len(experts)], "run"), factors=factors)
        dropped, slots = curve_of_loads(load[None], np.array([len(experts)]), top_k, factors)
        assert np.array_equal(dropped, curve.dropped) and np.array_equal(slots, curve.slots)
        assert [float(f"{x:.8g}") for x in 100 * curve.dropped / curve.assignments] == list(figures["drop_pct"].values())
