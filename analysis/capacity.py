"""The capacity lab: expert capacity enforced on a recorded run. What overflows, who pays for it, and what idles.

``apply_capacity`` answers one setting; ``rank_trace`` ranks the sites once, so that every further capacity factor is
cheap (``at``); ``capacity_curves`` answers every factor in one pass. Capacity is counted against what the router chose, before
any native drop. policies.py has the policies, overflow.py the figures, slots.py capacities and batches.

The gate weight of a natively dropped assignment is not recorded: at sites that dropped any, gate mass is NaN and the
policies that order by weight are refused. Everything else there is exact. So it is in a run that stored no gate weights, but that first
choices are known there, and with them "choice".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from . import capacity_keys
from .capacity_keys import batches_of
from .overflow import FACTORS, Overflow, SlotUse, chance_curve
from .policies import BLOCK, POLICIES, MissingScores, Queues, rank_site, site_curve
from .slots import Batches, CapacityError, CapacityRule, ExpertShape, capacity_rule, make_batches, slot_cost
from .trace import LayerInfo, ModelCard, SiteRouting, Trace, gate_weights

_Site = tuple[np.ndarray, np.ndarray | None, int, Batches, str]  # chosen experts, weights, number of experts, batches, policy
_BYTES: Mapping[str, float] = MappingProxyType({"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1})
PIECE = 1 << 18  # tokens read between two tellings
ADDITIVE = ("tokens", "assignments", "dropped", "kept", "rerouted", "fully_dropped", "partly_dropped", "top1_dropped", "slots", "idle",
            "gate_mass", "gate_mass_lost", "chance_dropped")  # fmt: skip
SHARES = (("dropped_share", "dropped", "assignments"), ("fully_dropped_share", "fully_dropped", "tokens"),
          ("partly_dropped_share", "partly_dropped", "tokens"), ("top1_dropped_share", "top1_dropped", "tokens"),
          ("gate_mass_lost_share", "gate_mass_lost", "gate_mass"), ("slot_use", "kept", "slots"),
          ("chance_dropped_share", "chance_dropped", "assignments"))  # fmt: skip


@dataclass(frozen=True)
class RankedTrace:
    """Sites of a trace ranked under one policy and scope; ``queues`` by site number. 8 bytes and more per assignment."""

    trace: Trace
    queues: Mapping[int, Queues]

    def at(self, factor: float = 1.25, preset: str | CapacityRule = "megatron", *, slots: int | None = None,
           block: int = BLOCK) -> AppliedCapacity:  # fmt: skip
        """The answer at one factor under a preset or rule, or at ``slots`` per expert; ``block`` is for "dropless"."""
        rule = rule_of(preset)
        return AppliedCapacity(self.trace, {i: q.at(factor, rule, slots=slots, block=block) for i, q in self.queues.items()})

    def curves_by(self, name: str, factors: Sequence[float] | np.ndarray = FACTORS, preset: str | CapacityRule = "megatron") -> pa.Table:
        """AppliedCapacity.by_label or by_position at every factor in one pass: ``name`` is "label" or "first_position"."""
        bins = partial(capacity_keys.positions, width=None)
        named: Mapping[str, Callable[[Trace, str], capacity_keys.Keys]] = {"label": capacity_keys.labels, "first_position": bins}
        keys, tables = named[name], []
        for i, queues in self.queues.items():
            codes, values = keys(self.trace, self.trace.layers[i].stream)
            table = queues.curve_by(codes, len(values), factors, rule_of(preset))
            tables.append(_of_site(self.trace.layers[i], with_shares(table.set_column(0, name, values.take(table["key"])))))
        return pa.concat_tables(tables)


@dataclass(frozen=True)
class AppliedCapacity:
    """Capacity enforced on a trace at one setting; ``sites`` by site number. Tables start with site, layer, stack."""

    trace: Trace
    sites: Mapping[int, Overflow]

    def kept(self, layer: int) -> np.ndarray:
        """bool [tokens, k]: True where the assignment is executed; False where it is dropped or there is none."""
        return self.sites[layer].kept

    def dropped(self, layer: int) -> np.ndarray:
        """bool [tokens, k]: chosen by the router and executed by no expert."""
        return self.sites[layer].dropped

    def by_layer(self) -> pa.Table:
        """One row per site: the totals of Overflow.total, with shares."""
        return self._tables(lambda layer, over: with_shares(pa.Table.from_pylist([over.total()])))

    def by_expert(self) -> pa.Table:
        """One row per site and expert: assignments, dropped, kept, slots, idle, gate mass and what of it is lost."""
        return self._tables(lambda layer, over: with_shares(over.by_expert()))

    def by_label(self) -> pa.Table:
        """One row per site and label; unlabelled documents share the label null."""
        return self._by("label", capacity_keys.labels)

    def by_position(self, width: int | None = None) -> pa.Table:
        """One row per site and bin of positions in the document: ``width`` positions each, or doubling (1, 2, 4, ...)."""
        if width is not None and width < 1:
            raise CapacityError(f"bins of {width} positions have no meaning: give at least 1")
        return self._by("first_position", partial(capacity_keys.positions, width=width))

    def by_document(self) -> pa.Table:
        """One row per site and document."""
        return self._by("document", capacity_keys.documents)

    def by_token(self) -> pa.Table:
        """One row per site and token id. Needs recorded tokens."""
        return self._by("token_id", capacity_keys.token_ids)

    def summary(self) -> dict[str, float]:
        """Sums over the sites and their shares: the row for "all layers". A token counts once for every site it passes."""
        rows = self.by_layer()
        return with_shares(_summed(rows, [])).to_pylist()[0]

    def cost(self, shape: ExpertShape | None = None, devices: int = 1) -> pa.Table:
        """One row per site: SlotCost for the model's expert (``expert_shape``) or for ``shape``."""
        return slot_costs(self.trace, self.sites, shape, devices)

    def _tables(self, make: Callable[[LayerInfo, Overflow], pa.Table]) -> pa.Table:
        return pa.concat_tables([_of_site(self.trace.layers[i], make(self.trace.layers[i], over)) for i, over in self.sites.items()])

    def _by(self, name: str, keys: Callable[[Trace, str], capacity_keys.Keys]) -> pa.Table:
        found = {stream: keys(self.trace, stream) for stream in {self.trace.layers[i].stream for i in self.sites}}

        def make(layer: LayerInfo, over: Overflow) -> pa.Table:
            codes, values = found[layer.stream]
            return with_shares(over.by(codes, len(values)).add_column(0, name, values))

        return self._tables(make)


