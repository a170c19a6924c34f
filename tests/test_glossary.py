"""The glossary: every metric and every term once, complete, and found by its words."""

import json
import math

import pytest

from analysis.export import computed_bytes
from analysis.glossary import GLOSSARY, TERMS, glossary_table, search
from analysis.metrics import METRICS
from tests.synthetic import site

BOUNDS = {
    "E": (8, 64), "E - 1": (7, 63), "sqrt(E - 1)": (math.sqrt(7), math.sqrt(63)), "1 - 1/E": (0.875, 0.984375), "1": (1, 1),
    "ln E": (math.log(8), math.log(64)), "log2 E + 0.721": (3.7213475, 6.7213475), "infinity": (math.inf, math.inf),
}  # fmt: skip
NAMED = ("expert_load", "capacity_factor", "overflow", "dropped_token", "gate_weight", "router_logits", "top_k", "co_activation",
         "shared_expert", "site", "vocabulary_specialization", "router_saturation", "predicted_next_token", "weight_similarity")  # fmt: skip


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_the_bound_in_words_is_the_bound(metric) -> None:
    assert [metric.high(site(0, n)) for n in (8, 64)] == pytest.approx(BOUNDS[metric.high.text])
    assert metric.range == f"{metric.low:.3g} to {metric.high.text}"


def test_every_metric_and_every_term_stands_once() -> None:
    assert list(GLOSSARY) == [*(t.name for t in TERMS), *METRICS] and len({e.title for e in GLOSSARY.values()}) == len(GLOSSARY)
    assert [n for n in NAMED if n not in GLOSSARY] == []


@pytest.mark.parametrize("entry", GLOSSARY.values(), ids=GLOSSARY)
def test_entries_are_complete(entry) -> None:
    assert entry.title and entry.source and not entry.definition.endswith(".")
    metric = METRICS.get(entry.name)
    assert (entry.range, entry.unit, entry.chance) == ((metric.range, metric.unit, metric.chance) if metric else ("", "", ""))
    assert entry.facts.endswith(f"Source: {entry.source}.") and entry.facts.startswith(
        f"{entry.name}: from {entry.range}" if metric else "Source"
    )
    assert f"By chance: {entry.chance}." in entry.facts or not metric


def test_search() -> None:
    assert search("") == search("  ") == list(GLOSSARY.values())
    assert [e.name for e in search("GINI")] == ["gini"] and search("no such word") == []
    assert search("CV")[0].name == "cv" and "chance_cv" in {e.name for e in search("cv")}
    assert {e.name for e in search("expert load")} >= {"expert_load", "max_over_mean"} and search("Expert load")[0].name == "expert_load"
    assert all("switch" in (e.definition + e.source + e.title).casefold() for e in search("switch")) and len(search("switch")) > 3


def test_the_table_holds_every_entry_and_goes_into_every_format() -> None:
    rows = glossary_table().to_pylist()
    assert [r["name"] for r in rows] == list(GLOSSARY) and all(r["definition"] == GLOSSARY[r["name"]].definition for r in rows)
    stored = json.loads(computed_bytes(None, glossary_table(), "one row per entry", {}, "json"))
    assert stored["rows"] == rows and computed_bytes(None, glossary_table(), "", {}, "csv").count(b"\n") == len(rows) + 1
