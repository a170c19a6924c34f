"""Every question of the benches, as each engine answers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.bench import rivals
from tests.bench import rivals_decisions as decisions
from tests.bench.rivals import Run

ENGINES = ("product", "floor", "DuckDB", "Polars")
Ask = Callable[[Run], Any]
QUERIES: Mapping[str, tuple[Ask, Ask, Ask, Ask]] = {  # in the order of ENGINES
    "load": (rivals.load_product, rivals.load_floor, rivals.load_duckdb, rivals.load_polars),
    "expert x label": (rivals.label_product, rivals.label_floor, rivals.label_duckdb, rivals.label_polars),
    "top tokens, one layer": (rivals.tokens_product, rivals.tokens_floor, rivals.tokens_duckdb, rivals.tokens_polars),
    "co-activation": (rivals.pairs_product, rivals.pairs_floor, rivals.pairs_duckdb, rivals.pairs_polars),
    "flow of first choices": (rivals.flow_product, rivals.flow_floor, rivals.flow_duckdb, rivals.flow_polars),
    "capacity drops, one layer": (decisions.drops_product, decisions.drops_floor, decisions.drops_duckdb, decisions.drops_polars),
    "capacity curve, one layer": (decisions.curve_product, decisions.curve_floor, decisions.curve_duckdb, decisions.curve_polars),
    "one document": (decisions.document_product, decisions.document_floor, decisions.document_duckdb, decisions.document_polars),
    "one layer": (decisions.layer_product, decisions.layer_floor, decisions.layer_duckdb, decisions.layer_polars),
}
FROM_STATISTICS = tuple(QUERIES)[:5]
