"""Which experts go together: in one token, from one layer to the next, between two runs.

Every count is set against what the experts' loads alone would give, because two busy experts meet often by chance.
Definitions: co-activation and router saturation OLMoE (arXiv 2409.02060) eq. 6 and 5. From statistics alone, but for saturation,
which compares two runs token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from .reading import blocks, documents_of
from .significance import MOST_UNITS, bootstrap_sums, interval
from .trace import Trace, TraceError

TURNS, TURNS_BUDGET = (19, 199), 200_000_000  # shuffles of two runs' agreement, as many as so many looked-up choices allow


@dataclass(frozen=True)
class PairCounts:
    """Pairs of experts, rows x columns. For flow, rows are this site's experts and columns the next site's.

    observed   int64: tokens (co-activation) or pairs of choices (flow).
    expected   float64: with the same row and column totals, and nothing else in common.
    lift       observed / expected; 1 by chance; NaN where nothing is expected.
    share      observed / row total: given the row's expert, how often the column's. OLMoE eq. 6 for co-activation.
    residual   (observed - expected) / sqrt(expected): for tokens drawn independently beyond +-4 is no accident; tokens
               of one document are not independent, so read it as a ranking, not as a test.
    n          what ``observed`` sums to, each pair once.  chance_share  share under uniform routing.
    """

    observed: np.ndarray
    expected: np.ndarray
    lift: np.ndarray
    share: np.ndarray
    residual: np.ndarray
    n: int
    chance_share: float


def coactivation(trace: Trace, site: int) -> PairCounts:
    """Experts of the same token: symmetric, empty diagonal. Uniform routing shares (k - 1) / (E - 1).

    Expected is a_i a_j with the same number of partners for every expert: exact for k = 2 where experts are drawn by
    fixed odds without return, close for larger k. (n_i n_j / n would be too high: no token has one expert twice.)
    """
    observed = trace.stats.coactivation(site)
    layer = trace.layers[site]
    chance = (layer.top_k - 1) / (layer.n_classes - 1) if layer.n_classes > 1 else float("nan")
    load = trace.stats.load(site)[:, None]
    pairs = _pairs(observed, quasi_independent(observed.sum(0)), int(observed.sum()) // 2, chance)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = observed / load
    np.fill_diagonal(share, np.nan)
    return PairCounts(pairs.observed, pairs.expected, pairs.lift, share, pairs.residual, pairs.n, pairs.chance_share)


def quasi_independent(totals: np.ndarray, rounds: int = 10_000) -> np.ndarray:
    """float64 [E, E], symmetric, zero diagonal, a_i a_j elsewhere, rows adding up to ``totals`` (Goodman 1968).

    By proportional fitting, to 1e-9 of the total or ``rounds`` rounds; an expert in nearly every pair converges slowly.
    """
    a = partner_odds(totals, rounds)
    out = np.outer(a, a)
    np.fill_diagonal(out, 0)
    return out


def partner_odds(totals: np.ndarray, rounds: int = 10_000, close: float = 1e-9) -> np.ndarray:
    """float64 [..., E]: a of ``quasi_independent`` for each row of totals [..., E], to ``close`` of the row's total or ``rounds`` rounds."""
    want = totals.astype(np.float64)
    sums = want.sum(-1, keepdims=True)
    a = want / np.sqrt(np.where(sums > 0, sums, 1))
    for _ in range(rounds):
        reached = a * (a.sum(-1, keepdims=True) - a)
        if (np.abs(reached - want) <= close * sums).all():
            break
        with np.errstate(divide="ignore", invalid="ignore"):
            a = np.where(reached > 0, a * np.sqrt(want / reached), 0)
    return a


def flow(trace: Trace, site: int, first: bool = False) -> PairCounts:
    """From this site's experts to the next one's of the stream: all pairs of choices, or first choices only.

    Expected is row total x column total / n. Empty [E, 0] after the last site.
    """
    observed = trace.stats.flow(site, first)
    n = int(observed.sum())
    expected = observed.sum(1, keepdims=True) * observed.sum(0, keepdims=True) / n if n else np.zeros(observed.shape)
    return _pairs(observed, expected, n, 1 / observed.shape[1] if observed.shape[1] else float("nan"))


def _pairs(observed: np.ndarray, expected: np.ndarray, n: int, chance: float) -> PairCounts:
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = np.where(expected > 0, observed / expected, np.nan)
        share = observed / observed.sum(1, keepdims=True)
        residual = np.where(expected > 0, (observed - expected) / np.sqrt(expected), np.nan)
    return PairCounts(observed, expected, lift, share, residual, n, chance)


