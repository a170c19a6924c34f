"""The README's Python runs as it stands, and names only files that exist."""

import re
from pathlib import Path

import pytest

from analysis.routers import RouterError
from tests.conftest import REAL

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if "../shared/real" in block and not REAL.is_dir():
        pytest.skip("no real routing data beside this checkout (../shared/real)")
    exec(compile(block, "README.md", "exec"), {})


def test_the_published_results_would_be_missed(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's checks bite: on another share of the experts, and on counts of one token more."""
    monkeypatch.chdir(ROOT)
    block = next(b for b in BLOCKS if "../shared/real" in b)
    assert len(block.splitlines()) < 30
    for change in (("top_p=0.2", "top_p=0.25"), ("counts.sum(1) // 8,", "counts.sum(1) // 8 + 1,")):
        with pytest.raises(AssertionError):
            exec(compile(block.replace(*change), "README.md", "exec"), {})


def test_the_worked_example_of_a_family_proves_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its entry the family is refused by name; with an adapter that reads other ids its proof fails."""
    monkeypatch.chdir(ROOT)
    block = next(b for b in BLOCKS if "CoinRouter" in b)
    with pytest.raises(RouterError, match="CoinRouter.* needs an adapter"):
        exec(compile(block.replace('{**ROUTERS, "CoinRouter": entry}', "ROUTERS"), "README.md", "exec"), {})
    with pytest.raises(AssertionError):
        exec(compile(block.replace("Routed(ids, weights", "Routed(3 - ids, weights"), "README.md", "exec"), {})


def test_linked_files_exist() -> None:
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", re.sub(r"```.*?```", "", README, flags=re.S)) if "://" not in x]
    assert links
    assert [x for x in links if not (ROOT / x).exists()] == []


def test_code_map_names_every_module() -> None:
    code_map = README.split("## The map of the code")[1]
    modules = [p.name for p in (ROOT / "analysis").glob("*.py") if p.name != "__init__.py"]
    assert [m for m in modules if m not in code_map and m.removesuffix(".py") not in code_map] == []


def test_readers_agree_on_the_demo_run() -> None:
    import duckdb
    import pandas as pd
    import polars as pl

    routing = ROOT / "data/demo-run/routing"
    by_pandas = pd.read_parquet(routing)["w0"].astype("float64").sum()
    by_polars = pl.scan_parquet(str(routing / "*.parquet")).select(pl.col("w0").cast(pl.Float64).sum()).collect().item()
    row = duckdb.connect().execute(f"SELECT sum(w0::DOUBLE), count(*) FROM '{routing}/*.parquet'").fetchall()[0]
    assert row[0] == pytest.approx(by_pandas, rel=1e-12) and by_polars == pytest.approx(by_pandas, rel=1e-12)
    assert row[1] == len(pd.read_parquet(routing)) > 0
