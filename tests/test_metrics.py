"""The table of metrics: every entry keeps its range, ignores the numbering of experts, and survives tiny traces."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.metrics import METRICS, balance_table, load_table, percentile_table, percentiles
from analysis.stats import Statistics, merge_statistics, part_statistics
from analysis.store import open_run
from analysis.trace import Part, SiteRouting, SiteScores, Trace
from analysis.writing import RunWriter
from tests.synthetic import MANY, PLAIN, SPECIAL, TWO_STREAMS, card, make_part, make_parts, make_trace, site

TRACES = {"plain": PLAIN, "300 experts": MANY, "two streams, dropping": TWO_STREAMS}


def relabelled(part: Part) -> Part:
    """The same routing with the experts of every site numbered otherwise."""
    rng = np.random.default_rng(7)
    routing, sums = [], []
    for mine, total in zip(part.routing, part.probability_sums, strict=True):
        order = rng.permutation(len(total))
        new = np.append(order, -1)  # id -1, no expert, stays
        routing.append(SiteRouting(new[mine.experts], mine.weights, new[mine.chosen]))
        moved = np.empty_like(total)
        moved[order] = total
        sums.append(moved)
    return replace(part, routing=tuple(routing), probability_sums=tuple(sums))


def test_token_information_of_a_stored_run_is_that_in_memory_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites of one stream and k share what a token id's assignments add up to; of others, and where some were dropped, all is read."""
    layers = (site(0, 8, 2), site(1, 8, 3), site(2, 16, 2), site(3, 8, 3), site(4, 6, 2, "encoder"), site(5, 6, 2, "encoder", 5))
    parts = make_parts(layers)
    with RunWriter.open(tmp_path / "run", card(layers), {}) as writer:
        for part in parts:
            writer.write(part)
        writer.commit()
    asked, load = [], Statistics.token_load_by_id
    monkeypatch.setattr(Statistics, "token_load_by_id", lambda self, number: asked.append(number) or load(self, number))
    found = METRICS["token_information"](open_run(tmp_path / "run"))["value"]
    assert set(asked) == {0, 1, 4, 5}
    assert found.to_pylist() == METRICS["token_information"](make_trace(layers, parts))["value"].to_pylist()
    assert len(set(found.to_pylist())) == len(layers)


def emptied(trace: Trace) -> Trace:
    """As if every assignment had been dropped."""
    (part,) = [make_part(trace.layers, [6, 4])]
    none = tuple(SiteRouting(np.full_like(r.experts, -1), np.zeros_like(r.weights), r.chosen) for r in part.routing)
    unknown = tuple(SiteScores(*(np.full(len(s.entropy), np.nan, np.float32) for _ in range(3))) for s in part.scores)
    zeros = tuple(np.zeros_like(p) for p in part.probability_sums)
    return make_trace(trace.layers, [replace(part, routing=none, scores=unknown, probability_sums=zeros)])


@pytest.mark.parametrize("layers", TRACES.values(), ids=TRACES)
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_range(metric, layers) -> None:
    trace = make_trace(layers)
    table = metric(trace)
    assert table.column_names == ["site", "layer", "n", "value"]
    assert table["n"].to_pylist() == [trace.n_tokens(x.stream) for x in layers]
    for layer, value in zip(layers, table["value"].to_pylist(), strict=True):
        assert metric.low - 1e-9 <= value <= metric.high(layer) + 1e-9