def saturation(a: Trace, b: Trace, progress: Callable[[int, int], None] | None = None) -> pa.Table:
    """How far two runs over the same tokens agree, one row per site: mean over tokens of |chosen by both| / k.

    Columns site, layer, n (tokens), saturation (0 to 1), low, high (95 % bootstrap over documents; NaN below 2),
    chance (k / E), chance_given_loads (independent choices at the two runs' loads); shuffled: mean over ``draws`` where
    the tokens of b are turned round within each document (by random steps, the last following on the first), which
    keeps what documents and stretches of text have in common; p: that a turn agrees as much. OLMoE eq. 5 with b the final
    checkpoint. One pass over both runs; ``progress`` is told (sites done, sites). Raises TraceError where texts, tokenization or sites
    differ.
    """
    check_comparable(a, b)
    rows = []
    for done, layer in enumerate(a.layers, 1):
        rows.append(_site_saturation(a, b, layer.index))
        if progress is not None:
            progress(done, len(a.layers))
    return pa.Table.from_pylist(rows)


def check_comparable(a: Trace, b: Trace) -> None:
    """Raise TraceError, which says what differs, unless both runs recorded the same tokens at sites of the same shapes."""
    shapes = [[(x.stream, x.n_classes, x.top_k) for x in t.layers] for t in (a, b)]
    if shapes[0] != shapes[1]:
        raise TraceError(f"runs {a.name!r} and {b.name!r} have other sites, experts or top-k: they cannot be compared token by token")
    keys = [t.documents.select(["document", "stack", "first_row", "n_tokens", "digest"]).to_pylist() for t in (a, b)]
    if keys[0] != keys[1]:
        raise TraceError(f"runs {a.name!r} and {b.name!r} are not over the same token ids: record the same texts with the same tokenizer")


def _site_saturation(a: Trace, b: Trace, site: int) -> dict[str, object]:
    layer, n = a.layers[site], a.n_tokens(a.layers[site].stream)
    lengths = documents_of(a, layer.stream)[1]
    units = max(min(len(lengths), MOST_UNITS), 1)
    unit = np.repeat(np.arange(len(lengths)) * units // max(len(lengths), 1), lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)
    draws = int(np.clip(TURNS_BUDGET // max(n * layer.top_k, 1), *TURNS))
    agreed, turned, rng = np.zeros(units), np.zeros(draws), np.random.default_rng(site)
    for start, mine in blocks(a, layer):
        rows = slice(start, start + len(mine))
        other = b.routing(site, start, rows.stop).experts.astype(np.int64)
        chosen = np.zeros((len(mine), layer.n_classes + 1), bool)  # a class more, that nothing chooses: -1, no expert
        np.put_along_axis(chosen, mine, True, 1)
        chosen[:, -1] = False
        agreed += np.bincount(unit[rows], np.take_along_axis(chosen, other, 1).sum(1), units)
        turned += [np.take_along_axis(chosen, other[at], 1).sum() for at in _turns(document[rows], draws, rng)]
    sizes = np.bincount(unit, minlength=units)
    drawn = bootstrap_sums(np.column_stack([agreed, sizes]), np.zeros(units, np.int64))[:, 0]
    low, high = interval(drawn[:, 0] / drawn[:, 1] / layer.top_k) if len(lengths) > 1 else (np.nan, np.nan)
    given = (a.stats.load(site) * b.stats.load(site)).sum() / n**2 / layer.top_k if n else float("nan")
    value = agreed.sum() / (n * layer.top_k) if n else float("nan")
    return {"site": site, "layer": layer.layer, "n": n, "saturation": float(value), "low": float(low), "high": float(high),
            "chance": layer.top_k / layer.n_classes, "chance_given_loads": float(given),
            "shuffled": float(turned.mean() / (n * layer.top_k)) if n else float("nan"),
            "p": float(((turned >= agreed.sum()).sum() + 1) / (draws + 1)) if n else float("nan"), "draws": draws}  # fmt: skip


def _turns(document: np.ndarray, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """``draws`` times the rows [n] in another order: each document's rows (side by side) turned round by a random step."""
    first = np.flatnonzero(np.append(True, document[1:] != document[:-1]))[: len(document)]
    length = np.diff(np.append(first, len(document)))
    place, start, size = np.arange(len(document)) - np.repeat(first, length), np.repeat(first, length), np.repeat(length, length)
    for _ in range(draws):
        yield start + (place + np.repeat(rng.integers(0, length), length)) % size
