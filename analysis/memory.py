"""Captured parts in memory: joined along tokens, and read as a run on disk is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .rounding import by_falling_weight
from .trace import Part, SiteRouting, SiteScores


class PartsInMemory:
    """RoutingSource over captured parts, concatenated once."""

    def __init__(self, parts: Sequence[Part], n_sites: int) -> None:
        self._routing = [join_routing([kept_routing(p, s) for p in parts]) for s in range(n_sites)]
        self._scores = [join_scores([p.scores[s] for p in parts]) for s in range(n_sites)]

    def routings(self, sites: Sequence[int], start: int, stop: int) -> tuple[SiteRouting, ...]:
        return tuple(self._sliced(site, start, stop) for site in sites)

    def _sliced(self, site: int, start: int, stop: int) -> SiteRouting:
        whole = self._routing[site]
        executed = whole.experts[start:stop]
        chosen = executed if whole.chosen is whole.experts else whole.chosen[start:stop]
        return SiteRouting(executed, None if whole.weights is None else whole.weights[start:stop], chosen)

    def experts(self, site: int, start: int, stop: int) -> np.ndarray:
        return self._routing[site].experts[start:stop]

    def scores(self, site: int, start: int, stop: int) -> SiteScores:
        s, rows = self._scores[site], slice(start, stop)
        probabilities = None if s.probabilities is None else s.probabilities[rows]
        return SiteScores(s.entropy[rows], s.margin[rows], s.logsumexp[rows], probabilities)


def kept_routing(part: Part, site: int) -> SiteRouting:
    """One site's decisions as the part keeps them: without weights and by falling weight where ``part.weights`` is "none"."""
    routing = part.routing[site]
    if part.weights != "none" or routing.weights is None:
        return routing
    order = by_falling_weight(routing.experts, routing.weights)
    experts = np.take_along_axis(routing.experts, order, 1)
    same = routing.chosen is routing.experts
    return SiteRouting(experts, None, experts if same else np.take_along_axis(routing.chosen, order, 1))


def join_routing(pieces: Sequence[SiteRouting]) -> SiteRouting:
    """Concatenate decisions of one site along tokens; keeps ``chosen is experts`` where no piece differs, weights where all have them."""
    experts = np.concatenate([p.experts for p in pieces])
    same = all(p.chosen is p.experts for p in pieces)
    chosen = experts if same else np.concatenate([p.chosen for p in pieces])
    weights = [p.weights for p in pieces if p.weights is not None]
    return SiteRouting(experts, np.concatenate(weights) if len(weights) == len(pieces) else None, chosen)


def join_scores(pieces: Sequence[SiteScores]) -> SiteScores:
    """Concatenate scores of one site along tokens; probabilities only where every piece has them."""
    known = [p.probabilities for p in pieces if p.probabilities is not None]
    probabilities = np.concatenate(known) if pieces and len(known) == len(pieces) else None
    entropy, margin, logsumexp = (np.concatenate([getattr(p, c) for p in pieces]) for c in ("entropy", "margin", "logsumexp"))
    return SiteScores(entropy, margin, logsumexp, probabilities)
