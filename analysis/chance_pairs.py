"""The pairs of experts that a document's own loads give by chance, document by document, compiled.

Decisions come as slots, see ``counting``; tables have a row or a column per slot, and what slot 0 collects is nobody's. Whoever reads a
run in pieces hands the same ``held`` in again: it holds what was seen of a document that the piece's end cuts.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from .counting import compiled

ROUNDS, CLOSE = 500, 1e-8


@compiled
def add_chance_flow(here: np.ndarray, after: np.ndarray, ends: np.ndarray, held: tuple, expected: np.ndarray, spread: np.ndarray) -> None:
    """Add row total x column total / n of every document that ends at ``ends``, of pairs of choices here [n, k] x after [n, k2].

    expected, spread  float64 [slots here, slots after]: the second adds expected x shares of tokens without either.
    held              int64: tokens with the expert and pairs from it [slots here], the same of those after, tokens [1].
    """
    use, row, use_after, column, tokens = held
    start = 0
    for piece in range(len(ends) + 1):
        stop = ends[piece] if piece < len(ends) else len(here)
        for t in range(start, stop):
            m, m_after = 0, 0
            for s in here[t]:
                m += s > 0
            for s in after[t]:
                m_after += s > 0
                use_after[s] += 1
                column[s] += m
            for s in here[t]:
                use[s] += 1
                row[s] += m_after
        tokens[0] += stop - start
        start = stop
        if piece < len(ends):
            _end_flow(held, expected, spread)


@compiled
def add_chance_flow_of(runs: np.ndarray, runs_after: np.ndarray, each: tuple, starts: np.ndarray, held: tuple, expected: np.ndarray,
                       spread: np.ndarray) -> None:  # fmt: skip
    """``add_chance_flow`` of documents from their loads int32 [documents, slots], where every token has ``each`` experts, here and after.

    starts int64 [documents + 1]: their first rows, and the end of the last, which goes on.
    """
    use, row, use_after, column, tokens = held
    for r in range(len(runs)):
        for s in range(len(use)):
            use[s] += runs[r, s]
            row[s] += runs[r, s] * each[1]
        for s in range(len(use_after)):
            use_after[s] += runs_after[r, s]
            column[s] += runs_after[r, s] * each[0]
        tokens[0] += starts[r + 1] - starts[r]
        if r + 1 < len(runs):
            _end_flow(held, expected, spread)


@partial(compiled, error_model="numpy")
def _end_flow(held: tuple, expected: np.ndarray, spread: np.ndarray) -> None:
    """Add a document that ``held`` holds, and forget it."""
    use, row, use_after, column, tokens = held
    n = np.float64(row[1:].sum())
    to, without = np.empty(len(column)), np.empty(len(column))
    for f in range(len(column)):
        to[f], without[f] = column[f], 1 - use_after[f] / tokens[0]
    for e in range(1, len(row)):
        if row[e]:
            rest, own, mine, more = 1 - use[e] / tokens[0], np.float64(row[e]), expected[e], spread[e]
            for f in range(1, len(to)):
                x = own * to[f] / n
                mine[f] += x
                more[f] += x * rest * without[f]
    for x in held:
        x[:] = 0


@compiled
def add_chance_pairs(here: np.ndarray, ends: np.ndarray, held: tuple, expected: np.ndarray, spread: np.ndarray) -> None:
    """The same of pairs within one site by ``add_fixed_odds``. held  int64: tokens with the expert [slots], tokens with 0..k experts."""
    use, sizes = held
    start = 0
    for piece in range(len(ends) + 1):
        stop = ends[piece] if piece < len(ends) else len(here)
        for t in range(start, stop):
            m = 0
            for s in here[t]:
                m += s > 0
                use[s] += 1
            sizes[m] += 1
        start = stop
        if piece < len(ends):
            _end_pairs(held, expected, spread)


@compiled
def add_chance_pairs_of(runs: np.ndarray, starts: np.ndarray, held: tuple, expected: np.ndarray, spread: np.ndarray) -> None:
    """``add_chance_pairs`` from loads, as ``add_chance_flow_of``."""
    use, sizes = held
    for r in range(len(runs)):
        for s in range(len(use)):
            use[s] += runs[r, s]
        sizes[-1] += starts[r + 1] - starts[r]
        if r + 1 < len(runs):
            _end_pairs(held, expected, spread)


@compiled
def _end_pairs(held: tuple, expected: np.ndarray, spread: np.ndarray) -> None:
    use, sizes = held
    use[0] = 0
    add_fixed_odds(use, sizes, expected, spread)
    for x in held:
        x[:] = 0


@compiled
def add_fixed_odds(load: np.ndarray, sizes: np.ndarray, expected: np.ndarray, spread: np.ndarray) -> None:
    """Add to ``expected`` [E, E], above its diagonal, the tokens that use both experts, where each token draws its experts at fixed odds without return.

    load int [E]: tokens that use the expert.  sizes int [k + 1]: tokens that have 0..k experts. The odds are those that give ``load``, to
    CLOSE of the tokens (Chen, Dempster and Liu 1994). Sums over sets are elementary symmetric functions of the odds, put together from
    those of the experts before, between and after: nothing is subtracted, so no digits are lost. ``spread``: see ``add_chance_flow``.
    """
    every = sizes.sum()
    tokens = every - sizes[0]
    always, free = np.flatnonzero((load == tokens) & (load > 0)), np.flatnonzero((load < tokens) & (load > 0))
    sizes = sizes[len(always) :].copy()  # those of every token are out of the draw
    if not len(always):
        sizes[0] = 0
    rest, pairs = 1 - load / every, _drawn_pairs(load[free], sizes, tokens)
    for b in range(len(free)):
        f = free[b]
        for a in range(b):
            e, x = free[a], pairs[b, a]
            expected[e, f] += x
            spread[e, f] += x * rest[e] * rest[f]
    for e in always:
        for f in np.flatnonzero(load):
            if f > e or load[f] < tokens:
                expected[min(e, f), max(e, f)] += load[f]
                spread[min(e, f), max(e, f)] += load[f] * rest[e] * rest[f]


@compiled
def _drawn_pairs(load: np.ndarray, sizes: np.ndarray, tokens: int) -> np.ndarray:
    """float64 [E, E], below the diagonal: ``add_fixed_odds`` where no expert is used by none or by all of the tokens."""
    n, most = len(load), len(sizes) - 1
    while most > 0 and not sizes[most]:
        most -= 1
    out = np.zeros((n, n))
    if most < 2:
        return out
    odds, before, after = np.empty(n), np.zeros((n + 1, most + 1)), np.zeros((n + 1, most + 1))
    for e in range(n):
        odds[e] = load[e] / (tokens - load[e])
    rest = np.zeros((n, most))  # what the experts after e give those that lack e and so many more
    for _ in range(ROUNDS):
        _fill(odds, before, after)
        _weigh(sizes, after, 1, rest)
        off = 0.0
        for e in range(n):
            reached = 0.0
            for m in range(most):
                reached += before[e, m] * rest[e, m]
            reached *= odds[e]
            off = max(off, abs(reached - load[e]))
            step = load[e] * (tokens - reached) / (reached * (tokens - load[e]))
            odds[e] *= np.sqrt(step * np.sqrt(step))  # a whole step is too long by up to half, where two experts share a place
        if off <= CLOSE * tokens:
            break
    _fill(odds, before, after)
    _weigh(sizes, after, 2, rest)
    others = np.zeros((most, n))  # [m, a]: sums over m of the experts before b, without a
    for b in range(n):
        pair = out[b]
        for m in range(most - 1):
            line, weight = others[m], rest[b, m] * odds[b]
            for a in range(b):
                pair[a] += line[a] * weight
        for a in range(b):
            pair[a] *= odds[a]
        for m in range(most - 1, 0, -1):
            line, less = others[m], others[m - 1]
            for a in range(b):
                line[a] += odds[b] * less[a]
        others[:, b] = before[b, :most]
    return out


@compiled
def _fill(odds: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
    """[e, m]: the sum, over sets of m of the first e experts, or of those from e on, of the product of their odds."""
    n = len(odds)
    before[0, 0] = after[n, 0] = 1
    for e in range(n):
        before[e + 1, 0] = after[n - 1 - e, 0] = 1
        for m in range(1, before.shape[1]):
            before[e + 1, m] = before[e, m] + odds[e] * before[e, m - 1]
            after[n - 1 - e, m] = after[n - e, m] + odds[n - 1 - e] * after[n - e, m - 1]


@compiled
def _weigh(sizes: np.ndarray, after: np.ndarray, taken: int, rest: np.ndarray) -> None:
    """rest [e, m]: over all sizes, tokens / sum over all sets x sums over what is left of a set when ``taken`` and m before e are."""
    rest[:] = 0
    for size in range(taken, after.shape[1]):
        if sizes[size]:
            per = sizes[size] / after[0, size]
            for e in range(rest.shape[0]):
                for m in range(size - taken + 1):
                    rest[e, m] += per * after[e + 1, size - taken - m]