@pytest.mark.parametrize("layers", TRACES.values(), ids=TRACES)
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_numbering_of_experts_does_not_matter(metric, layers) -> None:
    parts = make_parts(layers)
    before, after = (metric(make_trace(layers, p))["value"].to_numpy() for p in (parts, [relabelled(p) for p in parts]))
    np.testing.assert_allclose(after, before, rtol=1e-9)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_one_token(metric) -> None:
    for layer, value in zip(PLAIN, metric(make_trace(PLAIN, [make_part(PLAIN, [1])]))["value"].to_pylist(), strict=True):
        assert metric.low - 1e-9 <= value <= metric.high(layer) + 1e-9


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_a_layer_that_executed_nothing(metric) -> None:
    """What is made of loads or scores is NaN; the chance values follow from n alone."""
    values = metric(emptied(make_trace(TWO_STREAMS)))["value"].to_pylist()
    assert all(math.isnan(v) != metric.name.startswith("chance") for v in values)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_statistics_of_parts_merged_give_the_metric_of_the_whole(metric) -> None:
    parts = make_parts(PLAIN)
    whole = make_trace(PLAIN, parts)
    backwards = replace(whole, stats=merge_statistics(part_statistics(p, PLAIN) for p in reversed(parts)))
    np.testing.assert_allclose(metric(backwards)["value"].to_numpy(), metric(whole)["value"].to_numpy(), rtol=1e-12)


def test_entries_say_what_they_are() -> None:
    for name, metric in METRICS.items():
        assert metric.name == name
        assert all((metric.title, metric.definition, metric.unit, metric.chance, metric.source))
        assert metric.low < metric.high(PLAIN[0])
    assert len({m.title for m in METRICS.values()}) == len(METRICS)


def test_z_loss_vector() -> None:
    """Logits 1, 2, 3: log(e + e^2 + e^3) squared is 11.61178."""
    part = make_part(PLAIN, [4])
    same = np.full(4, np.log(np.exp([1, 2, 3]).sum()), np.float32)
    trace = make_trace(PLAIN, [replace(part, scores=tuple(replace(s, logsumexp=same) for s in part.scores))])
    assert METRICS["z_loss"](trace)["value"].to_pylist() == pytest.approx([11.61178] * 2, abs=1e-4)


def test_balance_table_has_every_metric_once_per_site() -> None:
    table = balance_table(make_trace(TWO_STREAMS))
    assert table.column_names == ["site", "layer", "stack", "n", *METRICS]
    assert table["stack"].to_pylist() == ["encoder", "encoder", "decoder"]


@pytest.mark.parametrize("layers", [*TRACES.values(), SPECIAL], ids=[*TRACES, "special classes"])
def test_load_table_counts_what_was_routed(layers) -> None:
    trace = make_trace(layers)
    rows = load_table(trace).to_pandas()
    for layer in layers:
        mine = rows[rows.site == layer.index]
        routing = trace.routing(layer.index)
        counted = [int((routing.experts == e).sum()) for e in range(layer.n_classes)]
        mass = [routing.weights[routing.experts == e].astype(float).sum() for e in range(layer.n_classes)]
        assert mine.assignments.tolist() == counted and mine.expert.tolist() == list(range(layer.n_classes))
        np.testing.assert_allclose(mine.gate_mass, mass, rtol=1e-12)
        assert mine.special.tolist() == [e >= layer.n_experts for e in range(layer.n_classes)]
        assert mine.share.sum() == pytest.approx(1) and mine.relative[~mine.special].mean() == pytest.approx(1)
        assert mine.relative[~mine.special].max() == pytest.approx(METRICS["max_over_mean"](trace)["value"][layer.index].as_py())
        assert mine.first_choices.sum() == (routing.experts >= 0).any(1).sum()
        assert set(mine.n) == {trace.n_tokens(layer.stream)}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("layers", [PLAIN, MANY, TWO_STREAMS], ids=["plain", "many", "streams"])
def test_values_lie_in_the_stated_range(name: str, layers: tuple) -> None:
    trace, metric = make_trace(layers), METRICS[name]
    table = metric(trace).to_pylist()
    assert [r["site"] for r in table] == [x.index for x in layers]
    for row, layer in zip(table, layers, strict=True):
        assert metric.low - 1e-9 <= row["value"] <= metric.high(layer) + 1e-9
        assert row["n"] == trace.n_tokens(layer.stream)


