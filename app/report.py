"""One self-contained HTML file of a run's main views: opens from disk without a network, in light and in dark.

Its policy lets two scripts run, named by their hashes: the page's own and plotly.js, which travels gzipped in base64
(4.8 MB become 2.0) and is unpacked by the browser's DecompressionStream. Styles may be inline, as Plotly sets them on its
drawings. All text from data passes text.markup, text.axis_label or text.axis_names; in the JSON, < is written as \\u003c.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import analysis
from analysis.balance import relative_load
from analysis.capacity import pool_curves, shuffled_curves
from analysis.capacity_answer import (
    drops_in_words,
    mean_curves,
    needs_in_words,
    price_in_words,
    range_in_words,
    shuffle_shares,
    shuffles_for,
    tokens_in_words,
)
from analysis.export import describe_computed
from analysis.files import write_atomically
from analysis.findings import Finding, first_finding, times
from analysis.jackknife import label_information_and_interval
from analysis.metrics import METRICS, balance_table
from analysis.overflow import FACTORS
from analysis.policies import MissingScores
from analysis.slots import PRESETS
from analysis.specialization import by_label, seriation
from analysis.trace import Trace

from . import captions, charts, palette
from .model_card import facts, origin, router_rows
from .strip_data import HUES, first_text, strip_data
from .text import axis_names, markup, visible_name

_HERE = Path(__file__).parent
_PARTS = _HERE / "report_page"
BALANCE = ("max_over_mean", "chance_max_over_mean", "maxvio", "cv", "chance_cv", "gini", "effective_experts", "dead", "cold")
COUNTS = ("dead", "cold")
PRESET, SCOPE, SIZE, FACTOR = "megatron", "documents", 16, 1.25  # where the Capacity page starts
HEIGHT = 'style="min-height: {}px"'


@dataclass(frozen=True)
class _Draft:
    """A report in the making: markup of its sections, figures by name, the strip if there is one."""

    trace: Trace
    sections: list[str] = field(default_factory=list)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    strip: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def origin(self) -> str:
        """What every caption ends in."""
        return origin(self.trace)

    @cached_property
    def layers(self) -> list[str]:
        """Titles of the layers, safe for Plotly."""
        return [markup(x.title) for x in self.trace.layers]

    def told(self, what: str) -> str:
        """Data text and definition as a caption, with where it comes from."""
        return markup(f"{what} {self.origin}")

    def add(self, title: str, note: str, body: str) -> None:
        """A section; title and note are plain text, the body is markup."""
        self.sections.append(f'<section>\n<h2>{markup(title)}</h2>\n<p class="note">{markup(note)}</p>\n{body}\n</section>')

    def figure(self, name: str, figure: Any, caption: str, alt: str) -> str:
        """Keep a figure; returns the markup of its place and caption."""
        about = {"figure": name, **describe_computed(self.trace, caption, {})}
        file = {"name": charts.file_name(self.trace.name, name), "width": None, "height": None, "font": 12, "dpi": 192, "captioned": True,
                "caption": visible_name(f"{caption} {self.origin}"), "software": f"Routerscope {analysis.__version__}", "about": json.dumps(about)}  # fmt: skip
        self.figures[name] = charts.portable(figure) | {"file": file}
        place = f'<div class="plot" id="figure-{name}" role="img" aria-label="{markup(alt)}" {HEIGHT.format(figure.layout.height)}></div>'
        return f"<figure>\n{place}\n<figcaption>{self.told(caption)}</figcaption>\n</figure>"


def report_html(trace: Trace) -> str:
    """The report as text."""
    draft, finding = _Draft(trace), first_finding(trace)
    _opening(draft, finding)
    _load(draft, finding)
    _balance(draft)
    if trace.load_tokens is not None:
        _capacity(draft)
    if trace.stats.label_load(0)[0]:
        _labels(draft, finding.site if finding is not None else trace.layers[-1].index)
        _information(draft)
    _model(draft)
    return _page(draft)


def report_bytes(trace: Trace) -> bytes:
    """The report as the bytes of a file, for a download."""
    return report_html(trace).encode()


def write_report(trace: Trace, path: Path) -> int:
    """Write the report to a file, whole or not at all; returns its bytes."""
    content = report_bytes(trace)

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(path, write)
    return len(content)


def _opening(draft: _Draft, finding: Finding | None) -> None:
    trace = draft.trace
    streams = dict.fromkeys(x.stream for x in trace.layers)
    counted = ", ".join(f"{trace.n_tokens(s):,} {s} tokens" for s in streams)
    draft.sections.append(
        f"<header>\n<h1>What does the router of {markup(trace.model.name)} do?</h1>\n<p>In every routed layer, a router picks a few small"
        " networks, the experts, for each token; only those compute. This file shows what was chosen, as executed: "
        f"{counted} through {len(trace.layers):,} routed layers. <strong>{markup(trace.weights_note)}</strong></p>\n"
        f'<p class="note">{markup(draft.origin)}</p>\n</header>'
    )
    if finding is None:
        return
    body = ""
    if trace.load_tokens is not None:
        first = first_text(trace, finding)
        draft.strip.append(strip_data(first.texts, first.breaks, first.experts, first.weights, first.layers, first.hues, id="report",
                                      layer=first.layer, spotlight=finding.expert))  # fmt: skip
        told = (f"The first {len(first.texts):,} of {first.document['n_tokens']:,} tokens of {first.document['name']}; {first.strength(finding.expert)}."
                f" Press its button for all experts, ◀ and ▶ for other layers. {HUES} · is a space, ⏎ a line end.")  # fmt: skip
        body = f'<div id="strip"><div class="strip"></div></div>\n<p class="caption">{draft.told(told)}</p>'
    draft.add(finding.claim, finding.evidence, body)


def _load(draft: _Draft, finding: Finding | None) -> None:
    stats, layers = draft.trace.stats, draft.trace.layers
    relative = [relative_load(stats.load(x.index)[: x.n_experts]) for x in layers]
    mark = (finding.site, finding.expert) if finding is not None else None
    framed = " The framed cell is the finding above." if mark is not None else ""
    caption = (f"Load over the layer's mean load, on a fixed scale from ⅛× to 8×; neutral is even, orange more, blue less, a cross marks a"
               f" dead expert (no token at all). n = {_range([stats.n_tokens(x.index) for x in layers])} tokens per layer.{framed} Experts of"
               " different layers are unrelated.")  # fmt: skip
    chance = METRICS["chance_max_over_mean"](draft.trace)["value"].to_numpy()
    draft.add(
        "Who carries the load?",
        f"Each cell is one expert of one layer. By chance the busiest cell of the first layer would reach about {times(chance[0])} ×.",
        draft.figure("load-map", charts.load_map(relative, draft.layers, "light", mark), caption,
                     f"Heatmap of {len(layers)} layers by {max(map(len, relative))} experts: load relative to an even share."),
    )  # fmt: skip


def _range(counts: Sequence[int]) -> str:
    return f"{counts[0]:,}" if len(set(counts)) == 1 else f"{min(counts):,} to {max(counts):,}"


def _balance(draft: _Draft) -> None:
    rows = [
        {"layer": layer.title, "n (tokens)": f"{row['n']:,}",
         **{METRICS[m].title: f"{row[m]:.0f}" if m in COUNTS else f"{row[m]:.3f}" for m in BALANCE}}
        for layer, row in zip(draft.trace.layers, balance_table(draft.trace).to_pylist(), strict=True)
    ]  # fmt: skip
    meant = {
        METRICS[m].title: f"{METRICS[m].definition}. By chance: {METRICS[m].chance_here(draft.trace)}. Source: {METRICS[m].source}"
        for m in BALANCE
    }
    body = (
        f'{_table(rows)}\n<p class="caption">{draft.told("Tokens per layer stand in the column n; definitions below.")}</p>\n{_list(meant)}'
    )
    draft.add("How uneven is each layer, in numbers?", "Every number beside what uniform random routing would give.", body)


def _capacity(draft: _Draft) -> None:
    policy, shuffles = PRESETS[PRESET].policy, shuffles_for(draft.trace, SCOPE, SIZE)
    try:
        found = list(shuffled_curves(draft.trace, shuffles, FACTORS, policy, SCOPE, size=SIZE, preset=PRESET))
    except MissingScores:
        policy = "position"
        found = list(shuffled_curves(draft.trace, shuffles, FACTORS, policy, SCOPE, size=SIZE, preset=PRESET))
    every = pa.concat_tables([table for _, table in found])
    means, titles = mean_curves(every), {x.index: x.title for x in draft.trace.layers}
    pooled = pool_curves(means)
    now = pooled.filter(pc.equal(pooled["factor"], FACTOR)).to_pylist()[0]
    grid = [means.filter(pc.equal(means["site"], i)) for i in titles]
    order = (
        f"each figure the mean over {len(shuffles)} shuffles of the documents"
        if len(shuffles) > 1
        else "one shuffle of the documents, seed 0"
    )
    caption = (f"Line: all layers together; band: range over layers. Dropped: share of assignments above the expert capacity; idle: share of slots"
               f" left empty. Capacity as in {PRESETS[PRESET].title}, served first: {policy}; batches of up to {SIZE} documents, {order}."
               f" n = {now['assignments']:,.0f} assignments. A what-if on recorded choices.")  # fmt: skip
    drawn = charts.overflow_curves(
        np.array(FACTORS), np.stack([g["dropped_share"].to_numpy() for g in grid]), 1 - np.stack([g["slot_use"].to_numpy() for g in grid]),
        np.stack([pooled["dropped_share"].to_numpy(), 1 - pooled["slot_use"].to_numpy(), pooled["chance_dropped_share"].to_numpy()]), FACTOR,
    )  # fmt: skip
    where = " over all layers" if len(titles) > 1 else ""
    spread = range_in_words(shuffle_shares(every, FACTOR))
    draft.add(f"{drops_in_words(now, FACTOR, where, now['chance_dropped_share'])}.",
              f"{needs_in_words(means, titles)}. {price_in_words(now)} {tokens_in_words(now, len(titles))}. {spread and f'Dropped: {spread}. '}"
              "By chance: what uniform routing in the same batches would drop.",
              draft.figure("capacity", drawn, caption, "Shares of dropped assignments and idle slots over the capacity factor."))  # fmt: skip


def _labels(draft: _Draft, site: int) -> None:
    found, layer = by_label(draft.trace, site), draft.trace.layers[site]
    groups, experts = seriation(found.enrichment)
    names = axis_names([found.groups[g] for g in groups])
    caption = (f"{captions.enrichment_definition(found, layer)} {captions.preferences_how(found, layer)}"
               f" n = {int(found.tokens.sum()):,} tokens of {int(found.documents.sum()):,} documents.")  # fmt: skip
    draft.add(
        captions.preferences_headline(found, layer),
        f"Expert numbers mean nothing without their layer. Uniform routing would use each expert for {layer.top_k / layer.n_classes:.1%} of every label.",
        draft.figure("labels", charts.enrichment_map(found, names, groups, experts, "light"), caption,
                     f"Heatmap of {len(groups)} labels by {len(experts)} experts: log2 enrichment."),
    )  # fmt: skip


def _information(draft: _Draft) -> None:
    found, endless = zip(*(label_information_and_interval(draft.trace, x.index) for x in draft.trace.layers), strict=True)
    drawn = charts.information_bars(draft.layers, found, endless)
    definition, n, how = captions.information_caption(found, endless)
    caption = f"{definition} {how} n = {n}."
    draft.add("In which layers do experts follow the labels?", "Each bar stands beside what labels dealt at random give, below the most that is possible.",
              draft.figure("information", drawn, caption, "Bars of the mutual information of expert and label per layer."))  # fmt: skip


def _model(draft: _Draft) -> None:
    card = draft.trace.model
    notes = dict.fromkeys([*(x.note for x in draft.trace.layers if x.note), *card.warnings])
    said = "".join(f'\n<p class="note">{markup(n)}</p>' for n in notes)
    body = _list(facts(card, len(draft.trace.layers))) + _table(router_rows(draft.trace.layers)) + said
    draft.add("What is this model?", draft.origin, body)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f'<th scope="col">{markup(str(k))}</th>' for k in rows[0])
    lines = ["".join(f"<td>{'' if v is None else markup(str(v))}</td>" for v in row.values()) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide" tabindex="0" role="region" aria-label="table">\n<table>\n<tr>{head}</tr>\n{body}\n</table>\n</div>'


def _list(values: Mapping[str, str]) -> str:
    return "<dl>\n" + "\n".join(f"<dt>{markup(k)}</dt><dd>{markup(v)}</dd>" for k, v in values.items()) + "\n</dl>"


def _page(draft: _Draft) -> str:
    strip, files = _HERE / "components" / "token_strip", _HERE / "components" / "figure_files"
    plotly = charts.plotly_script()
    parts = [("tokenStrip", strip / "strip.js"), ("figureFiles", files / "files.js"), ("", _PARTS / "report.js")]
    script = "\n" + "".join(_read(path).replace("export default function", f"const {name} = function", 1) for name, path in parts)
    data = {"strip": draft.strip[0] if draft.strip else None, "figures": draft.figures,
            "scales": {theme: palette.scale(colours) for theme, colours in palette.LOAD.items()}}  # fmt: skip
    filled = {
        "policy": "; ".join(("default-src 'none'", f"script-src {_hash(script)} {_hash(plotly)}", "style-src 'unsafe-inline'",
                             "img-src data: blob:", "base-uri 'none'", "form-action 'none'")),
        "version": markup(analysis.__version__),
        "title": markup(f"{draft.trace.name} · {draft.trace.model.name} · Routerscope"),
        "css": _read(strip / "strip.css") + _read(_PARTS / "report.css"),
        "body": "\n".join(draft.sections),
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        "plotly": base64.b64encode(gzip.compress(plotly.encode(), 9, mtime=0)).decode(),
        "script": script,
    }  # fmt: skip
    return re.sub(r"\{\{(\w+)\}\}", lambda m: filled[m[1]], _read(_PARTS / "page.html"))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
