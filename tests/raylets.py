"""A Ray cluster of two nodes on the loopback address, as test_cluster.py and faults/test_cluster_kill.py use it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import tiny

LOOPBACK = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "node_ip_address": "127.0.0.1", "include_dashboard": False}


@contextmanager
def two_nodes() -> Iterator[str]:
    """Address of a cluster of two raylets with one CPU each; this process is connected to it."""
    # Ray replaces a loopback address by the machine's own unless clusters are off, as they are on other systems than Linux.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled"}
    import ray
    from ray.cluster_utils import Cluster

    nodes: Any = Cluster(initialize_head=True, head_node_args=LOOPBACK)
    try:
        nodes.add_node(**LOOPBACK)
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        yield nodes.address
    finally:
        ray.shutdown()
        nodes.shutdown()


def saved(folder: Path, family: str = "olmoe") -> Path:
    """A small model with its tokenizer, in ``folder``."""
    tiny.build(family).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def documents(n: int, length: int = 40) -> list[str]:
    """Texts of differing lengths."""
    return [f"{i:04d} " + "x y z"[: 1 + i % 5] * (length // 4 + i % 7) for i in range(n)]
