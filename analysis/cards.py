"""Everything known of one expert: its load, what it serves beyond chance, whom it works with, and passages that show it.

The one-line description is made from the statistics alone: only preferences that survive correction are named, the
most work first, with how far they lie above the base rate and on how many tokens. Knows nothing of screens; text from
data is passed on as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from .capacity_answer import percent
from .pair_tests import PairTest, Progress, pair_tests
from .reading import Reading, assignments_reading, documents_of, one_pass
from .specialization import Preferences, by_label, effects
from .token_classes import class_codes, class_reading, present_classes
from .token_use import DocumentUse, TokenUse, document_use, leading_ids, top_tokens, use_reading
from .trace import Trace, id_dtype
from .vocabulary import LEAST, TokenCounts, input_tokens

LEAST_LIFT = 1.5  # a preference below it may be significant, but is no description
NONE = "no significant preference"


@dataclass(frozen=True)
class SiteEvidence:
    """What the cards of one site's experts are made of; worth keeping while cards of one site are looked at.

    ``crossed``: effects of every label and class together, groups in the order label by label.  ``partners``: pairs in one
    token.  ``into``: flow from the site before; ``onward``: to the next.  ``missing`` says in words what this run cannot tell.
    """

    site: int
    labels: Preferences
    classes: Preferences | None
    crossed: Preferences | None
    tokens: TokenCounts | None
    token_use: DocumentUse | None
    partners: PairTest | None
    into: PairTest | None
    onward: PairTest | None
    missing: tuple[str, ...]


@dataclass(frozen=True)
class GroupUse:
    """One row of Preferences for one expert; fields as there, ``n`` its tokens; ``tested``: it could have been significant."""

    group: str
    count: int
    n: int
    documents: int
    share: float
    elsewhere: float
    lift: float
    enrichment: float
    low: float
    high: float
    q: float
    significant: bool
    tested: bool


@dataclass(frozen=True)
class Neighbour:
    """Another expert: ``count`` tokens that use both, their ``share`` of this expert's tokens, ``lift`` over what loads alone would give.

    low, high, p, q, significant: as in PairTest; NaN and False where nothing could be told.
    """

    expert: int
    count: int
    share: float
    lift: float
    low: float
    high: float
    p: float
    q: float
    significant: bool

    @property
    def direction(self) -> int:
        """1 and -1: the two meet more, or less, than chance gives; 0: that cannot be told."""
        return 0 if not self.significant else 1 if self.lift > 1 else -1


@dataclass(frozen=True)
class ExpertLoad:
    """What statistics alone tell of one expert. ``share`` is the part of the site's ``n`` tokens that use it (even: k / E), ``relative_load`` 1 = even."""

    site: int
    expert: int
    title: str
    n: int
    assignments: int
    share: float
    even_share: float
    relative_load: float
    first_choices: int
    mean_gate: float


@dataclass(frozen=True)
class ExpertCard(ExpertLoad):
    """One expert. ``labels`` and ``classes`` by falling lift; ``tokens`` by falling lift, ids seen at least LEAST times; ``partners``, ``sources``
    and ``targets``, every other expert there, see ``neighbours``: empty where the evidence leaves them out.
    """

    description: str
    labels: tuple[GroupUse, ...]
    classes: tuple[GroupUse, ...]
    tokens: tuple[TokenUse, ...]
    partners: tuple[Neighbour, ...]
    sources: tuple[Neighbour, ...]
    targets: tuple[Neighbour, ...]
    missing: tuple[str, ...]


def site_evidence(trace: Trace, site: int, pairs: bool = True, use: bool = True, progress: Progress | None = None,
                  labels: Preferences | None = None) -> SiteEvidence:  # fmt: skip
    """All tests and tables of one site; without ``pairs`` those of other experts are None, which read it and its neighbours once more.

    Without ``use``, ``token_use`` is None: for ``with_use``, which reads it once more. ``progress`` is told (tokens read, in all). ``labels``:
    ``by_label``, where at hand.
    """
    before = site_before(trace, site)
    with ThreadPoolExecutor(1) as pool:  # each spends most of its time without Python's lock
        tested = pool.submit(lambda: labels or by_label(trace, site))
        classes, crossed, tokens, token_use = _read(trace, site, use, progress)
    labels = tested.result()
    missing = [] if labels.groups else ["labels: the run has none"]
    if classes is None:
        missing.append("token classes, texts and passages: the run holds statistics only")
    if tokens is None:
        missing.append("top tokens: assignments were dropped, and without tokens an id's occurrences are unknown")
    if before is None:
        missing.append("where its tokens come from: this is the first routed layer")
    if trace.stats.following[site] is None:
        missing.append("where its tokens go to: this is the last routed layer")
    found = SiteEvidence(site, labels, classes, crossed, tokens, token_use, None, None, None, tuple(missing))
    if not pairs:
        return found
    asked = company(trace, site)
    made = dict(zip(asked, pair_tests(trace, list(asked.values())), strict=True))
    return replace(found, partners=made["partners"], into=made.get("into"), onward=made.get("onward"))


