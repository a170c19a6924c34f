import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from analysis.cards import GroupUse
from analysis.specialization import Preferences, effects
from app import captions, charts, palette
from app.charts.drawing import times_ticks


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_load_map_is_log2_and_marks_the_dead(theme: str) -> None:
    figure = charts.load_map([np.array([1.0, 2.0, 0.0, 16.0]), np.array([0.25, 1.75, 1.0])], ["layer 0", "layer 1"], theme, (1, 2))
    heat, dead = figure.data
    assert np.asarray(heat.z)[0].tolist() == [0, 1, -3, 3] and np.isnan(np.asarray(heat.z)[1, 3])
    assert (heat.zmin, heat.zmax) == (-3, 3) and (dead.x, dead.y) == ((2,), ("layer 0",))
    assert (figure.layout.shapes[0].x0, figure.layout.shapes[0].y0) == (1.5, 0.5)


def test_token_map_keeps_repeated_tokens_apart() -> None:
    figure = charts.token_map(np.array([[0, 9, 0]]), ["a", "a", "&lt;s&gt;"], ["layer 0"], "expert", "light", [[0, 9]])
    assert list(figure.data[0].x) == ["0 a", "1 a", "2 &lt;s&gt;"]
    assert np.asarray(figure.data[0].z).tolist() == [[0, 1, 0]] and np.asarray(figure.data[0].customdata).tolist() == [[0, 9, 0]]


def test_a_hue_is_the_experts_in_its_run_whatever_tokens_are_shown() -> None:
    load = np.array([5, 90, 0, 7, 7, 1, 2, 3, 4, 6, 8])
    assert palette.hued(load) == [1, 10, 3, 4, 9, 0, 8, 7]  # ties by number; the ninth has none
    assert palette.hued(np.array([0, 3, 0])) == [1] and palette.hued(np.zeros(4, int)) == []
    hues = charts.busiest_hues(np.array([6, 6, 6, 4, -1, 1, 2]), palette.hued(load))
    assert hues[[0, 1, 2, 3, 5, 6]].tolist() == [8, 8, 8, 3, 0, 8] and np.isnan(hues[4])  # the busiest here is grey in the run
    [heat] = charts.token_map(np.array([[6, -1, 1], [6, 6, 1]]), list("abc"), ["l0", "l1"], "expert", "light", [[1, 6], [6]]).data
    assert heat.text.tolist() == [["6", "", "1"], ["6", "6", "1"]]
    assert np.asarray(heat.z)[:, [0, 2]].tolist() == [[1, 0], [0, 8]] and np.isnan(np.asarray(heat.z)[0, 1])
    assert heat.zmax == 9 and heat.colorscale[-1] == (1.0, palette.OTHER) and np.asarray(heat.customdata)[0, 0] == 6
    assert np.isnan(charts.busiest_hues(np.array([-1, -1]), [])).all()


def test_cells_of_a_short_map_hold_their_experts_number() -> None:
    drawn = [charts.token_map(np.zeros((1, n), int), ["t"] * n, ["layer 0"], "expert", "light", [[0]]).data[0] for n in (80, 81)]
    assert drawn[0].texttemplate == "%{text}" and drawn[1].texttemplate is None
    assert charts.token_map(np.zeros((1, 3)), ["t"] * 3, ["layer 0"], "margin", "light").data[0].texttemplate is None


def test_map_by_load_names_the_experts_it_moved() -> None:
    heat, dead = charts.load_map([np.array([0.0, 1.0, 2.0])], ["layer 0"], "light", (0, 2), by_load=True).data
    assert np.asarray(heat.z)[0].tolist() == [1, 0, -3] and [c[1] for c in heat.customdata[0]] == [2, 1, 0]
    assert (dead.x, dead.customdata) == ((2,), (0.0,))
    marked = charts.load_map([np.array([0.0, 1.0, 2.0])], ["layer 0"], "light", (0, 2), by_load=True).layout.shapes[0]
    assert marked.x0 == -0.5


