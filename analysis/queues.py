"""Who stands where in an expert's queue: the compiled kernels under capacity.py.

A rank is an assignment's place in its expert's queue within its batch, 0 for the first served. It is found once per
drop policy; with C slots the assignments of rank < C are kept, for every C. So one pass answers a whole curve over
capacity factors. Importing this module imports numba (0.2 s), so capacity.py does it only when something is ranked. Kernels
release the GIL and hold no state. Those that call each other share this file: what numba keeps on disk of one file's functions
does not notice that another file's have changed.

Arrays shared by all kernels: experts int16 or int32 [tokens, k], -1 = none; weights float32 [tokens, k]; order int64
[tokens], rows in the order they are served; starts int64 [batches + 1] into order; bits uint32 [tokens, k], the bits of a
float32 priority, larger first. A bad id, outside -1..E-1, ends a kernel before anything is written out of bounds.
"""

# mypy: ignore-errors
# numba infers the types of these functions, mypy cannot.
from __future__ import annotations

import numpy as np

from .counting import compiled

POSITION, CHOICE, SORTED, BATCH_PRIORITY, RANDOM = range(5)  # RANDOM is sorted by other bits than those of the weights
NOBODY = np.int32(2**31 - 1)
CELLS, FEW = 1024, 32


@compiled
def key_of(bits):
    """uint32 -> uint64: a key whose ascending order is the descending order of float32 with these bits; -0 equals 0."""
    bits = np.uint32(0) if bits == np.uint32(0x80000000) else bits
    return np.uint64(bits if bits >> np.uint32(31) else bits ^ np.uint32(0x7FFFFFFF))


@compiled
def weight_of(key):
    """The float32 whose bits have this key."""
    bits = np.uint32(key)
    return np.uint32(bits if bits >> np.uint32(31) else bits ^ np.uint32(0x7FFFFFFF)).view(np.float32)


