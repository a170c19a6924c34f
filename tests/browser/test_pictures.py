"""The pictures in docs/ show the app as it is: each page is taken again and compared, with a tolerance for fonts and rounding."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser

from .screenshots import PAGES, opened
from .served import served

PICTURES = Path(__file__).parent.parent.parent / "docs" / "pictures"
GRID = (128, 90)  # cells of 10 x 10 pixels: a letter that moves by a pixel does not count, a line or a figure that moves does
CHANGED, ALLOWED = 12, 0.06  # grey levels of 255; share of cells


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("pictures") / "runs") as url:
        yield url


def changed_share(a: Path, b: Path) -> float:
    """Share of the grid's cells that differ visibly."""
    grey = [np.asarray(Image.open(p).convert("L").resize(GRID, Image.Resampling.BOX), float) for p in (a, b)]
    return float((np.abs(grey[0] - grey[1]) > CHANGED).mean())


@pytest.mark.parametrize("name", PAGES)
def test_a_page_looks_like_its_picture(browser: Browser, address: str, name: str, tmp_path: Path) -> None:
    page = opened(browser, address, name)
    for _ in range(10):  # on a busy machine a figure may be drawn seconds after the script has ended
        page.screenshot(path=tmp_path / "now.png")
        if (share := changed_share(tmp_path / "now.png", PICTURES / f"{name}.png")) <= ALLOWED:
            break
        page.wait_for_timeout(1_000)
    page.close()
    assert share <= ALLOWED, f"{share:.1%} of the page changed: look at it, then take the pictures again with `make screenshots`"


def test_the_comparison_tells_every_page_from_every_other() -> None:
    near = [(a, b) for a in PAGES for b in PAGES if a < b and changed_share(PICTURES / f"{a}.png", PICTURES / f"{b}.png") <= ALLOWED]
    assert near == []
