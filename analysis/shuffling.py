"""The compiled kernels of tests and intervals: a table of counts dealt again, groups of units compared under many deals, token ids
counted document by document, documents left out.

Importing this module pays for numba, so what needs it imports it only when there is something to do. Kernels release the GIL and hold no state.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from .counting import compiled, count_runs

DRAWN, FREQUENT = 1 << 24, 1_024  # from so many draws on, cells are drawn of the rows that hold so many, and not each draw
MOST_DRAWN = 10**9  # beyond, numpy refuses to draw cells
RAW = 1 << 15  # random numbers of 64 bits drawn at a time: these, and the places made of them, stay in a processor's cache
_U = np.uintp


def dealt_table(x: np.ndarray, y: np.ndarray, counts: np.ndarray, width: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, y, counts), ascending, of a random table with the margins of the given cells: each draw keeps its x and is dealt another's y.

    y from 0 to ``width`` - 1, int64 [cells] each. The draws, by x and then as given, end where numpy's Generator.shuffle puts them; from
    DRAWN of them on, ``_drawn_and_dealt``: other random numbers, the same distribution, in a time that does not grow with the draws.
    ValueError for another y, more than 65,536 kinds of it, or 2^32 draws.
    """
    n = int(counts.sum())
    if width > 1 << 16 or n >= 1 << 32:
        raise ValueError(f"{n:,} draws of {width:,} kinds are too many to be dealt again")
    if len(y) and not 0 <= y.min() <= y.max() < width:  # a kernel would count it out of bounds
        raise ValueError(f"kinds {y.min()} to {y.max()} in a table of {width}")
    if not (x[1:] >= x[:-1]).all():
        order = x.argsort(kind="stable")
        x, y, counts = x[order], y[order], counts[order]
    rng = np.random.default_rng(seed)
    starts = np.flatnonzero(np.append(True, x[1:] != x[:-1]))[: len(x)]
    totals = np.add.reduceat(counts, starts) if len(starts) else counts
    if DRAWN <= n < MOST_DRAWN and (totals >= FREQUENT).any():
        return _drawn_and_dealt(x[starts], totals, np.bincount(y, counts, width).astype(np.int64), rng)  # floats are exact below 2^53
    return _dealt(np.repeat(y.astype(np.uint16), counts), x[starts], totals, width, rng)


