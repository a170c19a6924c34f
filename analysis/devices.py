"""Expert parallelism: the longest queue of a device, from the loads of a run's batches.

A site's E experts stand on D devices, which all wait for the one with most assignments. Placement is the default of vLLM,
DeepSpeed and Megatron: experts in order of their number, E / D on each. No replicas; shared experts run everywhere and are not counted.
"""

from __future__ import annotations

from functools import lru_cache
from math import comb

import numpy as np
import pyarrow as pa

from .stability import batch_loads, of_each
from .trace import Trace


def device_loads(load: np.ndarray, devices: int) -> np.ndarray:
    """int64 [..., D]: assignments per device of ``load`` int64 [..., E]. Raises ValueError where ``devices`` does not divide E."""
    experts = load.shape[-1]
    if devices < 1 or experts % devices:
        raise ValueError(f"{experts} experts cannot be shared out evenly over {devices} devices: give a divisor of {experts}")
    return load.reshape(*load.shape[:-1], devices, experts // devices).sum(-1)


@lru_cache(maxsize=16_384)  # layers are alike, and so are their batches
def chance_longest_queue(tokens: int, n_experts: int, n_classes: int, top_k: int, devices: int) -> float:
    """Upper bound of the expected load of the busiest device over the mean, when every token picks ``top_k`` of ``n_classes`` uniformly.

    One token sends Hypergeometric(n_classes, E / D, k) assignments to a device, whose load X is the sum over tokens; E[max] <= sum over
    t of min(1, D P(X > t)) as in balance.chance_max_over_mean, which it equals where D = E = n_classes. The distribution of X is the
    T-th power of the characteristic function, taken modulo a window beyond which the tails are below 1e-16: time and memory grow with
    sqrt(T). NaN for no tokens; 1 for one device.
    """
    held = n_experts // devices
    mean = tokens * top_k * held / n_classes
    if devices == 1 or not tokens or top_k == n_classes:
        return 1.0 if tokens else float("nan")
    one = np.array([comb(held, h) * comb(n_classes - held, top_k - h) / comb(n_classes, top_k) for h in range(min(top_k, held) + 1)])
    variance = mean * (1 - held / n_classes) * (n_classes - top_k) / (n_classes - 1)
    reach = int(14 * np.sqrt(variance) + 40) + len(one)
    low, size = max(0, int(mean) - reach), 2 * reach + 2
    mass = np.roll(np.fft.irfft(np.fft.rfft(one, size) ** tokens, size), -(low % size)).clip(0)
    above = np.append(np.cumsum(mass[::-1])[::-1][1:], 0)
    return float((low + np.minimum(1, devices * above).sum()) / mean)


def queue_batches(trace: Trace, site: int, devices: int, batch_tokens: int = 1, mixed: int | None = None) -> pa.Table:
    """Longest device queue of every batch of ``stability.batch_loads``: batch (from 1), n (tokens), queue, experts, chance.

    queue is the load of the busiest device over the mean of the devices, 1 to D; its inverse is EPLB's balancedness. experts is the same of
    single experts, 1 to E; chance ``chance_longest_queue`` of so many tokens. Raises ValueError as ``device_loads``.
    """
    layer = trace.layers[site]
    n, loads = batch_loads(trace, site, batch_tokens, mixed)
    queue, experts = (x.max(1) / x.mean(1) for x in (device_loads(loads, devices), loads))
    chance = of_each(n, chance_longest_queue, layer.n_experts, layer.n_classes, layer.top_k, devices)
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
