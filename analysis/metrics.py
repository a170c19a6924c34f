"""The table of metrics: what each is, its range, what chance would give, where it comes from. One entry adds one.

A metric maps a Trace to a pyarrow.Table with one row per site: ``site``, ``layer``, ``n`` (tokens) and ``value``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from . import balance
from .information import information_given, sparse_information, table_information
from .longtables import LongTable
from .stability import batch_maxvio, maxvio_batches
from .stats import Statistics
from .trace import LayerInfo, Trace

CORRECTION = 1 / (2 * float(np.log(2)))  # bits; Miller and Madow's correction never moves an estimate further


@dataclass(frozen=True)
class Bound:
    """The largest value of a metric: in words, and at a layer."""

    text: str
    at: Callable[[LayerInfo], float]

    def __call__(self, layer: LayerInfo) -> float:
        return self.at(layer)


@dataclass(frozen=True)
class Metric:
    """One number per site, in ``unit``. ``low`` and ``high`` bound it (high may depend on E); ``chance`` says what
    uniform random routing gives, ``level`` computes it for a site (None: it is a chance value itself). NaN where a site saw
    nothing the metric could be made of: that takes ``needs``.
    """

    name: str
    title: str
    definition: str
    unit: str
    low: float
    high: Bound
    chance: str
    source: str
    function: Callable[[Trace, int], float]
    level: Callable[[Trace, int], float] | None = None
    needs: str = "an assignment"

    def chance_level(self, trace: Trace) -> np.ndarray:
        """float64 [sites]: what uniform random routing gives, as ``chance`` says; NaN where it is no number."""
        return np.array([np.nan if self.level is None else self.level(trace, x.index) for x in trace.layers])

    def chance_here(self, trace: Trace) -> str:
        """``chance`` and its value at the layers of this run, from least to most."""
        level = self.chance_level(trace)
        known = level[np.isfinite(level)]
        if not len(known):
            return self.chance
        low, high = (f"{x:,.4g}" if x >= 1e-4 or x == 0 else "below 0.0001" for x in (known.min(), known.max()))
        return f"{self.chance}; here {low if low == high else f'{low} to {high}'}"

    @property
    def range(self) -> str:
        """Such as "0 to E - 1"."""
        return f"{self.low:.3g} to {self.high.text}"

    def __call__(self, trace: Trace) -> pa.Table:
        """One row per site: site, layer, n (tokens), value."""
        layers = trace.layers
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # those of the long tables read and count without Python's lock
            values = list(pool.map(lambda x: self.function(trace, x.index), layers))
        return pa.table(
            {
                "site": pa.array([x.index for x in layers], pa.int16()),
                "layer": pa.array([x.layer for x in layers], pa.int32()),
                "n": pa.array([trace.stats.n_tokens(x.index) for x in layers], pa.int64()),
                "value": pa.array(values, pa.float64()),
            }
        )


def _of_load(function: Callable[[np.ndarray], float], trace: Trace, site: int) -> float:
    return function(trace.stats.load(site)[: trace.layers[site].n_experts])


def _auxiliary(trace: Trace, site: int) -> float:
    n = trace.layers[site].n_experts
    return balance.switch_auxiliary_loss(trace.stats.load(site)[:n], trace.stats.probability_sum(site)[:n])


def _chance(function: Callable[[int, int, int], float], trace: Trace, site: int) -> float:
    layer = trace.layers[site]
    return function(trace.stats.n_tokens(site), layer.n_classes, layer.top_k)


def _of_experts(function: Callable[[int, int, int], float], trace: Trace, site: int) -> float:
    """Expected number of experts among all classes, of which some may have no weights."""
    return _chance(function, trace, site) * trace.layers[site].n_experts / trace.layers[site].n_classes


def _of_cv(function: Callable[[int, float], float], trace: Trace, site: int) -> float:
    """A level that follows from E and the CV by chance where that is small; NaN from 0.5 on, where the series is no longer good."""
    spread = _chance(balance.chance_cv, trace, site)
    return function(trace.layers[site].n_experts, spread) if spread < 0.5 else float("nan")


def _of_max(function: Callable[[float], float], trace: Trace, site: int) -> float:
    return function(_chance(balance.chance_max_over_mean, trace, site))


def _documents_by_chance(trace: Trace, site: int) -> float:
    chance = maxvio_batches(trace, site)["chance"].to_numpy()
    return float(chance.mean()) if len(chance) else float("nan")


def _fixed(function: Callable[[LayerInfo], float], trace: Trace, site: int) -> float:
    return function(trace.layers[site])


def _mean(statistic: str, trace: Trace, site: int) -> float:
    return trace.stats.mean(statistic, site)


def _label_information(trace: Trace, site: int) -> float:
    return table_information(trace.stats.label_load(site)[1])[1]


def _token_information(trace: Trace, site: int) -> float:
    """Where every token has its k experts, the sums over experts are those of any site of the stream with that k: only counts are read."""
    stats, layer = trace.stats, trace.layers[site]
    like = next(x.index for x in trace.layers if (x.stream, x.top_k) == (layer.stream, layer.top_k))
    if isinstance(stats.token_rows, LongTable) and all(stats.load(i).sum() == stats.n_tokens(i) * layer.top_k > 0 for i in (like, site)):
        counts = stats.token_rows.counts("site", site, int(stats.load(site).sum()))
        return information_given(_token_sums(stats, like), stats.load(site).astype(np.float64), counts)[1]
    ids, each, experts, counts = stats.token_load_by_id(site)
    return sparse_information(np.repeat(np.arange(len(ids)), each), experts, counts)[1]


@lru_cache(maxsize=8)
def _token_sums(stats: Statistics, site: int) -> np.ndarray:
    """float64 [token ids that occur]: assignments of each at a site of a stored run, whose files do not change."""
    _, each, _, counts = stats.token_load_by_id(site)
    return np.add.reduceat(counts, np.cumsum(each) - each).astype(np.float64)


_BITS = Bound("log2 E + 0.721", lambda x: float(np.log2(x.n_classes)) + CORRECTION)
_EXPERTS = Bound("E", lambda x: float(x.n_experts))
_ALL_BUT_ONE = Bound("E - 1", lambda x: x.n_experts - 1.0)
_ONE = Bound("1", lambda x: 1.0)
_UNBOUNDED = Bound("infinity", lambda x: float("inf"))

_ENTRIES = (
    Metric("max_over_mean", "Max / mean", "largest expert load over the mean load", "ratio", 1, _EXPERTS,
           "at most the max / mean by chance", "common; EPLB's inverse", partial(_of_load, balance.max_over_mean),
           partial(_of_max, lambda x: x)),
    Metric("maxvio", "MaxVio", "(largest load - mean) / mean, over the whole run", "ratio", 0, _ALL_BUT_ONE,
           "at most the max / mean by chance, less 1", "arXiv 2408.15664", partial(_of_load, balance.maxvio), partial(_of_max, lambda x: x - 1)),
    Metric("document_maxvio", "MaxVio per document", "(largest load - mean) / mean of each document, averaged over documents",
           "ratio", 0, _ALL_BUT_ONE, "at most the max / mean by chance at one document's length, less 1; far above the run's",
           "arXiv 2408.15664, batch form", batch_maxvio, _documents_by_chance, "a document with an assignment"),
    Metric("chance_max_over_mean", "Max / mean by chance",
           "upper bound of max / mean expected under uniform random routing without capacity", "ratio", 1, _UNBOUNDED,
           "is the chance value", "union bound over E loads, each Binomial(T, k/E)",
           partial(_chance, balance.chance_max_over_mean)),
    Metric("cv", "CV", "population standard deviation of the loads over their mean", "ratio", 0,
           Bound("sqrt(E - 1)", lambda x: float(np.sqrt(x.n_experts - 1))), "the CV by chance", "Shazeer et al. 2017 (squared there)",
           partial(_of_load, balance.cv), partial(_chance, balance.chance_cv)),
    Metric("chance_cv", "CV by chance", "sqrt((1 - k/E) / (T k/E)): root mean square CV under uniform random routing", "ratio",
           0, _UNBOUNDED, "is the chance value", "each load Binomial(T, k/E)", partial(_chance, balance.chance_cv)),
    Metric("gini", "Gini", "mean absolute difference of the loads over twice their mean", "1", 0,
           Bound("1 - 1/E", lambda x: 1 - 1 / x.n_experts), "about 0.56 times the CV by chance", "Gini 1912", partial(_of_load, balance.gini),
           partial(_of_cv, lambda _, c: c / float(np.sqrt(np.pi)))),
    Metric("entropy", "Load entropy", "-sum p ln p of the load shares p", "nats", 0, Bound("ln E", lambda x: float(np.log(x.n_experts))),
           "about ln E less half the squared CV by chance", "Shannon 1948", partial(_of_load, balance.entropy),
           partial(_of_cv, lambda n, c: float(np.log(n)) - c**2 / 2)),
    Metric("normalised_entropy", "Normalised entropy", "load entropy over ln E; even = 1", "1", 0, _ONE,
           "about 1 less the squared CV by chance over 2 ln E", "Shannon 1948", partial(_of_load, balance.normalised_entropy),
           partial(_of_cv, lambda n, c: 1 - c**2 / (2 * float(np.log(n))) if n > 1 else 1.0)),
    Metric("effective_experts", "Effective experts", "exp of the load entropy: evenly used experts with the same entropy",
           "experts", 1, _EXPERTS, "about E less E / 2 times the squared CV by chance", "Hill number of order 1",
           partial(_of_load, balance.effective_experts), partial(_of_cv, lambda n, c: n * (1 - c**2 / 2))),
    Metric("balancedness", "Balancedness", "mean load over largest load", "ratio", 0, _ONE,
           "at least 1 over the max / mean by chance", "EPLB, SGLang", partial(_of_load, balance.balancedness), partial(_of_max, lambda x: 1 / x)),
    Metric("dead", "Dead experts", "experts with no assignment in this run", "experts", 0, _ALL_BUT_ONE,
           "E (1 - k/E)^T, nearly 0 for long runs", "common", partial(_of_load, balance.dead),
           partial(_of_experts, balance.chance_dead)),
    Metric("cold", "Cold experts", "experts below a tenth of the mean load, dead ones included", "experts", 0,
           _ALL_BUT_ONE, "E times the chance of a load below a tenth of the mean, nearly 0 for long runs", "common", partial(_of_load, balance.cold),
           partial(_of_experts, balance.chance_cold)),
    Metric("auxiliary_loss", "Switch auxiliary loss", "E sum f_e P_e: load share times mean router probability; even = 1", "1",
           0, _EXPERTS, "1", "Switch Transformers eq. 4, alpha = 1", _auxiliary, partial(_fixed, lambda _: 1.0), "the router's probabilities"),
    Metric("router_entropy", "Router entropy", "mean entropy of a token's router probabilities", "nats", 0,
           Bound("ln E", lambda x: float(np.log(x.n_classes))), "ln E for an undecided router", "Shannon 1948", partial(_mean, "entropy"),
           partial(_fixed, lambda x: float(np.log(x.n_classes))), "the router's scores"),
    Metric("z_loss", "z-loss", "mean squared logsumexp of the router logits", "nats^2", 0, _UNBOUNDED,
           "(ln E)^2 for zero logits", "ST-MoE, arXiv 2202.08906", partial(_mean, "z"),
           partial(_fixed, lambda x: float(np.log(x.n_classes)) ** 2), "the router's scores"),
    Metric("label_information", "Label information",
           "I(expert; label) over assignments, less Miller and Madow's bias: bits that an assignment tells about the text's label;"
           " before that at most log2(E / k) where every token has k experts",
           "bits", -CORRECTION, _BITS, "0 for independent draws; documents differ, so more: the Specialization page shuffles labels over documents",
           "Shannon 1948; Miller 1955", _label_information, partial(_fixed, lambda _: float("nan")), "labels"),
    Metric("token_information", "Token information",
           "I(expert; token id) over assignments, less Miller and Madow's bias: bits of routing that the token id alone explains;"
           " before that at most log2(E / k) where every token has k experts",
           "bits", -CORRECTION, _BITS, "0 with many tokens per id; rare ids add some: the Specialization page deals assignments to tokens at random",
           "OpenMoE, arXiv 2402.01739; Miller 1955", _token_information, partial(_fixed, lambda _: float("nan"))),
)  # fmt: skip

METRICS: Mapping[str, Metric] = MappingProxyType({m.name: m for m in _ENTRIES})


def balance_table(trace: Trace) -> pa.Table:
    """One row per site with every metric as a column: site, layer, stack, n, then the metrics by name."""
    first = next(iter(METRICS.values()))(trace).select(["site", "layer", "n"])
    table = first.add_column(2, "stack", pa.array([x.stack for x in trace.layers]))
    for name, metric in METRICS.items():
        table = table.append_column(name, metric(trace)["value"])
    return table


def percentiles(values: np.ndarray) -> dict[str, float]:
    """min, p10, median, p90, max over layers, NaN left out: layers are compared, never pooled."""
    known = values[np.isfinite(values)]
    names = {"min": 0, "p10": 10, "median": 50, "p90": 90, "max": 100}
    return {name: float(np.percentile(known, at)) if len(known) else float("nan") for name, at in names.items()}


def percentile_table(trace: Trace, table: pa.Table | None = None) -> pa.Table:
    """One row per metric: metric, n (sites), min, p10, median, p90, max over the sites, chance (median over sites). Experts are never pooled.

    ``table`` is ``balance_table(trace)`` where it is at hand.
    """
    table = balance_table(trace) if table is None else table
    rows = []
    for name, metric in METRICS.items():
        values, chance = table[name].to_numpy(), percentiles(metric.chance_level(trace))["median"]
        rows.append({"metric": name, "n": int(np.isfinite(values).sum()), **percentiles(values), "chance": chance})
    return pa.Table.from_pylist(rows)


def load_table(trace: Trace) -> pa.Table:
    """One row per site and class: assignments, share, relative (1 = even), gate_mass, first_choices, n (tokens), special.

    Classes are the experts and, from id E on, those without weights (``special``): ``share`` is of all assignments,
    ``relative`` is to the mean load of the experts, as every balance metric takes it.
    """
    rows = []
    for layer in trace.layers:
        stats, site = trace.stats, layer.index
        load = stats.load(site)
        total, even = load.sum(), load[: layer.n_experts].mean()
        rows.append(
            pa.table(
                {
                    "site": pa.array(np.full(len(load), site, np.int16)),
                    "layer": pa.array(np.full(len(load), layer.layer, np.int32)),
                    "stack": pa.array([layer.stack] * len(load)),
                    "expert": pa.array(np.arange(len(load), dtype=np.int32)),
                    "assignments": pa.array(load),
                    "share": pa.array(load / total if total else np.full(len(load), np.nan)),
                    "relative": pa.array(load / even if even else np.full(len(load), np.nan)),
                    "gate_mass": pa.array(stats.gate_mass(site)),
                    "first_choices": pa.array(stats.first_choice_load(site)),
                    "n": pa.array(np.full(len(load), stats.n_tokens(site), np.int64)),
                    "special": pa.array(np.arange(len(load)) >= layer.n_experts),
                }
            )
        )
    return pa.concat_tables(rows)
