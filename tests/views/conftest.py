from pathlib import Path

import pytest

from .pages import ROOT


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROUTERSCOPE_RUNS", str(tmp_path))
    monkeypatch.chdir(ROOT)
    return tmp_path
