"""Expert parallelism: the longest queue of a device, from the loads of a run's batches.

A site's E experts stand on D devices, which all wait for the one with most assignments. Placement is the default of vLLM,
DeepSpeed and Megatron: experts in order of their number, E / D on each. No replicas; shared experts run everywhere and are not counted.
"""

from __future__ import annotations

from math import comb

import numpy as np
import pyarrow as pa

from .stability import batch_loads, of_each
from .trace import Trace

WINDOWS = 1 << 17  # loads looked at in one go: 1 MiB of float64


def device_loads(load: np.ndarray, devices: int) -> np.ndarray:
    """int64 [..., D]: assignments per device of ``load`` int64 [..., E]. Raises ValueError where ``devices`` does not divide E."""
    experts = load.shape[-1]
    if devices < 1 or experts % devices:
        raise ValueError(f"{experts} experts cannot be shared out evenly over {devices} devices: give a divisor of {experts}")
    return load.reshape(*load.shape[:-1], devices, experts // devices).sum(-1)


def chance_longest_queues(tokens: np.ndarray, n_experts: int, n_classes: int, top_k: int, devices: int) -> np.ndarray:
    """float64 [n]: upper bound of the expected load of the busiest device over the mean, when each of ``tokens`` int64 [n] picks ``top_k``
    of ``n_classes`` uniformly.

    One token sends Hypergeometric(n_classes, E / D, k) assignments to a device, whose load X is the sum over tokens; E[max] <= sum over
    t of min(1, D P(X > t)) as in balance.chance_max_over_mean, which it equals where D = E = n_classes. The distribution of X is the
    T-th power of the characteristic function, taken modulo a window beyond which the tails are below 1e-16: time and memory grow with
    sqrt(T). NaN for no tokens; 1 for one device.
    """
    held = n_experts // devices
    out = np.where(tokens > 0, 1.0, np.nan)
    asked = np.flatnonzero(tokens) if devices > 1 and top_k < n_classes else np.zeros(0, np.int64)
    one = np.array([comb(held, h) * comb(n_classes - held, top_k - h) / comb(n_classes, top_k) for h in range(min(top_k, held) + 1)])
    share = held / n_classes
    variance = tokens * top_k * share * (1 - share) * (n_classes - top_k) / max(n_classes - 1, 1)
    reach = (14 * np.sqrt(variance) + 40).astype(np.int64) + len(one)
    sizes = 1 << np.ceil(np.log2(2 * reach + 2)).astype(np.int64)
    for size in np.unique(sizes[asked]).tolist():
        alike, per = asked[sizes[asked] == size], max(1, WINDOWS // size)
        for at in np.split(alike, range(per, len(alike), per)):
            out[at] = _longest(one, int(size), tokens[at], tokens[at] * (top_k * share), reach[at], devices)
    return out


def _longest(one: np.ndarray, size: int, tokens: np.ndarray, mean: np.ndarray, reach: np.ndarray, devices: int) -> np.ndarray:
    """float64 [n]: ``chance_longest_queues`` in windows of ``size`` loads, from ``reach`` below the ``mean``; ``one``: the loads of one token."""
    low = np.maximum(0, mean.astype(np.int64) - reach)
    wave = np.fft.rfft(one, size)
    with np.errstate(divide="ignore"):
        heard = np.flatnonzero(tokens.min() * np.log(np.abs(wave)) > -45)  # 3e-20: what rounding leaves of the others is more
    turned = np.exp(2j * np.pi / size * (low[:, None] * heard % size))  # the window begins at low
    powers = np.zeros((len(tokens), len(wave)), np.complex128)
    powers[:, heard] = wave[heard] ** tokens[:, None] * turned
    mass = np.fft.irfft(powers, size).clip(0)
    above = np.cumsum(mass[:, :0:-1], 1)[:, ::-1]
    return np.asarray((low + np.minimum(1, devices * above).sum(1)) / mean)


def queue_batches(trace: Trace, site: int, devices: int, batch_tokens: int = 1, mixed: int | None = None) -> pa.Table:
    """Longest device queue of every batch of ``stability.batch_loads``: batch (from 1), n (tokens), queue, experts, chance.

    queue is the load of the busiest device over the mean of the devices, 1 to D; its inverse is EPLB's balancedness. experts is the same of
    single experts, 1 to E; chance ``chance_longest_queues`` of so many tokens. Raises ValueError as ``device_loads``.
    """
    layer = trace.layers[site]
    n, loads = batch_loads(trace, site, batch_tokens, mixed)
    queue, experts = (x.max(1) / x.mean(1) for x in (device_loads(loads, devices), loads))
    chance = of_each(n, chance_longest_queues, layer.n_experts, layer.n_classes, layer.top_k, devices)
    return pa.table({"batch": pa.array(np.arange(1, len(n) + 1), pa.int64()), "n": pa.array(n, pa.int64()),
                     **{name: pa.array(x, pa.float64()) for name, x in (("queue", queue), ("experts", experts), ("chance", chance))}})  # fmt: skip


def queue_table(trace: Trace, devices: int, batch_tokens: int = 1, mixed: int | None = None) -> pa.Table:
    """``queue_batches`` of every site whose experts ``devices`` divides: site, devices, batches, batch_n (tokens of a batch, mean),

    least, median, p95, most of queue over batches; balancedness, the mean over batches of 1 / queue; experts (median); chance (mean
    over batches). NaN, and 0 batches, for a site that cannot be cut into batches.
    """
    rows = []
    for layer in trace.layers:
        if layer.n_experts % devices:
            continue
        found = queue_batches(trace, layer.index, devices, batch_tokens, mixed)
        n, queue, experts, chance = (found[c].to_numpy() if len(found) else np.full(1, np.nan) for c in ("n", "queue", "experts", "chance"))
        rows.append({"site": layer.index, "devices": devices, "batches": len(found), "batch_n": float(n.mean()),
                     "least": float(queue.min()), "median": float(np.median(queue)), "p95": float(np.percentile(queue, 95)),
                     "most": float(queue.max()), "balancedness": float((1 / queue).mean()), "experts": float(np.median(experts)),
                     "chance": float(chance.mean())})  # fmt: skip
    return pa.Table.from_pylist(rows)


def device_counts(trace: Trace) -> tuple[list[int], int]:
    """(numbers of devices from 2 on that divide the experts of a site, ascending; the one to begin with: 8 or the largest below)."""
    found = sorted({d for e in {x.n_experts for x in trace.layers} for d in range(2, e + 1) if e % d == 0})
    return found, max((d for d in found if d <= 8), default=found[0] if found else 1)