@pytest.mark.parametrize("name", METRICS)
def test_relabelling_experts_changes_nothing(name: str) -> None:
    parts = make_parts(PLAIN)
    order = np.random.default_rng(0).permutation(8)

    def relabelled(r: SiteRouting) -> SiteRouting:
        ids = order[r.experts].astype(r.experts.dtype)
        return SiteRouting(ids, r.weights, ids)

    def sums(p: np.ndarray) -> np.ndarray:
        out = np.empty_like(p)
        out[order] = p
        return out

    moved = [replace(p, routing=tuple(map(relabelled, p.routing)), probability_sums=tuple(map(sums, p.probability_sums))) for p in parts]
    a, b = (METRICS[name](make_trace(PLAIN, x))["value"].to_numpy() for x in (parts, moved))
    np.testing.assert_allclose(a, b, rtol=1e-9)


def trace_of(n: int) -> Trace:
    return make_trace(PLAIN, [make_part(PLAIN, [n])])


@pytest.mark.parametrize("name", METRICS)
def test_a_single_token_is_no_error(name: str) -> None:
    for value in METRICS[name](trace_of(1))["value"].to_pylist():
        assert value is not None and not math.isinf(value)


@pytest.mark.parametrize("name", METRICS)
def test_definitions_are_written(name: str) -> None:
    metric = METRICS[name]
    assert metric.name == name and all((metric.title, metric.definition, metric.chance, metric.source))


def test_tables() -> None:
    trace = make_trace()
    table = balance_table(trace)
    assert set(METRICS) <= set(table.column_names) and len(table) == 2
    load = load_table(trace).to_pandas()
    for layer in trace.layers:
        mine = load[load["site"] == layer.index]
        assert mine["assignments"].tolist() == np.bincount(trace.experts(layer.index).ravel(), minlength=8).tolist()
        assert mine["share"].sum() == pytest.approx(1) and mine["relative"].mean() == pytest.approx(1)


BOUNDS = {"max_over_mean": 1, "maxvio": 1, "document_maxvio": 1, "balancedness": -1}  # the chance level is above or below the mean


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if m.level is not None])
def test_uniform_routing_gives_the_chance_level(name: str) -> None:
    """Twelve uniform runs of 40 documents: their mean is the level, or on the side of it that the words say."""
    traces = [make_trace(PLAIN, [make_part(PLAIN, [50] * 40, seed)]) for seed in range(12)]
    metric, level = METRICS[name], METRICS[name].chance_level(traces[0])
    mean = np.mean([metric(t)["value"].to_numpy() for t in traces])
    if np.isnan(level).all():
        assert name in ("label_information", "token_information") and metric.chance_here(traces[0]) == metric.chance
    elif name in ("auxiliary_loss", "router_entropy", "z_loss"):  # of a router without opinion, which these are not
        assert metric.chance_here(traces[0]).endswith(f"; here {level[0]:,.4g}")
    elif name in BOUNDS:
        assert 0 <= BOUNDS[name] * (level[0] - mean) < 0.25 * abs(level[0] - (name in ("max_over_mean", "balancedness")))
    else:
        assert level[0] == pytest.approx(mean, rel=0.15, abs=1e-6) and metric.chance_here(traces[0]).startswith(f"{metric.chance}; here ")


def test_too_few_tokens_have_no_chance_level_by_series() -> None:
    trace = trace_of(3)
    assert math.isnan(METRICS["effective_experts"].chance_level(trace)[0]) and METRICS["dead"].chance_level(trace)[0] == pytest.approx(
        8 * 0.75**3
    )


def test_no_words_of_chance_are_identifiers() -> None:
    assert not [m.name for m in METRICS.values() if "_" in m.chance]


def test_percentiles_over_layers() -> None:
    assert percentiles(np.array([0, 10, np.nan, 20])) == {"min": 0, "p10": 2, "median": 10, "p90": 18, "max": 20}
    assert all(math.isnan(x) for x in percentiles(np.full(2, np.nan)).values())
    trace = make_trace(TWO_STREAMS)
    rows = {r["metric"]: r for r in percentile_table(trace).to_pylist()}
    assert list(rows) == list(METRICS) and all(r["n"] == 3 for r in rows.values())
    assert (
        rows["cv"]["max"] == max(METRICS["cv"](trace)["value"].to_pylist())
        and rows["cv"]["min"] <= rows["cv"]["median"] <= rows["cv"]["max"]
    )
