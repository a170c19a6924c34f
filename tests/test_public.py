"""The public names: what a notebook may rely on, whatever was imported before, and without torch until it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import analysis

ROOT = Path(__file__).parent.parent
CALLED = "assert callable(capture) and capture.__name__ == 'capture', capture"
# "capture" is both a module and a public function; importing the module must not hide the function.
ORDERS = {
    "name, twice, then module": f"from analysis import capture; {CALLED}\nfrom analysis import capture; {CALLED}\n"
    f"import analysis.capture\nfrom analysis import capture; {CALLED}",
    "module first": f"from analysis.capture import Progress; from analysis import capture; {CALLED}",
    "by attribute": f"import analysis; analysis.load_model; capture = analysis.capture; {CALLED}",
}
WITHOUT_TORCH = {
    "import": "import analysis",
    "open_run": "import analysis; analysis.open_run('data/demo-run').experts(0)",
    "metrics": "from analysis import METRICS, open_run; METRICS['cv'](open_run('data/demo-run'))",
    "dir": "import analysis; dir(analysis)",
    "command line": "from analysis.__main__ import main; main(['stats', 'data/demo-run'])",
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("code", ORDERS.values(), ids=ORDERS)
def test_capture_is_the_function(code: str) -> None:
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", WITHOUT_TORCH.values(), ids=WITHOUT_TORCH)
def test_torch_is_not_imported_by(code: str) -> None:
    done = run(f"import sys\n{code}\nsys.exit(3 if {{'torch', 'transformers'}} & set(sys.modules) else 0)")
    assert done.returncode == 0, done.stderr or "torch was imported"


@pytest.mark.parametrize("name", analysis.__all__)
def test_name_exists_and_is_listed(name: str) -> None:
    assert getattr(analysis, name) is getattr(analysis, name)
    assert name in dir(analysis)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'captures'"):
        _ = analysis.captures


def test_opening_a_run_does_not_import_torch() -> None:
    code = (
        "import sys, analysis; from analysis import open_run, METRICS; t = open_run('data/demo-run');"
        "METRICS['cv'](t); t.experts(0); assert t.tokens.num_rows; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_public_names_and_unknown_ones() -> None:
    import analysis

    assert all(getattr(analysis, name) is not None for name in analysis.__all__)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = analysis.nothing_like_this
