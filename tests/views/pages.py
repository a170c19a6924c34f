"""A page of the app as a test sees it, and runs whose every text is hostile."""

import base64
from pathlib import Path

import numpy as np
from streamlit.testing.v1 import AppTest

from analysis.trace import LayerInfo
from analysis.writing import RunWriter
from tests.nasty import NASTY
from tests.synthetic import card, make_part

ROOT = Path(__file__).parent.parent.parent


def store(folder: Path, layers: tuple[LayerInfo, ...], lengths: list[int]) -> None:
    """A run of random routing where every token, label and name is hostile."""
    with RunWriter.open(folder, card(layers, NASTY[1]), {}) as writer:
        writer.write(make_part(layers, lengths, texts=NASTY, labels=[*NASTY, None], names=NASTY[1:], n_ids=len(NASTY)))
        writer.commit()


def shown(page: str, run: str) -> AppTest:
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
    test.query_params["run"] = run
    test.run()
    if page != "overview":
        test.switch_page(f"views/{page}.py")
        test.run()
    return test


def numbers_of(values: object) -> list[float]:
    """An array of a figure as it is sent: a list, or base64 with its type."""
    return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist() if isinstance(values, dict) else list(values)  # type: ignore[call-overload]
