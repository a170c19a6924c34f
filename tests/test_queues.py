"""The kernels on their own: the sort and its keys, bad ids that write nothing, and a machine where nothing can be cached."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import outcomes, queues
from analysis.policies import site_curve
from analysis.slots import expert_capacity, make_batches

ROOT = Path(__file__).parent.parent
COMPILING = settings(deadline=None)  # the first call of a kernel compiles it


@COMPILING
@given(st.lists(st.integers(0, 2**32 - 1) | st.sampled_from([0, 1 << 16, 3 << 16, 2**32 - 1]), min_size=1, max_size=300))
def test_sort_is_stable_and_ascending(keys: list[int]) -> None:
    key = np.array(keys, np.uint64)
    packed = (key << np.uint64(32)) | np.arange(len(keys), dtype=np.uint64)
    ordered = queues.sort_keyed(packed.copy(), np.empty_like(packed), len(keys))
    assert np.array_equal(ordered & np.uint64(0xFFFFFFFF), np.argsort(key, kind="stable"))


@COMPILING
@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(7, 9) | st.integers(0, 99).map(lambda x: x << 20), max_size=300),
       st.lists(st.integers(0, 310), max_size=12))  # fmt: skip
def test_the_first_c_are_the_c_least_for_every_cut(keys: list[int], cuts: list[int]) -> None:
    packed = (np.array(keys, np.uint64) << np.uint64(32)) | np.arange(len(keys), dtype=np.uint64)
    scratch, begin = np.zeros(len(keys), np.uint64), 5
    held = np.concatenate([np.full(begin, 3, np.uint64), packed])
    queues.sort_at_cuts(held, begin, len(held), scratch, np.empty(8, np.uint32), np.sort(np.array(cuts, np.int64)))
    for c in cuts:
        assert np.array_equal(np.sort(scratch[:c]), np.sort(packed)[:c])
    assert np.array_equal(np.sort(scratch), np.sort(packed)) and (held[:begin] == 3).all()


@COMPILING
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=50))
def test_keys_ascend_as_floats_descend(values: list[float]) -> None:
    floats = np.array(values, np.float32)
    keys = [int(queues.key_of(b)) for b in floats.view(np.uint32)]
    for a, x in zip(floats, keys, strict=True):
        for b, y in zip(floats, keys, strict=True):
            assert (a > b) == (x < y) and (a == b) == (x == y)  # -0 equals 0


@pytest.mark.parametrize("policy", [queues.POSITION, queues.CHOICE, queues.SORTED, queues.BATCH_PRIORITY])
@pytest.mark.parametrize("bad", [3, -2, 32_000, -32_768])
@pytest.mark.parametrize("slot", [0, 1, 2])  # either of a pair, and the odd one out
def test_a_bad_id_is_reported_by_every_kernel(policy: int, bad: int, slot: int) -> None:
    experts = np.array([[0, 1, 2], [2, 0, 1], [1, 0, 2]], np.int16)
    experts[1, slot] = bad
    weights, order, starts = np.ones((3, 3), np.float32), np.arange(3), np.array([0, 3])
    bits, slots = weights.view(np.uint32), np.array([[1, 2]])
    assert queues.rank_all(experts, bits, order, starts, 3, policy)[2]
    assert queues.curve(experts, weights, bits, order, starts, 3, policy, slots, np.array([[0, 1]]), np.zeros(1, np.int32))[3]


def test_next_best_walks_down_the_preferences() -> None:
    preference, chosen, held = np.array([0.1, 0.4, 0.4, 0.05, 0.3], np.float32), np.array([2, -1]), np.array([-1, -1])
    walk, last = [], -1
    while (last := outcomes.next_best(preference, chosen, held, last)) >= 0:
        walk.append(int(last))
    assert walk == [1, 4, 0, 3]  # expert 2 was chosen; equal preferences go to the lower id


def test_without_a_writable_cache_the_kernels_still_run() -> None:
    """As in a read-only container without a home: numba finds no place for its cache and says so by an error."""
    code = (
        "import numpy as np; from analysis import queues; assert queues.key_of(np.uint32(0)) == 2**31 - 1;"
        "assert type(queues.key_of._cache).__name__ == 'NullCache', queues.key_of._cache"
    )
    nowhere = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "IPythonCacheLocator"}  # finds notebooks only
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=nowhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_numba_is_imported_only_when_something_is_ranked() -> None:
    code = (
        "import sys, analysis.capacity; from analysis import expert_capacity, apply_capacity, open_run;"
        "expert_capacity(6, 3); assert 'numba' not in sys.modules;"
        "apply_capacity(open_run('data/demo-run'), layers=[0]); assert 'numba' in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("policy", ["position", "choice", "probability", "batch_priority", "random"])
def test_a_token_that_names_one_expert_in_every_slot_is_counted_within_bounds(policy: str) -> None:
    experts, weights = np.zeros((40, 8), np.int16), np.ones((40, 8), np.float32)
    found = site_curve(experts, weights, 8, make_batches([40], "run"), policy, [0.5, 3.0])
    slots = [expert_capacity(40, 8, 8, f) for f in (0.5, 3.0)]
    assert found.dropped.tolist() == [max(0, 320 - n) for n in slots] and found.gate_mass == 320
