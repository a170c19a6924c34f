"""Data text reaches the screen only through app/text.py: calls that render Markdown get literals or text.py's output."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(p for p in (ROOT / "app").rglob("*.py") if p.name != "text.py")
# Names that take Markdown in their first argument; metric, dataframe, selectbox options and text do not interpret it.
MARKDOWN = {"markdown", "write", "caption", "error", "warning", "info", "success", "title", "header", "subheader", "toast", "html",
            "latex", "button", "checkbox", "page_link", "download_button", "expander", "popover", "tabs", "toggle", "radio", "pills"}  # fmt: skip


def literal(node: ast.expr) -> bool:
    """A constant, or an f-string of numbers: every value in it formatted as a number or known to be one."""
    if isinstance(node, ast.Constant):
        return True
    if isinstance(node, ast.BinOp):
        return literal(node.left) and literal(node.right)
    if isinstance(node, ast.JoinedStr):
        return all(isinstance(v, ast.Constant) or numeric(v) for v in node.values)
    return False


def numeric(value: ast.expr) -> bool:
    if not isinstance(value, ast.FormattedValue):
        return False
    spec = ast.unparse(value.format_spec) if value.format_spec is not None else ""
    return any(mark in spec for mark in (",", ".0", ".1", ".2", ".3")) or ast.unparse(value.value) in (
        "name.capitalize()", "kind.upper()", "int(first)"
    )  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_markdown_only_from_literals(path: Path) -> None:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = ast.unparse(node.func.value)
        if owner.startswith(("text", "figure", "np", "pd")) or node.func.attr not in MARKDOWN:
            continue
        arguments = [node.args[0]] if node.args else []
        arguments = [k.value for k in node.keywords if k.arg == "label"] if node.func.attr == "page_link" else arguments
        found += [f"{node.lineno}: {ast.unparse(node)[:80]}" for a in arguments if not literal(a)]
    assert found == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_raw_markup(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    for banned in ("unsafe_allow_html", "unsafe_allow_javascript", "st.html", "components.v1", "st.iframe"):
        assert banned not in source


@pytest.mark.parametrize("name", ["components/token_strip/strip.js", "components/figure_files/files.js", "report_page/report.js"])
def test_our_scripts_build_no_markup(name: str) -> None:
    script = (ROOT / "app" / name).read_text(encoding="utf-8")
    assert len(script) > 1_000
    for banned in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "</script", "<!--"):
        assert banned not in script


def test_from_pretrained_is_called_in_one_place() -> None:
    callers = [p.name for p in (ROOT / "analysis").rglob("*.py") if ".from_pretrained(" in p.read_text()]
    assert callers == ["models.py"]
    assert not [p for p in (ROOT / "app").rglob("*.py") if ".from_pretrained(" in p.read_text()]
