"""What a fresh machine gets: pins, commands, and the server's configuration."""

from __future__ import annotations

import ast
import importlib.metadata as metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.M))
CONFIG = tomllib.loads((ROOT / ".streamlit/config.toml").read_text(encoding="utf-8"))


def pins(name: str) -> dict[str, Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    return {canonicalize_name(r.name): r for r in found}


RUNTIME = pins("requirements.txt")
OPTIONAL = pins("requirements-cluster.txt")
EVERYTHING = RUNTIME | OPTIONAL | pins("requirements-dev.txt")


# Pins


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_pin_is_exact_and_installed(name: str) -> None:
    pin = EVERYTHING[name]
    assert [s.operator for s in pin.specifier] == ["=="], f"{pin} is not pinned to one version"
    assert "*" not in str(pin.specifier)
    assert metadata.version(name).split("+")[0] == next(iter(pin.specifier)).version


def test_no_package_is_pinned_twice() -> None:
    names = [n for listed in (RUNTIME, OPTIONAL, pins("requirements-dev.txt")) for n in listed]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("listed", "names"), [("runtime", RUNTIME), ("cluster", RUNTIME | OPTIONAL), ("all", EVERYTHING)])
def test_what_packages_need_is_pinned_too(listed: str, names: dict[str, Requirement]) -> None:
    needed: dict[str, str] = {}
    for name in names:
        for line in metadata.requires(name) or []:
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                needed[canonicalize_name(need.name)] = name
    # a build of torch with CUDA brings its own libraries, which a CPU build does not have
    missing = {n: by for n, by in needed.items() if n not in names and not re.match(r"nvidia-|cuda-|triton", n)}
    assert missing == {}


def imported(folder: str) -> set[str]:
    """Distributions whose modules the sources of ``folder`` import."""
    owners = metadata.packages_distributions()
    modules: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        if "build" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules.add(node.module.split(".")[0])
    local = {"analysis", "app", "data", "tests"}
    foreign = modules - set(sys.stdlib_module_names) - local
    unknown = {m for m in foreign if m not in owners and not list((ROOT / folder).rglob(f"{m}.py"))}
    assert unknown == set(), f"{folder}/ imports {unknown}, which nothing installed provides"
    return {canonicalize_name(owner) for m in foreign for owner in owners.get(m, [])}


@pytest.mark.parametrize(
    ("folder", "names"),
    [("analysis", RUNTIME | OPTIONAL), ("app", RUNTIME), ("data", RUNTIME), ("tests", EVERYTHING)],
    ids=["analysis", "app", "data", "tests"],
)
def test_every_import_is_pinned(folder: str, names: dict[str, Requirement]) -> None:
    assert imported(folder) - set(names) == set()


@pytest.mark.parametrize("name", ["ray", "accelerate"])
def test_optional_packages_are_imported_inside_functions(name: str) -> None:
    """The program starts without them: nothing that a run of the web or a capture imports needs them."""
    code = f"import sys; sys.modules[{name!r}] = None; import analysis.cluster, analysis.__main__, analysis.capture, app.jobs"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Commands


def test_every_make_command_in_the_documents_exists() -> None:
    texts = {p: p.read_text(encoding="utf-8") for p in [*ROOT.glob("*.md"), ROOT / ".ci/run"]}
    # a command stands in code: at the start of a line, or after a backtick
    found = [(p.name, t) for p, text in texts.items() for t in re.findall(r"(?m)(?:^|^exec |`)make ([a-z-]+)", text)]
    assert {("README.md", "run"), ("README.md", "test"), ("run", "env-dev"), ("run", "test")} <= set(found)
    assert [(name, t) for name, t in found if t not in TARGETS] == []


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_make_target_parses_and_is_not_a_file_name(target: str) -> None:
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.M)
    assert phony is not None
    assert target in phony[1].split()
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_refuses_an_old_python_in_words(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    done = subprocess.run(["make", "run", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stderr
    assert "Python 3.9.2" in done.stderr


def test_the_check_is_executable() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True)


LIGHT = (
    *("__main__", "balance", "export", "findings", "layout", "metrics"),
    *("checkpoints", "stats", "store", "tokens", "trace", "untrusted", "whatif"),
    *("cards", "devices", "information", "jackknife", "paths", "significance", "specialization", "stability", "vocabulary"),
)


@pytest.mark.parametrize("module", [*(f"analysis.{m}" for m in LIGHT), "app.jobs", "app.runs_folder", "app.text"])
def test_importing_it_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"{module} imports torch"


# Streamlit's options


def leaves(table: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.fixture(scope="module")
def effective() -> dict[str, object]:
    """Every option as a fresh Streamlit started in the project's folder reads it."""
    read = "{n: c.get_option(n) for n in c.get_config_options(force_reparse=True)}"
    command = [sys.executable, "-c", f"import json, streamlit.config as c; print(json.dumps({read}, default=str))"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("option", [name for name, _ in leaves(CONFIG)])
def test_option_exists_in_this_streamlit(option: str) -> None:
    from streamlit import config

    assert option in config.get_config_options()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("server.address", "127.0.0.1"),
        ("server.allowedHosts", ["localhost", "127.0.0.1"]),
        ("server.enableCORS", True),
        ("server.enableXsrfProtection", True),
        ("server.xsrfCookieSameSite", "strict"),
        ("server.maxUploadSize", 20),
        ("server.maxMessageSize", 50),
        ("server.enableStaticServing", False),
        ("server.enableAgentApi", False),
        ("server.fileWatcherType", "none"),
        ("browser.gatherUsageStats", False),
        ("client.showErrorDetails", "none"),
        ("client.showErrorLinks", False),
        ("client.toolbarMode", "viewer"),
    ],
)
def test_streamlit_itself_reads_the_hardened_value(option: str, value: object, effective: dict[str, object]) -> None:
    assert effective[option] == value


def test_palettes_have_the_lengths_streamlit_demands() -> None:
    found = [(n, v) for n, v in leaves(CONFIG) if n.endswith("Colors") and isinstance(v, list)]
    assert len(found) == 5
    for name, colours in found:
        assert all(re.fullmatch(r"#[0-9A-Fa-f]{6}", c) for c in colours), name
        assert len(colours) == (8 if "Categorical" in name else 10), name


def test_no_font_comes_by_address() -> None:
    assert not [n for n, v in leaves(CONFIG) if "font" in n.lower() and re.search("://|url", str(v))]


# What must not be in the tree


def test_no_machine_path_and_no_registry_host_in_the_sources() -> None:
    hosts = ["files.python" + "hosted", "pypi." + "org", "deb.debian" + ".org", "registry.npm" + "js"]
    folders = ["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/", "/opt/" + "wheels", "/opt/" + "pypi"]
    forbidden = re.compile("|".join(map(re.escape, hosts)) + "|" + "|".join(rf"(?<![\w.]){re.escape(f)}\w" for f in folders))
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode().split("\0")  # fmt: skip
    ours = [n for n in listed if n and not n.startswith(("data/demo-model/tokenizer", "data/demo-prompts"))]
    assert len(ours) > 20
    found = []
    for name in ours:
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content[:8_192]:
            found += [f"{name}: {m[0]}" for m in forbidden.finditer(content.decode("utf-8", "replace"))]
    assert found == []