@compiled
def sort_keyed(packed, scratch, n):
    """Stable ascending sort of packed[:n] (uint64, key in the high 32 bits) by key; returns the array that holds it.

    Least significant digit first over the bits in which any two keys differ: bfloat16 weights take fewer passes than float32.
    """
    low, high, some, every = np.uint64(2**32), np.uint64(0), np.uint64(0), ~np.uint64(0)
    for i in range(n):
        key = packed[i] >> np.uint64(32)
        low, high, some, every = min(low, key), max(high, key), some | key, every & key
    if low >= high:
        return packed
    shift, bits = np.uint64(0), 0
    while not ((some ^ every) >> shift) & np.uint64(1):
        shift += np.uint64(1)
    while ((high - low) >> shift) >> np.uint64(bits):
        bits += 1
    widest = 4
    while widest < 11 and (1 << widest) < n:
        widest += 1
    passes = (bits + widest - 1) // widest
    width = np.uint64((bits + passes - 1) // passes)
    mask = (np.uint64(1) << width) - np.uint64(1)
    low, shift = low << np.uint64(32), shift + np.uint64(32)
    places = np.empty(1 << np.int64(width), np.uint32)
    for _ in range(passes):
        places[:] = 0
        for i in range(n):
            places[((packed[i] - low) >> shift) & mask] += np.uint32(1)
        total = np.uint32(0)
        for digit in range(len(places)):
            places[digit], total = total, total + places[digit]
        for i in range(n):
            digit = ((packed[i] - low) >> shift) & mask
            scratch[places[digit]] = packed[i]
            places[digit] += np.uint32(1)
        packed, scratch = scratch, packed
        shift += width
    return packed


@compiled
def sort_few(packed, start, stop):
    """Ascending insertion sort of packed[start:stop]."""
    for i in range(start + 1, stop):
        moving, at = packed[i], i
        while at > start and packed[at - 1] > moving:
            packed[at] = packed[at - 1]
            at -= 1
        packed[at] = moving


@compiled
def sort_at_cuts(packed, begin, end, scratch, places, cuts):
    """Scratch[:end - begin] gets packed[begin:end] (distinct uint64) so that its first c are the c least, for every c of ``cuts``.

    cuts ascend; places uint32 [CELLS]. One counting sort by leading bits puts cells in order; only a cell that a cut divides is
    sorted within.
    """
    n, low, high = end - begin, ~np.uint64(0), np.uint64(0)
    for i in range(begin, end):
        low, high = min(low, packed[i]), max(high, packed[i])
    shift = np.uint64(0)
    while (high - low) >> shift >= np.uint64(len(places)):
        shift += np.uint64(1)
    places[:] = 0
    for i in range(begin, end):
        places[(packed[i] - low) >> shift] += np.uint32(1)
    total = np.uint32(0)
    for cell in range(len(places)):
        places[cell], total = total, total + places[cell]
    for i in range(begin, end):
        cell = (packed[i] - low) >> shift
        scratch[places[cell]] = packed[i]
        places[cell] += np.uint32(1)  # comes to stand where the cell ends
    done = 0
    for c in range(len(cuts)):
        cut = cuts[c]
        if cut >= n:
            break
        if cut >= done:
            cell = np.int64((scratch[cut] - low) >> shift)
            start, stop = np.int64(places[cell - 1]) if cell else 0, np.int64(places[cell])
            if start < cut:
                if stop - start <= FEW:
                    sort_few(scratch, start, stop)
                else:
                    scratch[start:stop] = sort_keyed(scratch[start:stop], packed[begin + start : begin + stop], stop - start)
                done = stop


@compiled
def by_choice(bits, rows, slots):
    """Fill slots[:len(rows)] with each row's slot numbers, largest priority first; ties keep slot order."""
    for i in range(len(rows)):
        for s in range(bits.shape[1]):
            at, key = s, key_of(bits[rows[i], s])
            while at > 0 and key_of(bits[rows[i], slots[i, at - 1]]) > key:
                slots[i, at] = slots[i, at - 1]
                at -= 1
            slots[i, at] = s


@compiled
def serve_position(experts, rows, counts, ranks):
    """All choices of a token together, tokens in order. Every server fills ranks[:len(rows)] (int32, -1 = no expert) and
    counts [E], which must be 0; it returns True for an id outside -1..E-1, having written nothing out of bounds."""
    n_experts = np.uint64(len(counts))
    for i in range(len(rows)):
        for s in range(experts.shape[1]):
            e = np.uint64(np.int64(experts[rows[i], s]))  # -1 becomes the largest number
            if e < n_experts:
                ranks[i, s] = counts[e]
                counts[e] += 1
            elif np.int64(e) == -1:
                ranks[i, s] = -1
            else:
                return True
    return False


@compiled
def part_by_expert(experts, bits, rows, low_bits, counts, ends, packed):
    """Put every assignment into packed, expert by expert in token order: its key, then its row number << low_bits | slot.

    Fills counts [E], which must be 0, and ends [E], where each expert's part of packed ends. True for a bad id.
    """
    n_experts = np.uint64(len(counts))
    for i in range(len(rows)):
        row = rows[i]
        for s in range(experts.shape[1]):
            e = np.uint64(np.int64(experts[row, s]))
            if e < n_experts:
                counts[e] += 1
            elif np.int64(e) != -1:
                return True
    ends[0] = 0
    for e in range(len(counts) - 1):
        ends[e + 1] = ends[e] + counts[e]
    for i in range(len(rows)):
        row = rows[i]
        for s in range(experts.shape[1]):
            e = np.uint64(np.int64(experts[row, s]))
            if e < n_experts:
                place = np.uint64(ends[e])
                packed[place] = key_of(bits[row, s]) << np.uint64(32) | np.uint64(i) << low_bits | np.uint64(s)
                ends[e] = place + np.uint64(1)
    return False


@compiled
def serve_sorted(experts, bits, rows, counts, ranks, ends, packed, scratch):
    """Every expert serves its assignments by descending priority; ties by token order, then slot order."""
    low_bits = slot_bits(experts.shape[1])
    if part_by_expert(experts, bits, rows, low_bits, counts, ends, packed):
        return True
    ranks[: len(rows)] = -1
    for e in range(len(counts)):
        ordered = sort_keyed(packed[ends[e] - counts[e] : ends[e]], scratch, counts[e])
        for r in range(counts[e]):
            at = ordered[r] & np.uint64(0xFFFFFFFF)
            ranks[at >> low_bits, at & ((np.uint64(1) << low_bits) - np.uint64(1))] = r
    return False


@compiled
def slot_bits(k):
    """Bits that hold a slot number below k."""
    bits = np.uint64(0)
    while (k - 1) >> np.int64(bits):
        bits += np.uint64(1)
    return bits


@compiled
def serve_choices(experts, bits, rows, counts, ranks, slots, packed, scratch, by_priority):
    """All first choices, then all second choices; tokens in order, or by their best priority where by_priority."""
    n, n_experts = len(rows), np.int64(len(counts))
    by_choice(bits, rows, slots)
    for i in range(n):
        key = key_of(bits[rows[i], slots[i, 0]]) if by_priority else np.uint64(0)
        packed[i] = (key << np.uint64(32)) | np.uint64(i)
    ordered = sort_keyed(packed, scratch, n)
    for c in range(experts.shape[1]):
        for j in range(n):
            i = np.int64(ordered[j] & np.uint64(0xFFFFFFFF))
            s = slots[i, c]
            e = np.int64(experts[rows[i], s])
            if e >= 0 and e < n_experts:
                ranks[i, s] = counts[e]
                counts[e] += 1
            elif e == -1:
                ranks[i, s] = -1
            else:
                return True
    return False


@compiled
def serve(experts, bits, rows, policy, counts, ranks, work):
    """Ranks of one batch by policy; True if an id is bad."""
    slots, ends, packed, scratch = work
    if policy == POSITION:
        return serve_position(experts, rows, counts, ranks)
    if policy in (SORTED, RANDOM):
        return serve_sorted(experts, bits, rows, counts, ranks, ends, packed, scratch)
    return serve_choices(experts, bits, rows, counts, ranks, slots, packed, scratch, policy == BATCH_PRIORITY)


@compiled
def workspace(starts, k, n_experts, policy):
    """(ranks [n, k], (slots [n, k], ends [E], packed, scratch)) for the largest batch of n tokens; empty where not needed."""
    n = 1
    for b in range(len(starts) - 1):
        n = max(n, starts[b + 1] - starts[b])
    size = n * k if policy in (SORTED, RANDOM) else (0 if policy == POSITION else n)
    choices = np.empty((n if policy in (CHOICE, BATCH_PRIORITY) else 0, k), np.int16)
    ends = np.empty(n_experts, np.int64)
    return np.empty((n, k), np.int32), (choices, ends, np.empty(size, np.uint64), np.empty(size, np.uint64))


@compiled
def rank_all(experts, bits, order, starts, n_experts, policy):
    """(ranks int32 [tokens, k] with -1 = no expert, loads int64 [batches, E], bad id)."""
    ranks, work = workspace(starts, experts.shape[1], n_experts, policy)
    out = np.full(experts.shape, np.int32(-1))
    loads = np.zeros((len(starts) - 1, n_experts), np.int64)
    counts = np.zeros(n_experts, np.int32)
    for b in range(len(starts) - 1):
        rows = order[starts[b] : starts[b + 1]]
        counts[:] = 0
        if serve(experts, bits, rows, policy, counts, ranks, work):
            return out, loads, True
        for i in range(len(rows)):
            for s in range(experts.shape[1]):
                out[rows[i], s] = ranks[i, s]
        loads[b] = counts
    return out, loads, False


@compiled
def loads_of(experts, order, starts, n_experts):
    """int64 [batches, E]: assignments to each expert in each batch; other ids are not counted."""
    loads, wide = np.zeros((len(starts) - 1, n_experts), np.int64), np.uint64(n_experts)
    for b in range(len(starts) - 1):
        mine = loads[b]
        for row in order[starts[b] : starts[b + 1]]:
            for s in range(experts.shape[1]):
                e = np.uint64(np.int64(experts[row, s]))  # -1 becomes the largest number
                if e < wide:
                    mine[e] += 1
    return loads


@compiled
def excess(loads, slots):
    """int64 [factors]: sum over batches and experts of what loads int64 [batches, E] have above slots int64 [batches, factors]."""
    out = np.zeros(slots.shape[1], np.int64)
    for b in range(loads.shape[0]):
        mine = loads[b]
        most = mine.max() if len(mine) else 0
        for f in range(slots.shape[1]):
            limit, over = slots[b, f], 0
            if limit < most:
                for e in range(len(mine)):
                    over += max(mine[e] - limit, 0)
                out[f] += over
    return out


@compiled
def by_rank(weights, rows, ranks, stood, mass):
    """Add a batch to ``stood`` int64 [3, ranks], tokens by their best rank, worst rank and that of their first choice, and to mass[r], gate
    weight served at rank r. The first choice has the largest weight; ties go to the lower slot."""
    for i in range(len(rows)):
        best, worst, first, most = NOBODY, np.int32(-1), np.int32(0), np.float32(-np.inf)
        for s in range(weights.shape[1]):
            r, w = ranks[i, s], weights[rows[i], s]
            if r >= 0:
                mass[r] += w
                best, worst = min(best, r), max(worst, r)
                if w > most:
                    most, first = w, r
        if worst >= 0:
            stood[0, best] += 1
            stood[1, worst] += 1
            stood[2, first] += 1


@compiled
def rows_by_rank(experts, weights, start, stop, counts, stood, mass):
    """serve_position and by_rank of rows start..stop-1 in one pass that stores no rank. True for a bad id.

    Two assignments at a time, both known to have an expert, are 1.15 times as fast as one. Unsigned indices need no test of the sign.
    """
    n_experts, k, one, none = np.uint64(len(counts)), np.uint64(experts.shape[1]), np.uint64(1), np.uint32(NOBODY)
    for i in range(np.uint64(start), np.uint64(stop)):
        best, worst, first, most, s = none, np.uint32(0), np.uint32(0), np.float32(-np.inf), np.uint64(0)
        while s < k:
            e = np.uint64(np.int64(experts[i, s]))  # -1 becomes the largest number
            f = np.uint64(np.int64(experts[i, s + one])) if s + one < k else ~np.uint64(0)
            if e < n_experts and f < n_experts:
                r = np.uint32(counts[e])
                counts[e] = r + np.uint32(1)
                q = np.uint32(counts[f])
                counts[f] = q + np.uint32(1)
                w, v = weights[i, s], weights[i, s + one]
                mass[r] += w
                mass[q] += v
                best, worst = min(best, min(r, q)), max(worst, max(r, q))
                first, most = (r, w) if w > most else (first, most)
                first, most = (q, v) if v > most else (first, most)
            else:
                for j in range(2):
                    g = f if j else e
                    if g < n_experts:
                        r, w = np.uint32(counts[g]), weights[i, s + np.uint64(j)]
                        counts[g] = r + np.uint32(1)
                        mass[r] += w
                        best, worst = min(best, r), max(worst, r)
                        first, most = (r, w) if w > most else (first, most)
                    elif np.int64(g) != -1:
                        return True
            s += np.uint64(2)
        if best != none:
            stood[0, best] += 1
            stood[1, worst] += 1
            stood[2, first] += 1
    return False


@compiled
def position_by_rank(experts, weights, order, start, stop, counts, stood, mass):
    """rows_by_rank over order[start:stop], as many consecutive rows at a time as there are: documents are. True for a bad id."""
    while start < stop:
        end, ahead = start + 1, order[start] - start
        while end < stop and order[end] - end == ahead:
            end += 1
        if rows_by_rank(experts, weights, start + ahead, end + ahead, counts, stood, mass):
            return True
        start = end
    return False


@compiled
def sorted_by_rank(experts, bits, rows, cuts, counts, token, ends, packed, scratch, stood, mass):
    """serve_sorted and by_rank without ranks, and with no more order than the cuts need.

    Ascending ``cuts``: a rank is only told against them, so sums of tokens and mass over ranks from a cut on are exact.
    token int32 [4, n] is scratch: each token's best and worst rank, slot of the first choice, and its rank. True for a bad id.
    """
    low_bits, places, n = slot_bits(experts.shape[1]), np.empty(CELLS, np.uint32), len(rows)
    if part_by_expert(experts, bits, rows, low_bits, counts, ends, packed):
        return True
    best, worst, choice, first = token
    for i in range(n):
        best[i], worst[i], choice[i], least = NOBODY, -1, 0, ~np.uint64(0)
        for s in range(experts.shape[1]):
            key = key_of(bits[rows[i], s])
            if experts[rows[i], s] >= 0 and key < least:
                choice[i], least = s, key
    for e in range(len(counts)):
        sort_at_cuts(packed, ends[e] - counts[e], ends[e], scratch, places, cuts)
        for r in range(counts[e]):
            at = scratch[r] & np.uint64(0xFFFFFFFF)
            i = at >> low_bits
            best[i], worst[i] = min(best[i], np.int32(r)), max(worst[i], np.int32(r))
            if at & ((np.uint64(1) << low_bits) - np.uint64(1)) == np.uint64(choice[i]):
                first[i] = r
            mass[r] += weight_of(scratch[r] >> np.uint64(32))
    for i in range(n):
        if worst[i] >= 0:
            stood[0, best[i]] += 1
            stood[1, worst[i]] += 1
            stood[2, first[i]] += 1
    return False


@compiled
def above_each(slots, places, counts, alive, stood, mass, above, lost):
    """Add to above int64 [4, factors] (assignments; tokens by best and worst rank and first choice) and lost [factors] what one batch has
    at ranks >= slots; clear the tallies.

    slots [factors] ascend; places [factors] say which factor each belongs to. Returns (assignments, gate mass).
    """
    top, assignments = 0, 0
    for e in range(len(counts)):
        alive[counts[e]] += 1
        assignments += counts[e]
        top = max(top, counts[e])
    r, waiting, over, best, worst, first, sum_lost = np.int64(top), 0, 0, 0, 0, 0, 0.0
    for f in range(len(slots) - 1, -1, -1):
        while r > slots[f]:
            waiting += alive[r]  # experts with a load above rank r - 1
            r -= 1
            over += waiting
            best += stood[0, r]
            worst += stood[1, r]
            first += stood[2, r]
            sum_lost += mass[r]
        at = places[f]
        above[0, at] += over
        above[1, at] += best
        above[2, at] += worst
        above[3, at] += first
        lost[at] += sum_lost
    total = sum_lost
    for j in range(r - 1, -1, -1):
        total += mass[j]
    alive[: top + 1] = 0
    stood[:, :top] = 0
    mass[:top] = 0
    return assignments, total


@compiled
def curve(experts, weights, bits, order, starts, n_experts, policy, slots, places, row_of):
    """(above int64 [4, factors] and lost float64 [factors] as in above_each, (assignments, gate mass), bad id).

    slots int64 [rows, factors], ascending in each row, where places [rows, factors] say which factor each belongs to;
    row_of int32 [batches] names a batch's row.
    """
    above, lost = np.zeros((4, slots.shape[1]), np.int64), np.zeros(slots.shape[1])
    ranks, work = workspace(starts, experts.shape[1], n_experts, policy)
    longest = ranks.size + 1  # of a queue, should every token name one expert in every slot
    counts, token = np.zeros(n_experts, np.int32), np.empty((4, len(ranks) if policy == SORTED else 0), np.int32)
    alive, stood, mass = np.zeros(longest, np.int64), np.zeros((3, longest), np.int64), np.zeros(longest)
    assignments, total = 0, 0.0
    for b in range(len(starts) - 1):
        rows = order[starts[b] : starts[b + 1]]
        counts[:] = 0
        if policy == POSITION:
            bad = position_by_rank(experts, weights, order, starts[b], starts[b + 1], counts, stood, mass)
        elif policy == SORTED:
            _, ends, packed, scratch = work
            bad = sorted_by_rank(experts, bits, rows, slots[row_of[b]], counts, token, ends, packed, scratch, stood, mass)
        else:
            bad = serve(experts, bits, rows, policy, counts, ranks, work)
            if not bad:
                by_rank(weights, rows, ranks, stood, mass)
        if bad:
            return above, lost, (assignments, total), True
        n, sum_mass = above_each(slots[row_of[b]], places[row_of[b]], counts, alive, stood, mass, above, lost)
        assignments, total = assignments + n, total + sum_mass
    return above, lost, (assignments, total), False
