"""The kernels and the pass over a part against slow loops where test_stats.py does not reach."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from analysis import bittables, counting
from analysis.stats import BINS, first_choices, following_sites, part_statistics
from analysis.trace import LayerInfo, Part, SiteRouting, SiteScores

from .synthetic import make_part, site

ROOT = Path(__file__).parent.parent
# bit tables and scattering, k = 1, k = 22 of 512, one expert, k and E that differ between neighbours, two streams, drops
SHAPES = {
    "64 top-8": (site(0, 64, 8), site(1, 64, 8)),
    "bits to scatter": (site(0, 64, 8), site(1, 300, 4), site(2, 8, 2)),
    "512 top-22": (site(0, 512, 22), site(1, 40, 1), site(2, 1, 1)),
    "streams and drops": (site(0, 5, 2, "encoder", 3), site(1, 64, 8), site(2, 33, 4, "encoder", 3), site(3, 256, 8, "decoder", 9)),
}


def odd_part(layers: tuple[LayerInfo, ...]) -> Part:
    """Documents of many lengths, labels that are null or empty, token ids of -1, tokens without an expert, scores that are no numbers."""
    part = make_part(layers, [1, 700, 2, 130, 1, 64, 65], 7, labels=("a", None, "", "\u00e9"))
    ids = part.tokens["token_id"].to_numpy().copy()
    ids[::7], ids[3::11] = -1, 49_999
    ids[200:236] = np.repeat(np.arange(100, 108), np.arange(1, 9))  # token ids seen once to eight times
    column = part.tokens.schema.get_field_index("token_id")
    tokens = part.tokens.set_column(column, part.tokens.schema.field(column), pa.array(ids))
    scores = []
    for s in part.scores:
        entropy, margin, z = s.entropy * 6, s.margin * 3 - 1, s.logsumexp.copy()
        entropy[5], margin[:3], z[9] = np.nan, (np.inf, -np.inf, np.nan), np.nan
        scores.append(SiteScores(entropy, margin, z))
    routing = []
    for r in part.routing:
        experts, weights = r.experts.copy(), np.round(r.weights, 1)  # weights that tie
        experts[::13], weights[::13] = -1, 0
        routing.append(SiteRouting(experts, weights, experts if r.chosen is r.experts else r.chosen))
    return replace(part, tokens=tokens, scores=tuple(scores), routing=tuple(routing))


@pytest.mark.parametrize("layers", SHAPES.values(), ids=SHAPES)
def test_every_core_row_equals_a_loop(layers: tuple[LayerInfo, ...]) -> None:
    """The whole table, in its order, from dictionaries filled decision by decision."""
    part = odd_part(layers)
    counts: Counter[tuple[object, ...]] = Counter()
    sums: Counter[tuple[object, ...]] = Counter()
    for i, layer in enumerate(layers):
        rows, routing, scores = part.stream_tokens(layer.stream).to_pylist(), part.routing[i], part.scores[i]
        experts, chosen = routing.experts.tolist(), routing.chosen.tolist()
        first = first_choices(routing).tolist()
        after = following_sites(layers)[i]
        later = None if after is None else (part.routing[after].experts.tolist(), first_choices(part.routing[after]).tolist())
        for a in range(layer.n_classes):
            counts["load", i, None, a, None] += 0
            counts["probability", i, None, a, None] += 0
            sums["probability", i, None, a, None] = float(part.probability_sums[i][a])
        for b in range(BINS):
            counts["entropy", i, None, b, None] += 0
            counts["margin", i, None, b, None] += 0
        for key in (("dropped", None), ("z", None), ("repetition", 0), ("repetition", 1), ("repetition", 2)):
            counts[key[0], i, None, key[1], None] += 0
        for t, row in enumerate(rows):
            label, mine = row["label"], [e for e in experts[t] if e >= 0]
            counts["tokens", i, None, None, None] += 1
            if label is not None:
                counts["label_tokens", i, label, None, None] += 1
            if first[t] >= 0:
                counts["first", i, None, first[t], None] += 1
            for e, w in zip(experts[t], routing.weights[t].tolist(), strict=True):
                if e >= 0:
                    counts["load", i, None, e, None] += 1
                    sums["load", i, None, e, None] += w
                    counts["position", i, None, (row["position"] + 1).bit_length() - 1, e] += 1
                    if label is not None:
                        counts["label", i, label, e, None] += 1
            for before, e in zip(chosen[t], experts[t], strict=True):
                if before >= 0:
                    counts["chosen", i, None, before, None] += 1
                    counts["dropped", i, None, None, None] += e < 0
            for a in mine:
                for b in mine:
                    if a < b:
                        counts["coactivation", i, None, a, b] += 1
            if t and row["document"] == rows[t - 1]["document"]:
                counts["repetition", i, None, 0, None] += 1
                counts["repetition", i, None, 1, None] += first[t] == first[t - 1] and first[t] >= 0
                counts["repetition", i, None, 2, None] += bool(set(mine) & set(experts[t - 1]))
            if later is not None:
                for e in mine:
                    for f in later[0][t]:
                        if f >= 0:
                            counts["flow", i, None, e, f] += 1
                if first[t] >= 0 and later[1][t] >= 0:
                    counts["first_flow", i, None, first[t], later[1][t]] += 1
            top = float(np.log(layer.n_classes)) if layer.n_classes > 1 else 1.0
            for name, value, high in (("entropy", float(scores.entropy[t]), top), ("margin", float(scores.margin[t]), 1.0)):
                if np.isfinite(value):
                    b = int(min(max(value / high * BINS, 0), BINS - 1))
                    counts[name, i, None, b, None] += 1
                    sums[name, i, None, b, None] += value
            if not np.isnan(scores.logsumexp[t]):
                counts["z", i, None, None, None] += 1
                sums["z", i, None, None, None] += float(scores.logsumexp[t]) ** 2
    table = part_statistics(part, layers).core.to_pylist()
    found = [r for r in table if r["site"] >= 0]
    keys = sorted(counts, key=lambda key: [(x is None, x) for x in key])
    assert [(r["statistic"], r["site"], r["label"], r["a"], r["b"]) for r in found] == keys
    assert [r["count"] for r in found] == [counts[k] for k in keys]
    np.testing.assert_allclose([r["sum"] for r in found], [sums[k] for k in keys], rtol=1e-12)


@pytest.mark.parametrize("layers", SHAPES.values(), ids=SHAPES)
def test_sparse_tables_equal_a_loop_in_their_order(layers: tuple[LayerInfo, ...]) -> None:
    part = odd_part(layers)
    stats = part_statistics(part, layers)
    tokens: Counter[tuple[int, ...]] = Counter()
    documents: Counter[tuple[int, ...]] = Counter()
    for i, layer in enumerate(layers):
        for row, experts in zip(part.stream_tokens(layer.stream).to_pylist(), part.routing[i].experts.tolist(), strict=True):
            for e in experts:
                if e >= 0:
                    tokens[i, row["token_id"], e] += 1
                    documents[i, row["document"], e] += 1
    assert min(k[1] for k in tokens) == -1
    assert [tuple(r.values()) for r in stats.by_token.to_pylist()] == [(*k, tokens[k]) for k in sorted(tokens)]
    assert [(r["site"], r["document"], r["expert"], r["count"]) for r in stats.by_document.to_pylist()] == [
        (*k, documents[k]) for k in sorted(documents)
    ]


def test_a_part_of_no_tokens_counts_nothing() -> None:
    layers = (site(0), site(1))
    part = make_part(layers, [3])
    empty = replace(part, tokens=part.tokens[:0], probability_sums=tuple(np.zeros(8) for _ in layers),
                    routing=tuple(SiteRouting(r.experts[:0], r.weights[:0], r.experts[:0]) for r in part.routing),
                    scores=tuple(SiteScores(s.entropy[:0], s.margin[:0], s.logsumexp[:0]) for s in part.scores))  # fmt: skip
    stats = part_statistics(empty, layers)
    assert stats.n_tokens(0) == 0 and not stats.load(0).any() and stats.by_token.num_rows == stats.by_document.num_rows == 0


@pytest.mark.parametrize("wrong", [8, -2, 30_000])
def test_an_id_out_of_range_is_refused_and_not_counted(wrong: int) -> None:
    """A kernel would write beyond its table."""
    part = make_part((site(0),), [9])
    part.routing[0].experts[4, 1] = wrong
    with pytest.raises(ValueError, match=str(wrong)):
        part_statistics(part, (site(0),))


@pytest.mark.parametrize(("n_experts", "k"), [(64, 8), (8, 2), (63, 8), (1, 1)])
def test_bit_tables_count_what_scattering_counts(n_experts: int, k: int) -> None:
    """Pairs of two sites, those of one above the diagonal, and runs; also where the rows are no multiple of 64 words."""
    rng = np.random.default_rng(n_experts)
    for n in (0, 1, 63, 64, 511, 512, 513, 1500):
        ids = [rng.random((n, n_experts)).argsort(1)[:, :k] - i for i in (0, 1)]
        slots = [counting.slots_of(x) for x in ids]
        words = [counting.take_rows(x, np.ones(x.shape, np.float32), n_experts + 1)[1] for x in ids]
        here, after = (bittables.bits_of(w, n_experts + 1, k) for w in words)
        assert here is not None and after is not None
        by_bits, by_hand, mine, mine_by_hand = np.zeros((4, n_experts + 1, n_experts + 1), np.int64)
        bittables.count_pairs_by_bits(here, after, by_bits)
        bittables.count_pairs(*slots, by_hand)
        assert np.array_equal(by_bits, by_hand)
        bittables.count_pairs_by_bits(after, after, mine)
        bittables.count_pairs(slots[1], slots[1], mine_by_hand)
        assert np.array_equal(np.triu(mine, 1), np.triu(mine_by_hand, 1))
        starts = np.unique(np.append(rng.integers(0, n + 1, 40), (0, n)))
        runs, runs_by_hand = np.zeros((2, len(starts) - 1, n_experts + 1), np.int32)
        bittables.count_runs_by_bits(after, starts, runs)
        counting.count_runs(slots[1], starts, runs_by_hand)
        assert np.array_equal(runs[:, 1:], runs_by_hand[:, 1:])


@pytest.mark.parametrize("k", [3, 8])
def test_pairs_are_exact_where_a_cell_outgrows_16_bits(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with one expert in every slot, or with none, between usual ones; also where rows are counted in several pieces."""
    rng = np.random.default_rng(k)
    for rows in (2**16 - 1, 3_000):
        monkeypatch.setattr(bittables, "_ROWS", rows)
        slots = [rng.integers(0, 12, (9_000, k)).astype(np.uint16) for _ in range(2)]
        for x in slots:
            x[:8_000] = 3
            x[8_000:8_500] = 0
        table = np.zeros((12, 12), np.uint32)
        bittables.count_pairs(*slots, table)
        there = [np.zeros((9_000, 12), np.int64) for _ in slots]
        for x, found in zip(slots, there, strict=True):
            np.add.at(found, (np.arange(9_000)[:, None], x), 1)
        assert np.array_equal(table[1:, 1:], (there[0].T @ there[1])[1:, 1:])
        assert np.array_equal(bittables.own_pairs(slots[0], 12), np.triu((there[0].T @ there[0])[1:, 1:], 1))
        assert table.max() > 2**16


