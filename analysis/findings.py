"""What to say first about a run: true sentences computed from its statistics, each with n and what chance gives.

Knows nothing of screens. Text from data (labels) is passed on as it is; whoever shows it escapes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import balance
from .trace import Trace


@dataclass(frozen=True)
class Finding:
    """A sentence in three parts: the claim, its n and chance level, and where to look (site, expert, label if any)."""

    claim: str
    evidence: str
    site: int
    expert: int
    label: str | None = None


def strongest_label(trace: Trace) -> Finding | None:
    """The expert that takes the largest share of one label's assignments relative to its share of all the others'.

    A candidate has at least 500 tokens and 5 documents of the label, is used on them at least twice as often as on all
    other text and 10 points more, and above the others' share in nine of ten of those documents. At 500 tokens 10 points
    are five standard errors of a token-wise draw; the documents guard against one text speaking for its label.
    """
    best: tuple[float, Finding] | None = None
    stats = trace.stats
    for layer in trace.layers:
        labels, counts = stats.label_load(layer.index)
        if len(labels) < 2:
            continue
        for row, label in enumerate(labels):
            mine, others = counts[row], counts.sum(0) - counts[row]
            tokens = mine.sum() / layer.top_k
            if tokens < 500 or not others.sum():
                continue
            share, base = mine / mine.sum(), others / others.sum()
            expert = int((share - base).argmax())
            used, elsewhere = mine[expert] / tokens, others[expert] / (others.sum() / layer.top_k)
            if used < 2 * elsewhere or used < elsewhere + 0.1:
                continue
            if not _holds_across_documents(trace, layer.index, expert, label, float(base[expert])):
                continue
            claim = (f"At {layer.title}, expert {expert} is used for {used:.0%} of the {label} tokens"
                     f" and {elsewhere:.0%} of all others.")  # fmt: skip
            evidence = (f"n = {tokens:,.0f} {label} tokens. A router that ignored the text would use each expert for"
                        f" {layer.top_k}/{layer.n_experts} = {layer.top_k / layer.n_experts:.1%} of every label.")  # fmt: skip
            gap = float(share[expert] - base[expert])
            if best is None or gap > best[0]:
                best = gap, Finding(claim, evidence, layer.index, expert, label)
    return best[1] if best else None


def _holds_across_documents(trace: Trace, site: int, expert: int, label: str, base: float) -> bool:
    """True where nine of ten of the label's documents (at least 5) use the expert above the other labels' share."""
    documents = {r["document"] for r in trace.documents.to_pylist() if r["label"] == label}
    table = trace.stats.by_document
    keep = (table["site"].to_numpy() == site) & np.isin(table["document"].to_numpy(), list(documents))
    rows = table.filter(keep)
    ids, counts, experts = (rows[n].to_numpy() for n in ("document", "count", "expert"))
    above = [counts[(ids == d) & (experts == expert)].sum() / counts[ids == d].sum() > base for d in set(ids.tolist())]
    return len(above) >= 5 and float(np.mean(above)) >= 0.9


def busiest(trace: Trace) -> Finding | None:
    """The site and expert with the largest load relative to an even share; None for a run without assignments."""
    best: tuple[float, int, int] | None = None
    for layer in trace.layers:
        relative = balance.relative_load(trace.stats.load(layer.index)[: layer.n_experts])
        if np.isfinite(relative).all() and (best is None or relative.max() > best[0]):
            best = float(relative.max()), layer.index, int(relative.argmax())
    if best is None:
        return None
    layer, n = trace.layers[best[1]], trace.stats.n_tokens(best[1])
    chance = balance.chance_max_over_mean(n, layer.n_experts, layer.top_k)
    claim = f"{layer.title.capitalize()} sends expert {best[2]} {best[0]:.2f} times its even share."
    return Finding(claim, f"n = {n:,} tokens. Chance alone would give at most about {chance:.2f} times.", best[1], best[2])


def first_finding(trace: Trace) -> Finding | None:
    """The one thing to say first: the strongest label specialist, else the busiest expert."""
    return strongest_label(trace) or busiest(trace)
