"""What to say first about a run: true sentences computed from its statistics, each with n and what chance gives.

Knows nothing of screens. Text from data (labels) is passed on as it is; whoever shows it escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import balance
from .significance import permutation_test
from .specialization import Preferences, label_effects, labelled_documents
from .stability import LEAST_DOCUMENTS, dead_experts
from .trace import Trace

LEAST_TOKENS = 500  # of a label, for a sentence about it
MOST_P = 0.01
DRAWS = 499
NAMED = 24  # experts without a token, by number
MOST_DOCUMENTS = 150  # more are joined into units: the front page waits for this


@dataclass(frozen=True)
class Finding:
    """A sentence in three parts: the claim, its n and chance level, and where to look (site, expert, label if any)."""

    claim: str
    evidence: str
    site: int
    expert: int
    label: str | None = None


def strongest_label(trace: Trace) -> Finding | None:
    """The expert that takes the largest share of one label's tokens relative to all others', where that is no accident.

    A candidate has at least 500 tokens of the label and is used on them at least twice as often as on all other text
    and 10 points more; and moving the labels between whole documents reaches so strong a statistic, anywhere at all,
    less than once in a hundred times. That bound on any false claim is stricter than a false discovery rate of 1 %.
    """
    leads = _leads(trace)
    if not any(fits.any() for _, fits in leads):
        return None  # nothing to test
    streams = {x.stream for x in trace.layers}
    p: dict[int, np.ndarray] = {}
    for stream in streams:
        sites = [x.index for x in trace.layers if x.stream == stream]
        p |= dict(zip(sites, (np.minimum(x * len(streams), 1) for x in _family_p(trace, sites)), strict=True))
    best = _widest([(found, fits & (p[found.site] < MOST_P)) for found, fits in leads])
    return _specialist(trace, float(p[best[0].site][best[1], best[2]]), *best) if best else None


def leading_site(trace: Trace) -> int | None:
    """Where to begin, from counts alone: the site of the candidate of ``strongest_label`` with the widest gap, else of the busiest expert.

    That of ``first_finding`` unless the widest gap does not pass its test, which reads what every document sends where. None for a run
    without assignments.
    """
    best = _widest(_leads(trace))
    if best:
        return best[0].site
    finding = busiest(trace)
    return finding.site if finding else None


def _leads(trace: Trace) -> list[tuple[Preferences, np.ndarray]]:
    """Per site, stream by stream: (effects of its labels, bool [labels, classes]: large enough to be told, if it is no accident)."""
    leads = []
    for stream in dict.fromkeys(x.stream for x in trace.layers):
        for found in (label_effects(trace, x.index) for x in trace.layers if x.stream == stream):
            fits = (found.tokens[:, None] >= LEAST_TOKENS) & (found.share >= 2 * found.elsewhere) & (found.share - found.elsewhere >= 0.1)
            leads.append((found, fits))
    return leads


def _widest(leads: Sequence[tuple[Preferences, np.ndarray]]) -> tuple[Preferences, int, int] | None:
    """(effects, label, expert) of the cell that fits with the largest difference of shares; the first of several."""
    best: tuple[float, Preferences, int, int] | None = None
    for found, fits in leads:
        gap = np.where(fits, found.share - found.elsewhere, -1)
        if fits.any() and (best is None or gap.max() > best[0]):
            row, expert = np.unravel_index(gap.argmax(), gap.shape)
            best = float(gap.max()), found, int(row), int(expert)
    return best[1:] if best else None


def _family_p(trace: Trace, sites: Sequence[int]) -> list[np.ndarray]:
    """Per site of one stream, float64 [labels, classes]: p corrected for every label, expert and site of the stream.

    NaN for a site where some label has no assignment at all: its labels are not those of the documents.
    """
    units = [labelled_documents(trace, s, MOST_DOCUMENTS) for s in sites]
    test = permutation_test(np.concatenate([u.counts for u in units], 1), units[0].tokens, units[0].codes, DRAWS)
    pieces = np.split(test.family, np.cumsum([u.counts.shape[1] for u in units])[:-1], axis=1)
    labels = [trace.stats.label_load(s)[0] for s in sites]
    return [p if names == units[0].labels else np.full((len(names), p.shape[1]), np.nan) for p, names in zip(pieces, labels, strict=True)]


def _specialist(trace: Trace, p: float, found: Preferences, row: int, expert: int) -> Finding:
    layer, label = trace.layers[found.site], found.groups[row]
    claim = (f"At {layer.title}, expert {expert} is used for {found.share[row, expert]:.0%} of the {label} tokens"
             f" and {found.elsewhere[row, expert]:.0%} of all others.")  # fmt: skip
    evidence = (f"n = {found.tokens[row]:,} {label} tokens. A router that ignored the text would use each expert for"
                f" {layer.top_k}/{layer.n_classes} = {layer.top_k / layer.n_classes:.1%} of every label; with the labels moved between"
                f" documents, something this strong turns up anywhere with p = {p:.2g}.")  # fmt: skip
    return Finding(claim, evidence, layer.index, expert, label)


def times(ratio: float) -> str:
    """A ratio to 2 decimals, or to as many as tell it from 1: what chance gives at most comes close to 1 in a long run, and is not 1.00."""
    excess = abs(ratio - 1)
    return f"{ratio:.2f}" if not 0 < excess < 0.005 else f"{ratio:.{-math.floor(math.log10(excess))}f}"


def chance_in_words(most: float, layers: int) -> str:
    """balance.unlikely_max_over_mean in a sentence."""
    where = f"anywhere in {layers:,} layers" if layers > 1 else "at any expert"
    return f"By chance (uniform routing) a load above {times(most)} times turns up {where} in at most 1 of 20 such runs."


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
    chance = balance.unlikely_max_over_mean(n, layer.n_classes, layer.top_k, len(trace.layers))
    claim = f"At {layer.title}, expert {best[2]} carries {best[0]:.2f} times its even share"
    claim += "." if best[0] > chance else ": no more than chance in so few tokens."
    return Finding(claim, f"n = {n:,} tokens. {chance_in_words(chance, len(trace.layers))}", best[1], best[2])


def first_finding(trace: Trace) -> Finding | None:
    """The one thing to say first: the strongest label specialist, else the busiest expert."""
    return strongest_label(trace) or busiest(trace)


def unused_experts(trace: Trace) -> str:
    """Which experts got no token, and whether they may be called dead; beside what uniform routing would leave."""
    found = dead_experts(trace)
    chance = "below 0.01" if found.chance < 0.01 else f"{found.chance:,.2f}"
    if not found.dead:
        return f"No expert of {found.experts:,} is dead. Uniform routing of so many tokens would leave {chance}."
    left, said = NAMED, []
    for site, experts in found.at:
        if left > 0:
            said.append(f"{trace.layers[site].title} expert{'s' * (len(experts[:left]) > 1)} {', '.join(map(str, experts[:left]))}")
        left -= len(experts)
    who = "; ".join(said) + (f"; and {-left:,} more, all in the table of loads" if left < 0 else "")
    if found.few:
        return (f"{found.dead:,} of {found.experts:,} experts {'is' if found.dead == 1 else 'are'} not used by {_these(found.documents)} ({found.tokens:,} tokens): {who}."
                f" So few documents cannot show that an expert is dead: that takes {LEAST_DOCUMENTS}.")  # fmt: skip
    return (f"{found.dead:,} of {found.experts:,} experts {'is' if found.dead == 1 else 'are'} dead: {who}. Uniform routing of so many tokens would"
            f" leave {chance}.")  # fmt: skip


def _these(documents: int) -> str:
    return "this one document" if documents == 1 else f"these {documents:,} documents"
