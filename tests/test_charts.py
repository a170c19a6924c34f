import numpy as np
import pytest

from app import charts, palette


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_load_map_is_log2_and_marks_the_dead(theme: str) -> None:
    figure = charts.load_map([np.array([1.0, 2.0, 0.0, 16.0]), np.array([0.25, 1.75, 1.0])], ["layer 0", "layer 1"], theme, (1, 2))
    heat, dead = figure.data
    assert np.asarray(heat.z)[0].tolist() == [0, 1, -3, 3] and np.isnan(np.asarray(heat.z)[1, 3])
    assert (heat.zmin, heat.zmax) == (-3, 3) and (dead.x, dead.y) == ((2,), ("layer 0",))
    assert (figure.layout.shapes[0].x0, figure.layout.shapes[0].y0) == (1.5, 0.5)


def test_token_map_keeps_repeated_tokens_apart() -> None:
    figure = charts.token_map(np.array([[0, 9, 0]]), ["a", "a", "&lt;s&gt;"], ["layer 0"], "expert", "light", True)
    assert list(figure.data[0].x) == ["0 a", "1 a", "2 &lt;s&gt;"]
    assert np.asarray(figure.data[0].z).tolist() == [[0, 1, 0]] and np.asarray(figure.data[0].customdata).tolist() == [[0, 9, 0]]


def test_no_expert_takes_no_hue() -> None:
    heat = charts.token_map(np.array([[-1, 7, 15]]), ["a", "b", "c"], ["layer 0"], "expert", "light", True).data[0]
    assert np.isnan(np.asarray(heat.z)[0, 0]) and np.asarray(heat.z)[0, 1:].tolist() == [7, 7]


def test_sorted_load_is_busiest_first() -> None:
    bars = charts.sorted_load(np.array([0.5, 2.0, 0.5]), "light").data[0]
    assert list(bars.x) == ["1", "0", "2"]


def test_hues_are_distinct_and_even_load_is_the_middle() -> None:
    assert len(set(palette.EXPERTS)) == 8
    assert palette.scale(palette.LOAD["light"])[3] == (0.5, "#f5f5f5")