def apply_capacity(trace: Trace, factor: float = 1.25, policy: str = "position", scope: str = "document", *, size: int | None = None,
                   mixed: int | None = None, preset: str | CapacityRule = "megatron", slots: int | None = None, seed: int = 0,
                   block: int = BLOCK, layers: Sequence[int] | None = None) -> AppliedCapacity:  # fmt: skip
    """Enforce expert capacity on a recorded run. ``layers`` are site numbers, by default all.

    factor, preset   the capacity (slots.PRESETS, or a rule of ``slots.capacity_rule``); ``slots`` sets it outright
    policy, seed     who is served first (policies.py); seed for "random"
    scope, size, mixed  which tokens are routed together (``slots.make_batches``)
    Raises CapacityError for a setting without meaning, and TraceError for a run of statistics alone.
    """
    return rank_trace(trace, policy, scope, size=size, mixed=mixed, seed=seed, layers=layers).at(factor, preset, slots=slots, block=block)


def rank_trace(trace: Trace, policy: str = "position", scope: str = "document", *, size: int | None = None, mixed: int | None = None,
               seed: int = 0, layers: Sequence[int] | None = None, tell: Callable[[int, int], None] | None = None) -> RankedTrace:  # fmt: skip
    """Rank the sites ``layers`` (default all) of a trace once; arguments as for ``apply_capacity``.

    ``tell`` is told (tokens read, tokens in all) of the first site, and may raise to stop.
    """
    sites = _sites(trace, policy, scope, size, [mixed], seed, layers, tell)
    return RankedTrace(trace, {i: rank_site(*site, preference=_preference(trace, i, policy), **more) for i, _, site, more in sites})