def test_sorted_load_is_busiest_first() -> None:
    bars = charts.sorted_load(np.array([0.5, 2.0, 0.5]), "light").data[0]
    assert list(bars.x) == ["1", "0", "2"]


def test_hues_are_distinct_and_even_load_is_the_middle() -> None:
    assert len(set(palette.EXPERTS)) == 8
    assert palette.scale(palette.LOAD["light"])[3] == (0.5, "#f5f5f5")


def test_slot_grid_places_every_token_and_every_idle_slot() -> None:
    words, experts, ranks = ("a", "b", "c", "d"), np.array([0, 0, 0, 2]), np.array([0, 1, 2, 0])
    processed, dropped, idle = charts.slot_grid(words, experts, ranks, 2, 3).data
    assert (list(processed.text), list(processed.x)) == (["a", "b", "d"], [1, 2, 1])
    assert (list(dropped.text), list(dropped.x), list(dropped.y)) == (["c"], [3], ["expert 0"])
    assert sorted(zip(idle.y, idle.x, strict=True)) == [("expert 1", 1), ("expert 1", 2), ("expert 2", 2)]


def test_overflow_curves_show_the_range_over_layers() -> None:
    factors, dropped = np.array([1.0, 2.0]), np.array([[0.4, 0.1], [0.2, 0.0], [0.3, 0.05]])
    pooled = np.array([[0.35, 0.04], [0.6, 0.9], [0.1, 0.0]])  # dropped, idle, by chance: sums over unlike layers, not medians
    figure = charts.overflow_curves(factors, dropped, 1 - dropped, pooled, 1.0)
    shown = {t.name: np.asarray(t.y).tolist() for t in figure.data if t.name}
    assert (
        shown["dropped"] == [0.35, 0.04]
        and shown["idle slots"] == [0.6, 0.9]
        and shown["dropped by chance (uniform routing)"] == [0.1, 0.0]
    )
    assert [np.asarray(t.y).tolist() for t in figure.data[:2]] == [[0.4, 0.1], [0.2, 0.0]]
    assert "most of any shuffle" in charts.overflow_curves(factors, dropped, dropped, pooled, 1.0, "shuffle").data[0].name
    assert len(charts.overflow_curves(factors, dropped[:1], dropped[:1], pooled, 1.0).data) == 3


def test_slot_bars_put_the_busiest_expert_first() -> None:
    processed, idle, dropped, line = charts.slot_bars(np.array([1, 4]), np.array([0, 3]), np.array([3, 0]), np.array([4, 4])).data
    assert list(processed.x) == ["1", "0"] and list(processed.y) == [4, 1] and list(dropped.y) == [3, 0] and list(idle.y) == [0, 3]
    assert list(line.y) == [4, 4]


def test_maxvio_lines_show_run_batches_with_their_range_and_chance() -> None:
    run, batch, least, most, chance = (np.array(x) for x in ([0.1, 0.2], [0.5, 0.9], [0.3, 0.9], [1.5, 1.0], [0.2, 0.2]))
    shown = {t.name: t for t in charts.maxvio_lines(["layer 0", "layer 1"], run, batch, least, most, chance).data}
    assert list(shown["over the whole run"].y) == [0.1, 0.2] and list(shown["by chance in a batch"].y) == [0.2, 0.2]
    spread = shown["mean of the batches"].error_y
    assert list(spread.array) == pytest.approx([1.0, 0.1]) and list(spread.arrayminus) == pytest.approx([0.2, 0.0])
    assert not shown["over the whole run"].error_y.array and not shown["by chance in a batch"].error_y.array


