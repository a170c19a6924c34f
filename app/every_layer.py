"""What labels say of a layer's experts, kept for every page; and the Specialization page's maps of all layers side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import pyarrow as pa

from analysis.specialization import Preferences, by_label, seriation
from analysis.trace import Trace

from . import captions, charts, text
from .figures import show_figure
from .layers import each_layer, kept
from .selection import section, theme


def label_preferences(trace: Trace, run: str, site: int) -> Preferences:
    """Effects and tests of labels at one site, from counts by document; ``run`` names the trace with its date."""
    known = kept(run, ("preferences", "label"))
    if site not in known:
        known[site] = by_label(trace, site)
    return cast(Preferences, known[site])


def show_every_layer(trace: Trace, run: str, here: Preferences, test: Callable[[int], Preferences]) -> dict[str, tuple[str, pa.Table]]:
    """The map ``here`` of one layer for every layer with the same groups, once a person asks: ``test`` of a site may read its decisions.

    Returns the table of all layers for the page's downloads.
    """
    if len(trace.layers) < 2:
        return {}
    reads = "" if here.kind == "label" else ". Reads every decision of the run"
    part = section("every_layer", f"Every layer side by side{reads}")
    if not part.open:
        return {}
    with part:
        found = each_layer(trace, kept(run, ("preferences", here.kind)), lambda sites: ((i, test(i)) for i in sites))
        same = [p for p in found if p.groups == here.groups]
        groups = seriation(here.enrichment)[0] if here.kind != "position" else np.arange(len(here.groups))
        layers = [trace.layers[p.site] for p in same]
        show_figure(
            trace,
            charts.enrichment_grid([f"{x.title}: {captions.preferring(p)}" for x, p in zip(layers, same, strict=True)], same,
                                   text.axis_names([here.groups[g] for g in groups]), groups, [seriation(p.enrichment, groups)[1] for p in same], theme()),
            f"enrichment-by-{here.kind}-every-layer", key=f"grid-{here.kind}",
            alt=f"A small heatmap per layer of {len(groups)} groups by experts: log2 enrichment.", definition=captions.grid_definition(same),
            n=f"{int(here.tokens.sum()):,} tokens per layer",
            how=f"Clearly: at least {captions.CLEAR:g} times as often as overall, and significantly."
            f" {captions.preferences_how(here, trace.layers[here.site])} The cells of each layer are corrected on their own.",
        )  # fmt: skip
        if len(same) < len(found):
            text.show_note(
                f"{text.counted(len(found) - len(same), 'layer')} with other groups (of another stream of tokens, say) cannot share these rows: choose one above."
            )
    return {f"by {here.kind}, every layer": (f"one row per layer, {here.kind} and expert", pa.concat_tables([p.table() for p in found]))}