def capacity_curves(trace: Trace, factors: Sequence[float] | np.ndarray = FACTORS, policy: str = "position", scope: str = "document", *,
                    size: int | None = None, mixed: int | None = None, preset: str | CapacityRule = "megatron", seed: int = 0,
                    layers: Sequence[int] | None = None) -> pa.Table:  # fmt: skip
    """One row per site and factor: Curve.columns with shares, and what overflows by chance (uniform routing, same batches). Other
    arguments as for ``apply_capacity``; holds one site at a time."""
    found = site_curves(trace, factors, policy, scope, size=size, mixed=mixed, preset=preset, seed=seed, layers=layers)
    return pa.concat_tables([table for _, table in found])


def site_curves(trace: Trace, factors: Sequence[float] | np.ndarray = FACTORS, policy: str = "position", scope: str = "document", *,
                size: int | None = None, mixed: int | None = None, preset: str | CapacityRule = "megatron", seed: int = 0,
                layers: Sequence[int] | None = None) -> Iterator[tuple[int, pa.Table]]:  # fmt: skip
    """(site, its rows of ``capacity_curves``), one site after the other."""
    curves = _curves(trace, factors, policy, scope, size, [mixed], rule_of(preset), seed, layers)
    return ((i, table) for i, _, table in curves)


def shuffled_curves(trace: Trace, shuffles: Sequence[int | None], factors: Sequence[float] | np.ndarray = FACTORS, policy: str = "position",
                    scope: str = "documents", *, size: int | None = None, preset: str | CapacityRule = "megatron", seed: int = 0,
                    layers: Sequence[int] | None = None) -> Iterator[tuple[int, pa.Table]]:  # fmt: skip
    """(site, its rows of ``capacity_curves`` for each ``mixed`` of ``shuffles``, told apart by the column shuffle); read once."""
    tables = _curves(trace, factors, policy, scope, size, shuffles, rule_of(preset), seed, layers)
    for site, mine in groupby(tables, lambda found: found[0]):
        each = [t.append_column("shuffle", pa.array([m] * len(t), pa.int32())) for _, m, t in mine]
        yield site, pa.concat_tables(each).combine_chunks()


def compare_policies(trace: Trace, factor: float = 1.25, scope: str = "document", *, policies: Sequence[str] = POLICIES,
                     size: int | None = None, mixed: int | None = None, preset: str | CapacityRule = "megatron", seed: int = 0,
                     layers: Sequence[int] | None = None) -> pa.Table:  # fmt: skip
    """One row per policy: AppliedCapacity.summary, and why a policy cannot be answered for this run (null where it can). Read once."""
    found: dict[str, list[pa.Table]] = {policy: [] for policy in policies}
    unanswered: dict[str, str] = {}
    for i, _, site, more in _sites(trace, "position", scope, size, [mixed], seed, layers):
        for policy in (p for p in found if p not in unanswered):
            try:
                found[policy].append(_policy_total(trace, i, (*site[:4], policy), more, factor, rule_of(preset)))
            except MissingScores as error:
                unanswered[policy] = str(error)
    rows = [{"policy": p, **(with_shares(_summed(pa.concat_tables(t), [])).to_pylist()[0] if p not in unanswered else {}),
             "unanswered": unanswered.get(p)} for p, t in found.items()]  # fmt: skip
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "unanswered")) + ["unanswered"]
    return pa.table({name: [row.get(name) for row in rows] for name in columns})


def _policy_total(trace: Trace, i: int, site: _Site, more: Mapping[str, Any], factor: float, rule: CapacityRule) -> pa.Table:
    """One row: Overflow.total of a site, without ranks in memory where the policy has thresholds."""
    if (policy := site[4]) in ("reroute", "dropless"):
        ranked = rank_site(*site, preference=_preference(trace, i, policy), **more)
        return pa.Table.from_pylist([ranked.at(factor, rule).total()])
    columns = site_curve(*site, [factor], rule, **more).columns()
    return pa.table({**columns, "rerouted": np.zeros(1, np.int64)})