def test_piece_bars_keep_the_order_and_mark_chance_and_the_whole() -> None:
    figure = charts.piece_bars(
        ["0", "10-20", "3-6"],
        np.array([2.0, 1.5, 3.0]),
        np.array([5, 7, 9]),
        np.array([1.9, 1.2, 1.1]),
        1.25,
        [False, False, True],
        "position",
    )
    bars, chance, whole = figure.data
    assert list(bars.x) == ["0", "10-20", "3-6"] == list(figure.layout.xaxis.categoryarray) and list(bars.customdata) == [5, 7, 9]
    assert bars.marker.opacity[0] == bars.marker.opacity[1] == 1 > bars.marker.opacity[2]
    assert list(chance.y) == [1.9, 1.2, 1.1] and list(whole.y) == [1.25] * 3


def test_batch_line_shows_every_batch_beside_chance_and_the_run() -> None:
    figure = charts.batch_line(np.arange(1, 4), np.array([0.5, 0.9, 0.7]), np.array([10, 11, 12]), np.array([0.3, 0.2, 0.1]), 0.25)
    batches, chance = figure.data
    assert list(batches.x) == [1, 2, 3] and list(batches.y) == [0.5, 0.9, 0.7] and list(chance.y) == [0.3, 0.2, 0.1]
    assert figure.layout.shapes[0].y0 == figure.layout.shapes[0].y1 == 0.25
    assert charts.rows(figure).filter(pc.equal(charts.rows(figure)["series"], "a batch"))["tokens"].to_pylist() == [10, 11, 12]


def test_documents_of_one_length_are_counted_beside_chance() -> None:
    figure = charts.document_histogram(np.array([1.0] * 5 + [3.0] * 4), 512, 1.4)
    [bars] = figure.data
    assert sum(bars.y) == 9 and bars.y[0] == 5 and bars.y[-1] == 4 and figure.layout.shapes[0].x0 == 1.4
    assert figure.layout.xaxis.range[0] == 0 and figure.layout.xaxis.range[1] > 3


