from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.params import read_size
from analysis.store import open_run
from analysis.whatif import EXAMPLES, Mixture, WhatIfError, card_bytes, card_expert, gated_expert, weigh

ROOT = Path(__file__).parent.parent


def test_the_rumour_and_the_example_are_labelled_and_add_up() -> None:
    rumour = weigh(EXAMPLES["gpt-4-rumour"].mixture)
    assert (rumour.total, rumour.experts_total) == (1_760_000_000_000, 1_760_000_000_000)
    assert "RUMOUR" in EXAMPLES["gpt-4-rumour"].status and "1.8T" in EXAMPLES["gpt-4-rumour"].note
    example = weigh(EXAMPLES["64x16b"].mixture)
    assert (example.experts_total, example.experts_active) == (1024 * 10**9, 128 * 10**9)
    assert "EXAMPLE" in EXAMPLES["64x16b"].status
    assert all(e.name == name and e.status for name, e in EXAMPLES.items())


sizes = st.integers(1, 200)


@given(sizes, sizes, sizes, sizes, st.integers(0, 99), st.integers(0, 99))
def test_equals_counting_one_by_one(experts: int, top_k: int, expert: int, layers: int, shared: int, other: int) -> None:
    top_k = min(top_k, experts)
    w = weigh(Mixture(experts, top_k, expert, layers, shared, other))
    held = other + sum(shared + sum(expert for _ in range(experts)) for _ in range(layers))
    used = other + sum(shared + sum(expert for _ in range(top_k)) for _ in range(layers))
    assert (w.total, w.active) == (held, used)
    assert w.total - w.active == layers * (experts - top_k) * expert == w.experts_total - w.experts_active
    assert w.bytes["float32"] == 4 * held and w.bytes["bfloat16"] == 2 * held


def test_gated_expert_of_mixtral() -> None:
    assert gated_expert(4096, 14336) == 176_160_768


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((8, 9, 1), "only 8 experts"), ((0, 0, 1), "experts is 0"), ((8, 2, 0), "expert is 0"), ((8, 2, 1, 1, -1), "less than nothing")],
)
def test_numbers_that_describe_no_model(numbers: tuple[int, ...], message: str) -> None:
    with pytest.raises(WhatIfError, match=message):
        Mixture(*numbers)


def test_a_card_knows_its_bytes_and_its_expert() -> None:
    """As ``params`` counts them from the config."""
    shown = open_run(ROOT / "data" / "demo-run").model
    size = read_size(ROOT / "data" / "demo-model")
    assert card_bytes(shown) == size.bytes and card_expert(shown) == size.sites[0].expert == 86_016
    assert card_bytes(replace(shown, dtype="int3")) is None
    assert (
        card_expert(replace(shown, active_parameters=shown.parameters)) is None
        and card_expert(replace(shown, parameters=shown.parameters + 1)) is None
    )