def pool_curves(curves: pa.Table, by: str = "factor") -> pa.Table:
    """Sums over the sites of ``capacity_curves``: one row per factor (or another column), with shares."""
    return with_shares(_summed(curves, [by]))


def with_shares(table: pa.Table) -> pa.Table:
    """The table with every share of SHARES whose two columns it has: 0 to 1, NaN where there is nothing to share."""
    columns = dict(zip(table.column_names, table.columns, strict=True))
    named = {c for _, part, whole in SHARES for c in (part, whole)} & columns.keys()
    return pa.table({**columns, **{n: v for n, v in _shares({c: columns[c].to_numpy() for c in named}).items() if n not in columns}})


def _shares(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {}
    for name, part, whole in SHARES:
        if part in columns and whole in columns:
            top, bottom = columns[part].astype(np.float64), columns[whole].astype(np.float64)
            out[name] = np.divide(top, bottom, out=np.full(len(bottom), np.nan), where=bottom != 0)
    return out


def curve_table(layer: LayerInfo, columns: Mapping[str, np.ndarray], chance: np.ndarray) -> pa.Table:
    """One row per factor: the site, ``columns`` of its curve, what ``chance`` (a share) would drop, and the shares."""
    every = {**_place(layer, len(chance)), **columns, "chance_dropped": chance * columns["assignments"]}
    return pa.table({**every, **_shares(every)})


def slot_costs(trace: Trace, sites: Mapping[int, SlotUse], shape: ExpertShape | None = None, devices: int = 1) -> pa.Table:
    """AppliedCapacity.cost of sites whose slots alone are known."""
    shape = expert_shape(trace.model) if shape is None else shape
    costs = {i: asdict(slot_cost(int(use.capacity.sum()), int(use.kept_load.sum()), shape, devices)) for i, use in sites.items()}
    return pa.concat_tables([_of_site(trace.layers[i], pa.Table.from_pylist([cost])) for i, cost in costs.items()])


def expert_shape(model: ModelCard) -> ExpertShape:
    """The model's expert from its card: the parameters a token leaves idle, over the experts it leaves idle.

    Raises CapacityError where they do not divide evenly (sites with unlike experts, or a card without counts).
    """
    idle = sum(layer.n_experts - layer.top_k for layer in model.layers)
    parameters = model.parameters - model.active_parameters
    if idle < 1 or parameters < 1 or parameters % idle or model.dtype not in _BYTES:
        raise CapacityError(f"the size of one expert of {model.name!r} does not follow from its card: give an ExpertShape")
    return ExpertShape(model.hidden_size, parameters // idle, _BYTES[model.dtype])


def _sites(trace: Trace, policy: str, scope: str, size: int | None, shuffles: Sequence[int | None], seed: int,
           layers: Sequence[int] | None, tell: Callable[[int, int], None] | None = None) -> Iterator[tuple[int, int | None, _Site, dict[str, Any]]]:  # fmt: skip
    """(site, shuffle, the first arguments of ``rank_site``, others of it), site by site; each site is read once."""
    chosen, batches = range(len(trace.layers)) if layers is None else layers, dict[tuple[str, int | None], Batches]()
    if not len(chosen):
        raise CapacityError("no layer is chosen: give at least one site number")
    with ThreadPoolExecutor(1) as pool:  # the next site is read while this one is ranked
        routing = trace.routing(chosen[0]) if tell is None else _told(trace, chosen[0], tell)
        for i, following in zip(chosen, [*chosen[1:], None], strict=True):
            ahead = None if following is None else pool.submit(trace.routing, following)
            layer = trace.layers[i]
            known = routing.chosen is routing.experts or bool((routing.chosen == routing.experts).all())
            for mixed in shuffles:
                if (same := (layer.stream, mixed)) not in batches:
                    batches[same] = batches_of(trace, layer.stream, scope, size, mixed)
                site = routing.chosen, routing.weights, layer.n_experts, batches[same], policy
                yield i, mixed, site, {"n_special": layer.n_special, "seed": [seed, i], "weights_known": known}
            routing = routing if ahead is None else ahead.result()


def _told(trace: Trace, site: int, tell: Callable[[int, int], None]) -> SiteRouting:
    """Trace.routing, read in pieces that are told of; at once where executed and chosen may differ, or there is one piece."""
    n = trace.n_tokens(trace.layers[site].stream)
    if n <= PIECE or any(x.native_capacity is not None for x in trace.layers):
        return trace.routing(site)
    first = trace.routing(site, 0, PIECE)
    experts, weights = np.empty((n, first.experts.shape[1]), first.experts.dtype), None
    if first.weights is not None:
        weights = np.empty(experts.shape, np.float32)
    for start in range(0, n, PIECE):
        piece, stop = trace.routing(site, start, min(start + PIECE, n)) if start else first, min(start + PIECE, n)
        experts[start:stop] = piece.experts
        if weights is not None:
            weights[start:stop] = gate_weights(piece, f"run {trace.name!r}")
        tell(stop, n)
    return SiteRouting(experts, weights, experts)


def check_policy(trace: Trace, site: int, policy: str) -> None:
    """Raise MissingScores, as ranking the site would, where the run did not record what the policy orders by; reads one token.

    Of a model with native capacity it does not tell: which gate weights are missing there only all decisions say.
    """
    layer, token = trace.layers[site], trace.routing(site, 0, min(1, trace.n_tokens(trace.layers[site].stream)))
    scores = trace.scores(site, 0, len(token.experts)).probabilities if policy == "reroute" else None
    rank_site(
        token.chosen,
        token.weights,
        layer.n_experts,
        make_batches([len(token.experts)]),
        policy,
        n_special=layer.n_special,
        preference=scores,
    )


def _preference(trace: Trace, site: int, policy: str) -> np.ndarray | None:
    return trace.scores(site).probabilities if policy == "reroute" else None


def _curves(trace: Trace, factors: Sequence[float] | np.ndarray, policy: str, scope: str, size: int | None, shuffles: Sequence[int | None],
            rule: CapacityRule, seed: int, layers: Sequence[int] | None) -> Iterator[tuple[int, int | None, pa.Table]]:  # fmt: skip
    chances: dict[tuple[str, int, int, int, int | None], np.ndarray] = {}
    for i, mixed, site, more in _sites(trace, policy, scope, size, shuffles, seed, layers):
        layer, batches, curve = trace.layers[i], site[3], site_curve(*site, factors, rule, **more)
        same = (layer.stream, layer.n_experts, layer.top_k, layer.n_special, mixed)
        if same not in chances:
            chances[same] = chance_curve(batches.sizes, *same[1:3], curve.factors, rule, layer.n_special)
        yield i, mixed, curve_table(layer, curve.columns(), chances[same])


def rule_of(preset: str | CapacityRule) -> CapacityRule:
    """The rule itself, or that of a preset."""
    return preset if isinstance(preset, CapacityRule) else capacity_rule(preset)


def _of_site(layer: LayerInfo, table: pa.Table) -> pa.Table:
    return pa.table({**_place(layer, len(table)), **dict(zip(table.column_names, table.columns, strict=True))})


def _place(layer: LayerInfo, n: int) -> dict[str, np.ndarray | pa.Array]:
    """The columns that say of which site n rows are."""
    return {"site": np.full(n, layer.index, np.int16), "layer": np.full(n, layer.layer, np.int32), "stack": pa.repeat(layer.stack, n)}


def _summed(table: pa.Table, keys: list[str]) -> pa.Table:
    columns = [c for c in table.column_names if c in ADDITIVE]
    out = table.group_by(keys, use_threads=False).aggregate([(c, "sum") for c in columns])
    out = out.rename_columns([c.removesuffix("_sum") for c in out.column_names])
    return out.sort_by([(k, "ascending") for k in keys]) if keys else out  # Arrow's groups come in the order of its hash table