def test_every_one_of_many_documents_is_counted_in_a_cell_beside_chance() -> None:
    rng = np.random.default_rng(0)
    n, ratio = rng.integers(1, 3_000, 5_000), rng.gamma(2.0, 1.0, 5_000) + 1
    figure = charts.document_map(ratio, n, 1 + 1 / n, "light")
    count = charts.rows(figure).filter(pc.equal(charts.rows(figure)["series"], "documents"))
    told = count.filter(pc.is_valid(count["documents"])).to_pylist()
    assert sum(x["documents"] for x in told) == len(n) and min(x["documents"] for x in told) == 1
    for cell in told[:: len(told) // 20]:
        inside = (n >= cell["first"]) & (n <= cell["last"]) & (ratio >= cell["max_over_mean_from"]) & (ratio < cell["max_over_mean_to"])
        assert inside.sum() == cell["documents"]
    line = figure.data[1]
    assert list(line.x) == sorted(set(n.tolist())) and np.allclose(line.y, 1 + 1 / np.array(line.x))


def test_rows_are_what_is_drawn() -> None:
    run, batch, least, most, chance = (np.array(x) for x in ([0.1, 0.2], [0.5, 0.9], [0.25, 0.9], [1.5, 1.0], [0.2, 0.2]))
    rows = charts.rows(charts.maxvio_lines(["layer 0", "a &lt;b&gt;"], run, batch, least, most, chance)).to_pylist()
    assert rows[0] == {"series": "mean of the batches", "layer": "layer 0", "maxvio": 0.5, "low": 0.25, "high": 1.5}
    assert rows[-1] == {"series": "by chance in a batch", "layer": "a <b>", "maxvio": 0.2, "low": None, "high": None} and len(rows) == 6
    tokens = charts.rows(charts.token_map(np.array([[0, 9, -1]]), ["a", "b", "c"], ["layer 0"], "expert", "light", [[0, 9]])).to_pydict()
    assert tokens == {"layer": ["layer 0"] * 3, "token": ["0 a", "1 b", "2 c"], "hue": [0, 1, None], "expert": [0, 9, -1]}
    numbered = charts.rows(charts.load_map([np.array([1 / 3, 2.0])], ["l0"], "light"))
    assert numbered.to_pydict() == {
        "layer": ["l0"] * 2,
        "relative_load": [1 / 3, 2.0],
        "expert": [0, 1],
    }  # to the last digit, and an integer
    assert str(numbered["expert"].type) == "int64" == str(charts.rows(charts.sorted_load(np.array([1.0, 3.0]), "light"))["expert"].type)
    ranked = charts.rows(charts.load_map([np.array([0.5, 2.5]), np.array([1.0])], ["l0", "l1"], "light", by_load=True)).to_pydict()
    assert ranked["expert"] == [1, 0, 0, None] and ranked["relative_load"] == [2.5, 0.5, 1, None] and ranked["place"] == [0, 1, 0, 1]
    grid = charts.rows(charts.slot_grid(("a", "b"), np.array([0, 1]), np.array([0, 0]), 1, 2)).to_pylist()
    assert grid == [{"series": "processed", "slot": 1, "expert": f"expert {i}", "token": t} for i, t in enumerate("ab")]


def test_a_printed_figure_is_light_and_without_what_only_the_mouse_sees() -> None:
    figure = charts.load_map([np.array([1.0, 2.0])], ["layer 0"], "dark")
    figure.add_scatter(x=[0], y=["layer 0"], name=charts.UNSEEN)
    heat, *others = json.loads(charts.printed(figure))["data"]
    assert heat["colorscale"] == [list(stop) for stop in palette.scale(palette.LOAD["light"])] and others == []
    assert figure.data[0].colorscale[0][1] == palette.LOAD["dark"][0]  # the one on screen stays as it is


def preferences(groups: int = 2, experts: int = 32) -> Preferences:
    counts = np.random.default_rng(3).integers(5, 400, (groups, experts))
    return effects(0, "label", tuple("abcdefgh"[:groups]) if groups <= 8 else tuple(f"g{i}" for i in range(groups)), counts.sum(1), counts)


def enrichment(found: Preferences, theme: str = "light") -> Any:
    g, e = found.count.shape
    return charts.enrichment_map(found, list(found.groups), np.arange(g), np.arange(e)[::-1], theme)


def test_every_expert_of_a_map_keeps_its_number_up_to_32() -> None:
    maps = {n: (enrichment(preferences(2, n)), charts.lift_map(np.ones((n, n)), "expert", "expert", "light"), charts.sorted_load(np.ones(n), "light"),
                charts.load_map([np.ones(n)], ["layer 0"], "light"), charts.slot_bars(*np.ones((4, n), int))) for n in (16, 32, 33)}  # fmt: skip
    assert [f.layout.xaxis.dtick for n in (16, 32) for f in maps[n]] == [1] * 10
    assert all(f.layout.xaxis.dtick != 1 for f in maps[33]) and maps[32][1].layout.yaxis.dtick == 1


def test_a_colour_bar_says_of_what_and_that_its_ends_are_open() -> None:
    maps = {"times as often as elsewhere": enrichment(preferences()), "× even share": charts.load_map([np.ones(4)], ["layer 0"], "light"),
            "times as often as by load alone": charts.lift_map(np.full((3, 3), 62.0), "expert", "expert", "dark")}  # fmt: skip
    for title, figure in maps.items():
        bar = figure.data[0].colorbar
        assert [a.text for a in figure.layout.annotations] == [title]
        assert (bar.ticktext[0], bar.ticktext[3], bar.ticktext[-1]) == ("≤⅛×", "1×", "≥8×") and bar.tickvals == tuple(range(-3, 4))
    assert np.asarray(figure.data[0].z).max() == 3 and charts.rows(figure)["lift"].to_pylist() == [62.0] * 9


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_cross_stands_out_from_every_colour_of_a_cell(theme: str) -> None:
    stops, colours = palette.ink(palette.LOAD[theme]), palette.LOAD[theme]
    for (left, mark), (right, same) in zip(stops[::2], stops[1::2], strict=True):
        assert mark == same and left < right
        assert min(palette.contrast(palette.rgb(mark), palette.between(colours, at)) for at in (left, right)) >= 3
    assert palette.contrast(palette.rgb("#000000"), palette.rgb("#ffffff")) == pytest.approx(21) and {c for _, c in stops} == set(
        palette.INKS
    )
    crosses = enrichment(preferences(), theme).data[1].marker.line
    assert (crosses.cmin, crosses.cmax) == (-3, 3) and crosses.colorscale == tuple(stops)
    printed = json.loads(charts.printed(enrichment(preferences(), theme)))["data"][1]["marker"]["line"]["colorscale"]
    assert printed == [list(stop) for stop in palette.ink(palette.LOAD["light"])]


def test_numbers_of_an_enrichment_map_are_enough_to_test_again() -> None:
    found = preferences(2, 4)
    table = charts.rows(enrichment(found))
    assert table.column_names == ["group", "expert", "share", "elsewhere", "lift", "log2_enrichment_low", "log2_enrichment_high", "q",
                                  "group_tokens", "documents", "count", "log2_enrichment", "p", "significant", "log2_enrichment_within"]  # fmt: skip
    assert table["expert"].to_pylist() == [3, 2, 1, 0] * 2 and table["count"].to_pylist() == found.count[:, ::-1].ravel().tolist()
    assert table["share"].to_pylist() == found.share[:, ::-1].ravel().tolist()
    integers = [f.name for f in table.schema if f.type == pa.int64()]
    told = [enrichment(replace(found, within=w)).data[2].hovertemplate for w in (found.within, np.ones((2, 4)))]
    assert ["customdata[13]:.1f} within documents" in x for x in told] == [False, True]
    assert integers == ["expert", "group_tokens", "documents", "count"] and table.schema.field("significant").type == pa.bool_()


def test_bars_of_enrichment_are_read_in_times() -> None:
    use = {
        "group": "a",
        "count": 3,
        "n": 9,
        "documents": 2,
        "share": 1 / 3,
        "elsewhere": 0.1,
        "lift": 2.0,
        "q": 0.01,
        "significant": True,
        "tested": True,
    }
    figure = charts.enrichment_bars(["a", "b"], [GroupUse(**use, enrichment=5.9, low=-0.4, high=np.nan), GroupUse(**use, enrichment=-4.2, low=-4.5, high=-4)])  # fmt: skip
    axis = figure.layout.xaxis
    told = dict(zip(axis.tickvals, axis.ticktext, strict=True))
    assert (told[-4], told[-2], told[0], told[6]) == ("1/16×", "¼×", "1×", "64×") and axis.title.text == "times as often as elsewhere"
    assert list(figure.data[0].x) == [5.9, -4.2]
    told = charts.rows(figure)
    assert told["high"].to_pylist() == [None, -4] and told["low"].to_pylist() == [-0.4, -4.5]  # unknown, not zero


def test_small_effects_have_ticks_of_round_ratios() -> None:
    for low, high in ((-0.03, 0.02), (0.1, 0.4), (-0.9, 0.05), (-1e-4, 2e-4), (-0.5, -0.4), (0.0, 0.99)):
        ticks = times_ticks(low, high)
        ratios = np.array([float(t[:-1]) for t in ticks["ticktext"]])
        inside = (np.log2(ratios) >= min(low, 0)) & (np.log2(ratios) <= max(high, 0))
        assert 1.0 in ratios and len(set(ticks["ticktext"])) == len(ratios) and 3 <= inside.sum() <= 9
        assert np.allclose(np.log2(ratios), ticks["tickvals"])
    assert times_ticks(0.0, 0.0) == {"tickvals": [0], "ticktext": ["1×"]} and times_ticks(0.2, 1.0)["ticktext"] == ["1×", "2×"]


def test_the_share_of_all_stands_in_the_legend_and_on_no_bar() -> None:
    figure = charts.share_bars(["a"], np.array([0.9]), np.array([7]), 0.4, "label")
    assert not figure.layout.annotations and figure.layout.shapes[0].y0 == 0.4
    assert (figure.layout.shapes[0].name, figure.layout.shapes[0].showlegend, figure.layout.showlegend) == ("whole layer", True, True)


def test_crosses_of_a_map_of_pairs_stand_on_their_cells_and_leave_its_edges() -> None:
    weak = np.zeros((3, 4), bool)
    weak[2, 1] = True
    figure = charts.lift_map(np.ones((3, 4)), "expert", "expert", "light", weak)
    assert [list(x) for x in (figure.data[1].x, figure.data[1].y)] == [[1], [2]]
    assert (figure.layout.xaxis.range, figure.layout.yaxis.range) == ((-0.5, 3.5), (2.5, -0.5))
    assert len(charts.lift_map(np.ones((3, 4)), "expert", "expert", "light").data) == 1


def test_what_chance_could_give_is_empty_where_crosses_would_be_too_many() -> None:
    """An SVG of 90,000 crosses holds up a browser for a minute; a map of 300 labels is no taller than a canvas may be."""
    weak = np.ones((40, 40), bool)
    weak[3, 5] = False
    figure = charts.lift_map(np.full((40, 40), 2.0), "expert", "expert", "light", weak)
    assert len(figure.data) == 1 and np.argwhere(np.isfinite(figure.data[0].z)).tolist() == [[3, 5]]
    assert np.isfinite(figure.data[0].customdata).all()
    assert captions.weak_cells(weak) == captions.EMPTY and captions.weak_cells(weak[:2]) == captions.CROSS
    figure = enrichment(preferences(300, 8))
    drawn = np.isfinite(figure.data[0].z).sum()
    assert figure.layout.height < 4_096 and len(figure.data) == 2 and drawn < 2_400
    assert (len(figure.data[1].x), figure.data[1].marker.maxdisplayed) == (2_400, 1)


def test_small_maps_draw_significant_cells_alone_and_give_every_row() -> None:
    found = [replace(preferences(2, 32), site=i, significant=np.eye(2, 32, i, dtype=bool)) for i in range(3)]
    orders = [np.arange(32), np.arange(32)[::-1], np.arange(32)]
    figure = charts.enrichment_grid(["layer 0", "layer 1", "layer 2"], found, ["x", "y"], np.array([1, 0]), orders, "dark")
    assert [t.name for t in figure.data] == ["layer 0", "layer 1", "layer 2"] and [t.showscale for t in figure.data] == [True, False, False]
    for drawn, one, order in zip(figure.data, found, orders, strict=True):
        assert np.array_equal(np.isfinite(drawn.z), one.significant[np.ix_([1, 0], order)])
        assert np.allclose(drawn.z[np.isfinite(drawn.z)], one.enrichment[np.ix_([1, 0], order)][np.isfinite(drawn.z)], atol=1e-6)
    rows = charts.rows(figure)
    assert rows.num_rows == 3 * 2 * 32 and pc.sum(rows["significant"]).as_py() == 6
    last = rows.filter(pc.and_(pc.equal(rows["series"], "layer 1"), pc.equal(rows["significant"], True)))
    assert sorted(zip(last["group"].to_pylist(), last["expert"].to_pylist(), strict=True)) == [("x", 2), ("y", 1)]
    untested = [replace(f, missing="too few documents") for f in found]
    assert np.isfinite(charts.enrichment_grid(["a", "b", "c"], untested, ["x", "y"], np.array([0, 1]), orders, "dark").data[0].z).all()