def with_use(trace: Trace, evidence: SiteEvidence, progress: Progress | None = None) -> SiteEvidence:
    """``evidence`` with its ``token_use``, where that can be known; one pass. ``progress`` is told (tokens read, in all)."""
    if evidence.tokens is None or evidence.token_use is not None:
        return evidence
    ids = leading_ids(evidence.tokens, range(evidence.tokens.classes))
    return replace(evidence, token_use=document_use(trace, evidence.tokens, ids, progress=progress))


def company(trace: Trace, site: int) -> dict[str, tuple[str, int]]:
    """What ``pair_tests`` is asked for: by field of SiteEvidence (kind, site), without what a first or last site has not."""
    before = site_before(trace, site)
    asked = {
        "into": ("flow", before),
        "partners": ("pairs", site),
        "onward": ("flow", site if trace.stats.following[site] is not None else None),
    }
    return {name: (kind, at) for name, (kind, at) in asked.items() if at is not None}


def site_before(trace: Trace, site: int) -> int | None:
    """The site whose tokens go on to ``site`` in the same stream."""
    return next((i for i, after in enumerate(trace.stats.following) if after == site), None)


def known_tokens(trace: Trace, site: int) -> TokenCounts | None:
    """``tokens`` of SiteEvidence: None where assignments were dropped and, without the recorded tokens, an id's occurrences are unknown."""
    layer, stats = trace.layers[site], trace.stats
    known = trace.load_tokens is not None or stats.load(site).sum() == stats.n_tokens(site) * layer.top_k
    return input_tokens(trace, site) if known else None


def _read(trace: Trace, site: int, use: bool,
          progress: Progress | None) -> tuple[Preferences | None, Preferences | None, TokenCounts | None, DocumentUse | None]:  # fmt: skip
    """``classes``, ``crossed``, ``tokens`` and ``token_use`` of SiteEvidence, in one pass over the site where there are tokens."""
    layer, stats = trace.layers[site], trace.stats
    if trace.source is None or trace.load_tokens is None:
        return None, None, known_tokens(trace, site), None
    with ThreadPoolExecutor() as pool:
        counted, coded = pool.submit(input_tokens, trace, site), pool.submit(class_codes, trace, layer.stream)
    tokens, (names, codes) = counted.result(), present_classes(coded.result())
    labels = stats.label_load(site)[0]
    crossed = [_crossed(trace, site, labels, names, codes)] if labels else []
    uses = [use_reading(trace, tokens, leading_ids(tokens, range(layer.n_classes)))] if use else []
    found = one_pass(trace, site, class_reading(trace, site, names, codes), *crossed, *uses, progress=progress)
    return found[0], found[1] if labels else None, tokens, found[-1] if use else None


def expert_card(trace: Trace, site: int, expert: int, evidence: SiteEvidence | None = None) -> ExpertCard:
    """The card of one expert. ``evidence`` of the same site saves the time of making it. IndexError for no such expert."""
    load = expert_load(trace, site, expert)
    known = site_evidence(trace, site) if evidence is None else evidence
    used = load.assignments
    return ExpertCard(
        **vars(load), description=describe(known, expert), labels=group_uses(known.labels, expert), classes=group_uses(known.classes, expert),
        tokens=top_tokens(trace, known.tokens, expert, use=known.token_use) if known.tokens is not None else (),
        partners=neighbours(known.partners, expert, used), sources=neighbours(known.into, expert, used, column=True),
        targets=neighbours(known.onward, expert, used), missing=known.missing,
    )  # fmt: skip


def expert_load(trace: Trace, site: int, expert: int) -> ExpertLoad:
    """How much one expert carries. IndexError for no such expert."""
    layer, stats = trace.layers[site], trace.stats
    if not 0 <= expert < layer.n_classes:
        raise IndexError(f"no expert {expert} at {layer.title}: it has 0 to {layer.n_classes - 1}")
    n, load = stats.n_tokens(site), stats.load(site)
    used, mean = int(load[expert]), load.sum() / layer.n_classes
    return ExpertLoad(
        site, expert, f"{layer.title}, expert {expert}", n, used, used / n if n else float("nan"), layer.top_k / layer.n_classes,
        float(used / mean) if mean else float("nan"), int(stats.first_choice_load(site)[expert]),
        float(stats.gate_mass(site)[expert] / used) if used else float("nan"),
    )  # fmt: skip


def describe(evidence: SiteEvidence, expert: int) -> str:
    """One line, e.g. "chinese. 96% of these 6,112 tokens use it, 2% of all others."; NONE with n where nothing holds, Preferences.missing
    where nothing could.

    Labels and token classes are each tested on their own; of the labels, the classes and both together, the line names
    what tells most about the expert: tokens x log2 lift, its part in the mutual information.
    """
    labels, classes = _leading(evidence.labels, expert), _leading(evidence.classes, expert)
    choices = [_together(evidence, rows, columns, expert) for rows, columns in ((labels, []), ([], classes), (labels, classes))]
    told = [x for x in choices if x is not None and x[2] >= LEAST and x[0] >= LEAST_LIFT]
    if not told:
        asked = [(p, what) for p, what in ((evidence.labels, "labels"), (evidence.classes, "token classes")) if p is not None]
        kinds = [f"{len(p.groups)} {what}" for p, what in asked if not p.missing]
        n = int(evidence.labels.documents.sum()) or int(max(evidence.classes.documents, default=0) if evidence.classes else 0)
        return f"{NONE} among {' and '.join(kinds)} of {n:,} documents" if kinds else asked[0][0].missing
    _, name, count, n, others, rest = max(told, key=lambda x: x[2] * np.log2(x[0]))
    return f"{name}. {percent(count / n)} of these {n:,} tokens use it, {percent(others / rest if rest else float('nan'))} of all others."


