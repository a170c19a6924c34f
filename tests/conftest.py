"""Fixtures shared by the suite. Models are small and random; one thread, so that busy cores cannot stall OpenMP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "real"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real() -> Path:
    """Real routing data beside the project; skips where it is absent."""
    if not REAL.is_dir():
        pytest.skip("no real routing data beside this checkout (../shared/real)")
    return REAL


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, one for each file of tests; a statement about a page may take half a minute on a busy machine."""
    from playwright.sync_api import expect

    from .browser.served import chromium

    expect.set_options(timeout=30_000)
    with chromium() as it:
        yield it
