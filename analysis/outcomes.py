"""What a served batch came to: where overflow is rerouted, and who lost what. Compiled like queues.py, same arrays."""

# mypy: ignore-errors
# numba infers the types of these functions, mypy cannot.
from __future__ import annotations

import numpy as np

from .counting import compiled


@compiled
def next_best(preference, chosen, held, last):
    """The expert a token prefers next after ``last`` (-1 = none yet), leaving out those it chose or holds; -1 = no more.

    preference float32 [E]; ties go to the lower id. chosen, held [k].
    """
    best = -1
    for e in range(len(preference)):
        after = last < 0 or preference[e] < preference[last] or (preference[e] == preference[last] and e > last)
        if after and (best < 0 or preference[e] > preference[best]):
            taken = False
            for s in range(len(chosen)):
                taken |= chosen[s] == e or held[s] == e
            if not taken:
                best = e
    return best


@compiled
def reroute(experts, ranks, preference, order, starts, slots):
    """int32 [tokens, k]: the expert that serves each assignment, -1 = none or dropped, after moving what overflowed.

    Stage by stage, in token order, each assignment without a slot tries its token's next-best expert (preference
    float32 [tokens, E]); it is placed where there is room. ranks [tokens, k] as served first; slots int64 [batches].
    """
    served, k, n_experts = np.full(experts.shape, np.int32(-1)), experts.shape[1], preference.shape[1]
    for b in range(len(starts) - 1):
        rows = order[starts[b] : starts[b + 1]]
        room = np.full(n_experts, slots[b])
        waiting = np.empty(len(rows) * k, np.int64)
        n = 0
        for i in range(len(rows)):
            for s in range(k):
                e = experts[rows[i], s]
                if e >= 0 and ranks[rows[i], s] < slots[b]:
                    served[rows[i], s] = e
                    room[e] -= 1
                elif e >= 0:
                    waiting[n] = rows[i] * k + s
                    n += 1
        last, free = np.full(n, -1), room.sum()
        while n and free:
            still = 0
            for j in range(n):
                row, s = waiting[j] // k, waiting[j] % k
                e = next_best(preference[row], experts[row], served[row], last[j]) if free else -1
                if e >= 0 and room[e] > 0:
                    served[row, s] = e
                    room[e] -= 1
                    free -= 1
                elif e >= 0:
                    waiting[still], last[still] = waiting[j], e
                    still += 1
            n = still
    return served


@compiled
def within(ranks, limit, of_row):
    """bool [tokens, k]: ranks int32 [tokens, k], -1 = no expert, that are below the limit int64 [batches] of the row's batch."""
    kept = np.empty(ranks.shape, np.bool_)
    for i in range(ranks.shape[0]):
        most = np.uint32(min(limit[of_row[i]], 2**31 - 1))
        for s in range(ranks.shape[1]):
            kept[i, s] = np.uint32(ranks[i, s]) < most  # -1 is the largest uint32
    return kept


@compiled
def tally(experts, weights, kept, keys, n_keys):
    """Per key of a token, keys int32 [tokens] in 0..n_keys-1: (int64 [n_keys, 6], float64 [n_keys, 2]).

    Counts: tokens; assignments; dropped ones; tokens that lost all, some but not all, their first choice. Sums: gate
    weight; gate weight dropped. The first choice has the largest weight; ties go to the lower slot.
    """
    counts, sums = np.zeros((n_keys, 6), np.int64), np.zeros((n_keys, 2))
    for i in range(experts.shape[0]):
        had, lost, best, first_lost, mass, lost_mass = 0, 0, np.float32(0), False, 0.0, 0.0
        for s in range(experts.shape[1]):
            if experts[i, s] >= 0:
                w, drop = weights[i, s], not kept[i, s]
                if had == 0 or w > best:
                    best, first_lost = w, drop
                had += 1
                mass += w
                if drop:
                    lost += 1
                    lost_mass += w
        row = counts[keys[i]]
        row[0] += 1
        row[1] += had
        row[2] += lost
        row[3] += had > 0 and lost == had
        row[4] += lost > 0 and lost < had
        row[5] += had > 0 and first_lost
        sums[keys[i], 0] += mass
        sums[keys[i], 1] += lost_mass
    return counts, sums


@compiled
def tally_curve(experts, weights, ranks, order, starts, keys, n_keys, slots, places, row_of):
    """``tally`` at every capacity in one pass: (int64 [n_keys, factors, 6], float64 [n_keys, factors, 2]).

    slots, places, row_of as in queues.curve. What is lost at the first n of a batch's ascending capacities is counted under n.
    """
    n = slots.shape[1]
    counts, sums = np.zeros((n_keys, n, 6), np.int64), np.zeros((n_keys, n, 2))
    steps, lost = np.zeros((n_keys, n + 1, 4), np.int64), np.zeros((n_keys, n + 1))
    whole, mass = np.zeros((n_keys, 2), np.int64), np.zeros(n_keys)
    for b in range(len(starts) - 1):
        rows, mine, top = order[starts[b] : starts[b + 1]], slots[row_of[b]], 0
        for i in range(len(rows)):
            for s in range(ranks.shape[1]):
                top = max(top, ranks[rows[i], s] + 1)
        lost_at, f = np.empty(top, np.int32), 0  # by rank: how many capacities are too small for it
        for r in range(top):
            while f < n and mine[f] <= r:
                f += 1
            lost_at[r] = f
        for i in range(len(rows)):
            row, key = rows[i], keys[rows[i]]
            whole[key, 0] += 1
            least, most, first, best = n + 1, 0, 0, np.float32(0)
            for s in range(ranks.shape[1]):
                if ranks[row, s] >= 0:
                    f, w = lost_at[ranks[row, s]], weights[row, s]
                    if least > n or w > best:
                        best, first = w, f
                    least, most = min(least, f), max(most, f)
                    whole[key, 1] += 1
                    mass[key] += w
                    steps[key, f, 0] += 1
                    lost[key, f] += w
            if least <= n:
                steps[key, least, 1] += 1
                steps[key, most, 2] += 1
                steps[key, first, 3] += 1
        if b == len(starts) - 2 or (places[row_of[b]] != places[row_of[b + 1]]).any():
            where = places[row_of[b]]
            for key in range(n_keys):
                for f in range(n - 1, -1, -1):
                    if f < n - 1:
                        steps[key, f + 1] += steps[key, f + 2]
                        lost[key, f + 1] += lost[key, f + 2]
                    row = counts[key, where[f]]
                    row[2] += steps[key, f + 1, 0]
                    row[3] += steps[key, f + 1, 1]
                    row[4] += steps[key, f + 1, 2] - steps[key, f + 1, 1]
                    row[5] += steps[key, f + 1, 3]
                    sums[key, where[f], 1] += lost[key, f + 1]
            steps[:] = 0
            lost[:] = 0
    for key in range(n_keys):
        counts[key, :, 0], counts[key, :, 1], sums[key, :, 0] = whole[key, 0], whole[key, 1], mass[key]
    return counts, sums


@compiled
def tally_experts(experts, weights, kept, n_experts):
    """Per expert that was chosen: (int64 [E, 2] assignments and dropped ones, float64 [E, 2] gate weight and what was lost)."""
    counts, sums = np.zeros((n_experts, 2), np.int64), np.zeros((n_experts, 2))
    for i in range(experts.shape[0]):
        for s in range(experts.shape[1]):
            e = experts[i, s]
            if e >= 0:
                counts[e, 0] += 1
                sums[e, 0] += weights[i, s]
                if not kept[i, s]:
                    counts[e, 1] += 1
                    sums[e, 1] += weights[i, s]
    return counts, sums
