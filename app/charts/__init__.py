"""Arrays to Plotly figures; the only place that knows Plotly. Text from data comes in already escaped by app/text.py.

A figure of a new kind goes into the file of its question, and is named here.
"""

from .capacity import overflow_curves, share_bars, slot_bars, slot_grid
from .drawing import BAR, MOST_MARKS, UNSEEN
from .files import file_name, plotly_script, portable, printed, rows
from .load import (
    DOTS,
    batch_line,
    document_histogram,
    document_map,
    document_scatter,
    layer_lines,
    load_map,
    maxvio_lines,
    piece_bars,
    queue_lines,
    sorted_load,
)
from .specialization import LEAST_USES, enrichment_bars, enrichment_grid, enrichment_map, information_bars, lift_map
from .tokens import busiest_hues, token_map

__all__ = [
    "BAR",
    "DOTS",
    "LEAST_USES",
    "MOST_MARKS",
    "UNSEEN",
    "batch_line",
    "busiest_hues",
    "document_histogram",
    "document_map",
    "document_scatter",
    "enrichment_bars",
    "enrichment_grid",
    "enrichment_map",
    "file_name",
    "information_bars",
    "layer_lines",
    "lift_map",
    "load_map",
    "maxvio_lines",
    "overflow_curves",
    "piece_bars",
    "plotly_script",
    "portable",
    "printed",
    "queue_lines",
    "rows",
    "share_bars",
    "slot_bars",
    "slot_grid",
    "sorted_load",
    "token_map",
]