def test_no_bit_table_where_scattering_is_faster_or_a_word_is_too_short() -> None:
    words = np.zeros(9, np.uint64)
    assert bittables.bits_of(words, 65, 4) is None and bittables.bits_of(words[:0], 66, 8) is None


IMPORTED = "import sys; from analysis.store import open_run; open_run('data/demo-run').stats.load(0); print('numba' in sys.modules)"
COUNTED = """
from analysis import counting
import numpy as np
print(counting.slots_of(np.zeros((2, 1), np.int16)).tolist())
"""


def run(code: str, folder: Path, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_opening_a_run_does_not_import_numba() -> None:
    assert run(IMPORTED, ROOT) == "False"


def test_counting_works_where_nothing_can_be_cached(tmp_path: Path) -> None:
    """Neither beside the sources nor in a home, as in a container that is only read: a file stands where each folder would be."""
    package = tmp_path / "analysis"
    package.mkdir()
    for name in ("__init__.py", "counting.py"):
        (package / name).write_text((ROOT / "analysis" / name).read_text(encoding="utf-8"), encoding="utf-8")
    (package / "__pycache__").write_text("")
    nowhere = str(tmp_path / "file")
    Path(nowhere).write_text("")
    assert run(COUNTED, tmp_path, HOME=nowhere, XDG_CACHE_HOME=nowhere, PYTHONDONTWRITEBYTECODE="1") == "[[1], [1]]"
    (package / "__pycache__").unlink()
    assert run(COUNTED, tmp_path, HOME=nowhere, XDG_CACHE_HOME=nowhere, PYTHONDONTWRITEBYTECODE="1") == "[[1], [1]]"
    assert list(package.rglob("*.nbi")), "compiled code was not kept where it could be"
