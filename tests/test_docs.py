"""The pages of docs/ against the app: every page is described, with its picture, and names all its choices of the URL."""

import re
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

ROOT = Path(__file__).parent.parent
PAGES = re.findall(r'views/(\w+)\.py"', (ROOT / "app" / "main.py").read_text())
EVERYWHERE = {"run"}  # said once, in docs/README.md


def link_targets(text: str) -> list[str]:
    return [t for t in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in t]


def test_the_index_has_every_page_and_no_other() -> None:
    found = re.findall(r"\]\((\w+)\.md\)", (ROOT / "docs" / "README.md").read_text())
    assert sorted(set(PAGES)) == sorted(p for p in found if p in {x.stem for x in (ROOT / "docs").glob("*.md")} - {"README", "scale"})


@pytest.mark.parametrize("document", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.stem)
def test_links_and_pictures_are_there(document: Path) -> None:
    missing = [t for t in link_targets(document.read_text()) if not (document.parent / t).is_file()]
    assert missing == []


@pytest.mark.parametrize("page", sorted(set(PAGES)))
def test_a_page_has_its_picture_and_all_its_choices(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTERSCOPE_RUNS", str(tmp_path))
    monkeypatch.chdir(ROOT)
    told = (ROOT / "docs" / f"{page}.md").read_text()
    assert f"(pictures/{page}.png)" in told
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180).run()
    if page != "overview":
        test.switch_page(f"views/{page}.py").run()
    assert not test.exception
    choices = set(test.session_state["_chosen"]) - EVERYWHERE
    assert [c for c in sorted(choices) if f"?{c}=" not in told] == []
