"""Sentences that a page and the report share, made of what was computed. They hold data text: whoever shows them escapes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.information import Information
from analysis.jackknife import DocumentInterval
from analysis.pair_tests import PairTest
from analysis.specialization import Preferences
from analysis.trace import LayerInfo

from .charts import LEAST_USES, MOST_MARKS

CLEAR = 1.5  # lift from which a significant preference is called one in the headline
NAMED = 3  # groups that the headline names
CROSS = "Cross: not distinguishable from chance at a false discovery rate of 5%."
EMPTY = CROSS.replace("Cross", "Empty")
KIND = {"label": "label", "class": "kind of token", "position": "position"}


def preferences_headline(found: Preferences, layer: LayerInfo) -> str:
    """The groups whose use of an expert stands out most, one expert each, and how many experts prefer any; or why nothing can be told."""
    if found.missing:
        return found.missing
    named, what = int(clear(found).any(0).sum()), KIND[found.kind]
    if not named:
        return f"At {layer.title}, no expert can be said to prefer a {what}."
    gap = np.where(clear(found) & (found.count >= LEAST_USES), found.share - found.elsewhere, 0.0)
    leading = [int(g) for g in np.argsort(-gap.max(1), kind="stable")[:NAMED] if gap[g].max() > 0]
    verb = "goes" if found.kind == "label" else "go"
    said = [f"{'tokens at ' if found.kind == 'position' and not i else ''}{found.groups[g]}{f' {verb} above all' if not i else ''} to expert"
            f" {gap[g].argmax()}" for i, g in enumerate(leading)]  # fmt: skip
    every = f"all {layer.n_classes:,} experts prefer" if named == layer.n_classes else (
        f"{named:,} of {layer.n_classes:,} experts {'prefers' if named == 1 else 'prefer'}")  # fmt: skip
    return f"At {layer.title}, {', '.join(said)}{'; ' if said else ''}{every} some {what} beyond chance."


def clear(found: Preferences) -> np.ndarray:
    """bool [G, E]: preferences worth a name, significant and at least CLEAR times the base rate."""
    return np.asarray(found.significant & (found.lift >= CLEAR))


def preferring(found: Preferences) -> str:
    """ "9 of 16 experts": those with a clear preference."""
    return "untested" if found.missing else f"{int(clear(found).any(0).sum()):,} of {found.count.shape[1]:,} experts"


def grid_definition(found: Sequence[Preferences]) -> str:
    """Under the maps of several layers."""
    empty = "Empty: not distinguishable from chance at a false discovery rate of 5%, or too rarely used."
    return ("Rows and colours as above; each layer's experts stand in an order of their own. In a layer's title: experts that clearly prefer some"
            f" {KIND[found[0].kind]}. {'No cell can be tested.' if all(p.missing for p in found) else empty}")  # fmt: skip


def preferences_how(found: Preferences, layer: LayerInfo) -> str:
    """What the headline and the crosses rest on."""
    tested = "" if found.missing else (
        f" Test: {found.method}; corrected for the {found.count.size:,} cells of this layer and this look only, not for other layers looked at.")  # fmt: skip
    within = (" Colour compares all tokens of the run; the cross tests within documents, so that a kind that is common in one language is not mistaken"
              " for a preference, and significant also asks that both point the same way. A cell's file and hover have both effects.")  # fmt: skip
    chance = layer.top_k / layer.n_classes
    return (f"Beyond chance: used at least {CLEAR:g} times as often as overall, and significant. Named: the groups with the largest share less the share of"
            f" all others, the clearest expert of each.{tested}{'' if found.kind == 'label' or found.missing else within} Uniform routing would use each"
            f" expert for {chance:.1%} of every {KIND[found.kind]}.")  # fmt: skip


def weak_cells(weak: np.ndarray) -> str:
    """How a map shows its ``weak`` cells, bool: crosses, or nothing where there are more than MOST_MARKS."""
    return EMPTY if weak.sum() > MOST_MARKS else CROSS


def enrichment_definition(found: Preferences, layer: LayerInfo) -> str:
    """Under the heatmap."""
    return (f"Experts of {layer.title}. Colour: the share of the group's tokens that use the expert over the share of all others."
            f" {'No cell can be tested.' if found.missing else weak_cells(~found.significant)}")  # fmt: skip


def information_caption(found: Sequence[Information], endless: Sequence[DocumentInterval]) -> tuple[str, str, str]:
    """(definition, n, how) of the bars of label_information and label_information_interval, one of each layer."""
    n, p = [x.n for x in found], np.array([x.p for x in found])
    chance = " Nothing to hold it against: too few labelled documents."
    if np.isfinite(p).any():
        low, high = f"{np.nanmin(p):.3f}", f"{np.nanmax(p):.3f}"
        chance = (
            f" Grey: by chance, with its 95% range; so much or more comes by chance with p = {low if low == high else f'{low} to {high}'}."
        )
    counted = f"{n[0]:,}" if len(set(n)) == 1 else f"{min(n):,} to {max(n):,}"
    return (f"Mutual information of expert and label in bits; 0 = the label says nothing about the expert, tick: the most possible.{chance}",
            f"{counted} assignments per layer",
            f"Both are plug-in values, biased alike. By chance: {found[0].null}. The most possible: min(H(label), H(expert) - log2 k) where every token has k"
            f" experts, since a token's experts all differ. {_endless(endless)}")  # fmt: skip


def _endless(found: Sequence[DocumentInterval]) -> str:
    """How the diamonds were made, or why there are fewer of them than layers."""
    why = sorted({x.missing for x in found if x.missing})
    if all(x.missing for x in found):
        return f"What endless documents would give is not told: {'; '.join(why)}."
    some = f" Not told of {sum(bool(x.missing) for x in found)} of {len(found)} layers: {'; '.join(why)}." if why else ""
    return ("Diamonds: what endless documents like these would give, with its 95% interval: the measured value less its bias, by leaving out each of"
            f" {next(x for x in found if not x.missing).left_out:,} documents or groups of them (jackknife).{some}")  # fmt: skip


def pairs_headline(found: PairTest, here: str) -> str:
    """The pair that stands out most, with its interval, and how many differ from chance; or why nothing can be told."""
    if found.missing:
        return found.missing
    lift = found.counts.lift
    gap = np.abs(np.log2(np.where(found.significant, np.maximum(lift, 2.0**-10), 1)))
    if not found.claimed:
        return f"At {here}, none of {found.tested:,} pairs of experts can be told from chance."
    more = np.where(found.significant & (lift > 1), gap, 0)
    a, b = (int(x) for x in np.unravel_index((more if more.any() else gap).argmax(), gap.shape))
    said = (
        f"At {here}, experts {a} and {b} are chosen together"
        if found.kind == "pairs"
        else f"From expert {a} at {here}, tokens go on to expert {b}"
    )
    between = f" (95% {_times(found.low[a, b])} to {_times(found.high[a, b])})" if np.isfinite(found.low[a, b]) else ""
    return (f"{said} {_times(lift[a, b])} times as often as their loads alone give{between}; {found.claimed:,} of {found.tested:,} pairs"
            f" {'differs' if found.claimed == 1 else 'differ'} beyond chance.")  # fmt: skip


def _times(lift: float) -> str:
    return f"{lift:,.1f}" if lift >= 1 else f"{lift:.2f}"


def pairs_how(found: PairTest) -> str:
    """What the headline, the crosses and the intervals of a map rest on."""
    tested = f" {pairs_test(found)}" if not found.missing else ""
    return f"Fixed scale from ⅛× to 8×. Uniform routing would give each partner {found.counts.chance_share:.1%}.{tested}"


def pairs_test(found: PairTest) -> str:
    """The test and the intervals of pairs, in sentences."""
    law = ("each token draws its experts at fixed odds without return, at the odds that give the document's loads" if found.kind == "pairs"
           else "row total x column total / n")  # fmt: skip
    return (f"Test: within each document, against what the document's own loads give ({law}); {found.method}; never surer than if tokens were independent."
            f" Corrected for the {found.tested:,} pairs of this layer and this look only. Beyond chance also asks that documents and lift point the same"
            f" way. Intervals: {found.units:,} units of whole documents drawn again.")  # fmt: skip


def spread(values: np.ndarray) -> str:
    """A whole number that all agree on, or the least and the most."""
    return f"{values.min():,}" if values.min() == values.max() else f"{values.min():,} to {values.max():,}"
