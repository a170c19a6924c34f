"""Where runs and models come from, as the operator set it: ROUTERSCOPE_RUNS and ROUTERSCOPE_MODELS.

The demo run ships with the project, is listed first, and cannot be deleted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from analysis.checkpoints import ModelError, read_config
from analysis.places import Place
from analysis.store import RunError, RunSummary, list_runs
from analysis.trace import ModelCard

HOME = Path(__file__).resolve().parent.parent
DEMO = "demo-run"


def runs_root() -> Path:
    """The folder of the user's runs; made if missing, readable by its owner alone. RunError for an address, which is not listed."""
    root = Place.of(os.environ.get("ROUTERSCOPE_RUNS") or HOME / "data" / "runs").folder
    if root is None:
        raise RunError("ROUTERSCOPE_RUNS names an address, and the dashboard lists a folder: copy runs to one (python -m analysis copy)")
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root


def allowed_models() -> dict[str, Path]:
    """Name -> folder of the models people may choose: ``name=folder`` pairs separated by semicolons."""
    given = os.environ.get("ROUTERSCOPE_MODELS") or f"demo model={HOME / 'data' / 'demo-model'}"
    pairs = (entry.partition("=") for entry in given.split(";") if "=" in entry)
    return {name.strip(): Path(folder.strip()) for name, _, folder in pairs}


def model_folder(card: ModelCard, digests: Callable[[Path], str]) -> Path | None:
    """The allowed model that a run was recorded with, to the byte; None where it is not on this machine.

    ``digests`` gives the digest of a folder, which takes reading every weight: only models of the card's family are asked.
    """
    for folder in allowed_models().values():
        try:
            same = read_config(folder / "config.json").get("model_type") == card.family
        except ModelError:
            continue
        if same and digests(folder) == card.digest:
            return folder
    return None


def all_runs() -> dict[str, RunSummary]:
    """Finished and unfinished runs by name, the demo run first, then the newest."""
    demo = [r for r in list_runs(HOME / "data") if r.name == DEMO]
    own = [r for r in list_runs(runs_root()) if r.name != DEMO]
    return {r.name: r for r in (*demo, *own)}