def _drawn_and_dealt(
    names: np.ndarray, totals: np.ndarray, load: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``dealt_table`` of rows ``names`` that hold ``totals``, and ``load`` int64 [width] draws of each kind.

    Given its margins, the table is multivariate hypergeometric: kind after kind falls on the rows by what room each has left, all
    infrequent rows taken as one; what fell on these is dealt to them draw by draw.
    """
    frequent = np.flatnonzero(totals >= FREQUENT)
    left = np.append(totals[frequent], totals.sum() - totals[frequent].sum())
    table = np.empty((len(load), len(left)), np.int64)
    for kind, n in enumerate(load.tolist()):
        table[kind] = rng.multivariate_hypergeometric(left, n, method="marginals")
        left -= table[kind]
    often, rest = np.nonzero(table[:, :-1].T), np.flatnonzero(totals < FREQUENT)
    some = _dealt(np.repeat(np.arange(len(load), dtype=np.uint16), table[:, -1]), rest, totals[rest], len(load), rng)
    row, column, number = (np.concatenate(x) for x in zip((frequent[often[0]], often[1], table[:, :-1].T[often]), some, strict=True))
    order = row.argsort(kind="stable")  # two runs in order
    return names[row[order]], column[order], number[order]


def _dealt(
    held: np.ndarray, names: np.ndarray, totals: np.ndarray, width: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``held`` uint16 [draws] shuffled, in place, and dealt to rows ``names`` that hold ``totals``."""
    places, last = np.empty(RAW, np.uint32), len(held) - 1
    while last > 0:
        raw = rng.integers(0, 1 << 64, RAW, dtype=np.uint64)
        last = _swap(held, raw.astype("<u8", copy=False).view("<u4"), last, places)  # the lower half comes first
    room = int(np.minimum(totals, width).sum()) + 1
    row, column, number = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    cells = _count_rows(held, names, totals, width, row, column, number)
    return row[:cells], column[:cells], number[:cells]


@compiled
def _swap(held: np.ndarray, raw: np.ndarray, last: int, places: np.ndarray) -> int:
    """Fisher and Yates from draw ``last`` down until ``raw``, uint32, is used up; returns the next draw, 0 at the end.

    The place to swap with is as many random bits as it needs, drawn again where it is too large. Places are found before anything is
    swapped: finding them without branches, and swapping without waiting for them, is three times as fast.
    """
    used, mask = 0, 0xFFFFFFFF
    while last > 0 and used < raw.shape[0]:
        while mask >> 1 >= last:
            mask >>= 1
        found, stop = 0, min(raw.shape[0], used + places.shape[0])
        while used < stop and last - found > mask >> 1:
            place = np.int64(raw[_U(used)]) & mask
            places[_U(found)] = place
            found += int(place <= last - found)
            used += 1
        for k in range(found):
            a, b = _U(last - k), _U(places[_U(k)])
            held[a], held[b] = held[b], held[a]
        last -= found
    return last


@compiled
def _count_rows(held: np.ndarray, names: np.ndarray, totals: np.ndarray, width: int, row: np.ndarray, column: np.ndarray,
                number: np.ndarray) -> int:  # fmt: skip
    """How many cells occur, which are written in order; there is room for one more. Row r holds the next totals[r] draws."""
    mine, at, cells = np.zeros(width, np.int64), 0, 0
    for r in range(totals.shape[0]):
        for t in range(at, at + totals[r]):
            mine[_U(held[_U(t)])] += 1
        at += totals[r]
        for e in range(width):  # each is written, and kept where it was counted
            row[cells], column[cells], number[cells] = names[r], e, mine[e]
            cells += mine[e] > 0
            mine[e] = 0
    return cells


@partial(compiled, error_model="numpy")
def compare_deals(columns: np.ndarray, deals: np.ndarray, bar: np.ndarray, pseudo: float) -> tuple[np.ndarray, np.ndarray]:
    """(int64 as ``bar`` [groups, experts]: deals whose statistic reaches it, float64 [deals]: the largest of each, NaN where one is).

    The statistic of ``significance.permutation_test``, bit for bit; columns as there, deals int [deals, units] into groups.
    """
    groups, experts = bar.shape
    exceeded, maximum = np.zeros((groups, experts), np.int64), np.empty(deals.shape[0])
    sums, total, value = np.empty((groups, columns.shape[1])), columns.sum(0), np.empty(experts)
    for d in range(deals.shape[0]):
        sums[:] = 0.0
        for u in range(columns.shape[0]):
            mine, more = sums[_U(deals[d, u])], columns[_U(u)]
            for c in range(columns.shape[1]):
                mine[c] += more[c]
        largest = -np.inf
        for g in range(groups):
            _separate(sums[g], total, pseudo, value)
            for e in range(experts):
                exceeded[g, e] += value[e] >= bar[g, e]
                largest = value[e] if value[e] > largest or value[e] != value[e] else largest
        maximum[d] = largest
    return exceeded, maximum


@partial(compiled, error_model="numpy")
def _separate(here: np.ndarray, total: np.ndarray, pseudo: float, value: np.ndarray) -> None:
    """Of each expert: |share - share elsewhere| over its standard error, from a group's sums and those of all units."""
    n = value.shape[0]
    for e in range(n):
        share, variance = _share(here[e], here[n + e], here[2 * n + e], here[3 * n], here[3 * n + 1], here[3 * n + 2], pseudo)
        other, spread = _share(total[e] - here[e], total[n + e] - here[n + e], total[2 * n + e] - here[2 * n + e],
                               total[3 * n] - here[3 * n], total[3 * n + 1] - here[3 * n + 1], total[3 * n + 2] - here[3 * n + 2], pseudo)  # fmt: skip
        value[e] = abs(share - other) / np.sqrt(variance + spread)


@partial(compiled, error_model="numpy")
def _share(used: float, squares: float, crossed: float, size: float, size_squares: float, n: float, pseudo: float) -> tuple[float, float]:
    """(share of tokens, its variance), as ``significance`` has it."""
    share = used / size
    between = (squares - 2 * share * crossed + share * share * size_squares) * n / max(n - 1, 1.0) / (size * size)
    smooth = (used + pseudo) / (size + 2 * pseudo)
    least = smooth * (1 - smooth) / size
    return share, between if between > least or between != between else least


@compiled
def count_reached(null: np.ndarray, least: np.ndarray, most: np.ndarray, surely: np.ndarray, perhaps: np.ndarray) -> None:
    """Add to surely and perhaps int64 [cells] how many of null float32 [draws, cells] are, but for their sign, at least ``most``, and ``least``, float32 [cells]."""
    for d in range(null.shape[0]):
        row = null[d]
        for c in range(null.shape[1]):
            value = abs(row[c])
            surely[c] += value >= most[c]
            perhaps[c] += value >= least[c]


@compiled
def neighbours_alike(
    words: np.ndarray, first: np.ndarray, ends: np.ndarray, order: np.ndarray, chance: np.ndarray, out: np.ndarray
) -> None:
    """Add to ``out`` int64 [documents, 2]: neighbours of each document with the same first choice (not -1), and with any bit of ``words`` in common.

    Documents end at ``ends``; ``order`` int64 [n] is where their tokens stand, and is dealt anew within each by ``chance`` [n] in [0, 1), where given.
    """
    start = 0
    for d in range(ends.shape[0]):
        stop = ends[d]
        if chance.shape[0] > 0:
            for i in range(stop - 1, start, -1):
                j = start + int(chance[_U(i)] * (i - start + 1))
                order[_U(i)], order[_U(j)] = order[_U(j)], order[_U(i)]
        for i in range(start + 1, stop):
            a, b = order[_U(i - 1)], order[_U(i)]
            out[d, 0] += int(first[_U(a)] == first[_U(b)]) & int(first[_U(a)] >= 0)
            common = np.uint64(0)
            for w in range(words.shape[1]):
                common |= words[_U(a), w] & words[_U(b), w]
            out[d, 1] += int(common != 0)
        start = stop


class DocumentCells:
    """Counts of the document that a pass over the rows is in: ``seen`` int64 [ids], ``used`` int32 [ids, classes + 1], ids that are ``held``
    and ``load`` int64 [classes + 1]; class 0 is no expert. ``now``: number of the document, ids held, tokens."""

    def __init__(self, ids: int, classes: int) -> None:
        self.now, self.held, self.seen = np.array([-1, 0, 0]), np.zeros(ids, np.int64), np.zeros(ids, np.int64)
        self.used, self.load = np.zeros((ids, classes + 1), np.int32), np.zeros(classes + 1, np.int64)

    def arrays(self) -> tuple[np.ndarray, ...]:
        """For the kernels, which keep them from block to block."""
        return self.now, self.held, self.seen, self.used, self.load


@compiled
def count_groups(experts: np.ndarray, edges: np.ndarray, group: np.ndarray, tables: np.ndarray) -> None:
    """Add to tables int64 [documents, groups + 1, classes + 1] the experts [n, k] of tokens of each group [n], both from -1 (counted in place 0)
    on: no branch, in a fifth of the time. Document d is the rows edges[d] to edges[d + 1]."""
    for d in range(tables.shape[0]):
        mine = tables[d]
        for t in range(edges[d], edges[d + 1]):
            row = mine[_U(group[t] + 1)]
            for j in range(experts.shape[1]):
                row[_U(experts[t, j] + 1)] += 1


@partial(compiled, error_model="numpy")
def count_leaning(experts: np.ndarray, document: np.ndarray, row: np.ndarray, cells: tuple[np.ndarray, ...], documents: np.ndarray,
                  leaning: np.ndarray, share: np.ndarray, rate: np.ndarray) -> None:  # fmt: skip
    """Add to documents int64 [ids] who holds an id, and to leaning int64 [ids, classes] who sends it to an expert more often than all it has;
    to share and rate float64 [ids, classes] the two shares of each who holds it: of the id's occurrences, and of all its tokens.

    experts int64 [n, k] from -1 to classes - 1, document int64 [n], side by side, row int64 [n]: -1 for a token that does not count, ids for
    one of another id. A document is added once the next one begins: call with one token of another document, that does not count, at the end.
    """
    now, held, seen, used, load = cells
    own = np.empty(leaning.shape[1])
    for t in range(experts.shape[0]):
        if document[t] != now[0]:
            tokens = now[2]
            for e in range(own.shape[0]):
                own[e] = load[e + 1] / tokens
            for i in range(now[1]):
                r = _U(held[i])
                documents[r] += 1
                n, mine, more, shares, rates = seen[r], used[r], leaning[r], share[r], rate[r]
                for e in range(own.shape[0]):
                    more[e] += mine[e + 1] * tokens > load[e + 1] * n
                    shares[e] += mine[e + 1] / n
                    rates[e] += own[e]
                mine[:] = 0
                seen[r] = 0
            now[0], now[1], now[2] = document[t], 0, 0
            load[:] = 0
        r = row[t]
        if r < 0:
            continue
        now[2] += 1
        for j in range(experts.shape[1]):
            load[_U(experts[t, j] + 1)] += 1
        if r < seen.shape[0]:
            if not seen[r]:
                held[now[1]] = r
                now[1] += 1
            seen[r] += 1
            for j in range(experts.shape[1]):
                used[_U(r), _U(experts[t, j] + 1)] += 1


@compiled
def leave_out(experts: np.ndarray, part: np.ndarray, row: np.ndarray, cells: tuple[np.ndarray, ...], kept: tuple[np.ndarray, ...],
              share: np.ndarray, least: int, total: np.ndarray, number: np.ndarray) -> None:  # fmt: skip
    """Of each part of the documents: add to total float64 [parts] what the sum of the ids' largest shares changes by without it, and take
    from number int64 [parts] the ids then seen fewer than ``least`` times.

    As ``count_leaning``, with ``part`` int64 [n], rising, for document, and -1 for every token that does not count. kept: tokens, start and length int64 [ids],
    and, cell by cell, expert and count; share float64 [ids].
    """
    now, _, seen, used, _ = cells
    tokens, start, length, expert, count = kept
    for t in range(experts.shape[0]):
        if part[t] != now[0]:
            change = 0.0
            for r in range(seen.shape[0]):  # in order, as a sum of floats depends on it
                if not seen[r]:
                    continue
                left, top = tokens[r] - seen[r], 0
                for c in range(start[r], start[r] + length[r]):
                    top = max(top, count[c] - used[r, _U(expert[c] + 1)])
                change += (top / max(left, 1) if left >= least else 0.0) - share[r]
                number[now[0]] -= left < least
                used[r] = 0
                seen[r] = 0
            if now[0] >= 0:
                total[now[0]] += change
            now[0] = part[t]
        r = row[t]
        if r >= 0:
            seen[r] += 1
            for j in range(experts.shape[1]):
                used[_U(r), _U(experts[t, j] + 1)] += 1


def warm_up() -> None:
    """Compile every kernel, or load it from numba's cache."""
    one, none = np.ones(2, np.int64), np.full((2, 1), -1, np.int16)
    dealt_table(one, one, one, 2, 0)
    compare_deals(np.ones((2, 6)), np.zeros((1, 2), np.int64), np.ones((1, 1)), 0.5)
    single = np.ones(1, np.float32)
    count_reached(single[None], single, single, np.zeros(1, np.int64), np.zeros(1, np.int64))
    neighbours_alike(np.ones((2, 1), np.uint64), one, one + 1, np.arange(2), np.zeros(2), np.zeros((2, 2), np.int64))
    cells, two = DocumentCells(1, 1).arrays(), np.zeros(2, np.int64)
    code = np.zeros(2, np.int8)
    count_groups(none, two, code, np.zeros((1, 1, 2), np.int64))
    count_runs((code + 1)[:, None], two, np.zeros((1, 2), np.int32))
    count_leaning(none, one, two, cells, one, np.zeros((1, 1), np.int64), np.zeros((1, 1)), np.zeros((1, 1)))
    cells = DocumentCells(1, 1).arrays()
    leave_out(none, two, two, cells, (one, two, one, two, one), np.ones(1), 1, np.zeros(1), one)