def _leading(found: Preferences | None, expert: int) -> list[int]:
    """Up to two groups, most excess tokens first, that are significantly and clearly preferred; the second at least half the first."""
    if found is None or not found.groups:
        return []
    lift, count = found.lift[:, expert], found.count[:, expert]
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.where(found.significant[:, expert] & (lift >= LEAST_LIFT), count - count / lift, 0)
    order = np.argsort(-excess, kind="stable")[:2]
    return [int(i) for i in order if excess[i] > 0 and excess[i] >= excess[order[0]] / 2]


def _together(
    evidence: SiteEvidence, labels: Sequence[int], classes: Sequence[int], expert: int
) -> tuple[float, str, int, int, int, int] | None:
    """(lift, name, of n tokens those that use the expert, n, the same two of all other tokens) of the chosen labels and classes together."""
    if labels and classes and evidence.crossed is not None and evidence.classes is not None:
        found, width = evidence.crossed, len(evidence.classes.groups)
        groups = [a * width + b for a in labels for b in classes]
    elif labels and not classes:
        found, groups = evidence.labels, list(labels)
    elif classes and not labels and evidence.classes is not None:
        found, groups = evidence.classes, list(classes)
    else:
        return None
    count, n = int(found.count[groups, expert].sum()), int(found.tokens[groups].sum())
    uses, every = int(found.count[:, expert].sum()), int(found.tokens.sum())
    kinds = " and ".join(evidence.classes.groups[i] for i in classes) if evidence.classes is not None and classes else ""
    name = " ".join([" and ".join(evidence.labels.groups[i] for i in labels), kinds]).strip()
    return (count * every / n / uses if n and uses else 0.0), name, count, n, uses - count, every - n


def _crossed(trace: Trace, site: int, labels: tuple[str, ...], classes: tuple[str, ...], codes: np.ndarray) -> Reading[Preferences]:
    """Effects of label x class; ``codes`` int [tokens] into ``classes``, -1 for none."""
    layer, width = trace.layers[site], len(classes)
    place = {name: i for i, name in enumerate(labels)}
    of_document = {r["document"]: place.get(r["label"], -1) for r in trace.documents.to_pylist()}
    numbers, lengths = documents_of(trace, layer.stream)
    size = len(labels) * width
    label = np.repeat(np.array([of_document[d] for d in numbers.tolist()], id_dtype(size)), lengths)
    group = np.where((label >= 0) & (codes >= 0), label * width + codes, -1)
    counts = yield from assignments_reading(layer, group, size)
    return effects(
        site, "label and class", tuple(f"{a} {b}" for a in labels for b in classes), np.bincount(group + 1, minlength=size + 1)[1:], counts
    )


def group_uses(found: Preferences | None, expert: int) -> tuple[GroupUse, ...]:
    """The groups at one expert, by falling lift; none where nothing was looked at."""
    if found is None:
        return ()
    order = np.argsort(-np.nan_to_num(found.lift[:, expert]), kind="stable")
    return tuple(
        GroupUse(found.groups[g], int(found.count[g, expert]), int(found.tokens[g]), int(found.documents[g]),
                 float(found.share[g, expert]), float(found.elsewhere[g, expert]), float(found.lift[g, expert]),
                 float(found.enrichment[g, expert]), float(found.low[g, expert]), float(found.high[g, expert]),
                 float(found.q[g, expert]), bool(found.significant[g, expert]), not found.missing)
        for g in order
    )  # fmt: skip


def neighbours(test: PairTest | None, expert: int, used: int, column: bool = False) -> tuple[Neighbour, ...]:
    """Every other expert that ``test`` sets beside ``expert``, which ``used`` tokens use: its row, or its ``column``.

    First those that meet it more than chance gives, by falling lift; then those that cannot be told, by falling count; then those
    that meet it less than chance gives, by falling lift. Empty without a test or a token.
    """
    if test is None or not used:
        return ()
    n = test.counts.observed.shape[0 if column else 1]
    others = [i for i in range(n) if test.kind != "pairs" or i != expert]
    cells = [(i, expert) if column else (expert, i) for i in others]
    met, lift = test.counts.observed, test.counts.lift
    found = [Neighbour(i, int(met[at]), int(met[at]) / used, float(lift[at]), float(test.low[at]), float(test.high[at]), float(test.p[at]),
                       float(test.q[at]), bool(test.significant[at])) for i, at in zip(others, cells, strict=True)]  # fmt: skip
    return tuple(sorted(found, key=lambda x: (-x.direction, -x.lift if x.significant else -x.count)))
