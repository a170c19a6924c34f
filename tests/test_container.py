"""The Dockerfile: what it may say, and its steps run without a container engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).parent.parent
NOBODY = 65_534


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order, comments dropped and continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    kept = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    lines = [line for line in kept.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(None, 1)[0], re.sub(r"\s+", " ", line.split(None, 1)[1]).strip()) for line in lines]


DOCKER = instructions()


def docker(word: str) -> list[str]:
    return [rest for name, rest in DOCKER if name == word]


def test_dockerfile_passes_hadolint() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([hadolint, "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_base_image_is_pinned() -> None:
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", docker("FROM")[0])


def test_runs_as_a_numbered_user_that_is_not_root() -> None:
    last = docker("USER")[-1]
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", last)
    words = [name for name, _ in DOCKER]
    assert "RUN" not in words[words.index("USER") :]
    assert "COPY" not in words[words.index("USER") :]


def test_same_start_command_as_make_run() -> None:
    line = next(x for x in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if "streamlit run" in x)
    local = re.split(r"\s", line.split("$(BIN)/", 1)[1].strip())
    contained = json.loads(docker("CMD")[0])
    assert contained[: len(local) - 1] == local[:-1]
    assert contained[len(local) - 1 :] == ["8501", "--server.address", "0.0.0.0"]


def test_health_check_asks_streamlits_own_route() -> None:
    assert len(docker("HEALTHCHECK")) == 1
    assert "http://127.0.0.1:8501/_stcore/health" in docker("HEALTHCHECK")[0]


def test_copies_exist_and_are_let_through() -> None:
    sources = [word for rest in docker("COPY") for word in rest.split()[:-1]]
    assert {"requirements.txt", "analysis", "app", "data", ".streamlit"} == set(sources)
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert [s for s in sources if not (ROOT / s).exists() or f"!{s}" not in ignore] == []
    assert "*" in ignore


def test_no_secret_in_any_layer() -> None:
    assert docker("ADD") == []
    assert docker("ARG") == []
    assert not re.search(r"(?i)secret|passw|token|api_?key", " ".join(docker("ENV")))
    assert (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()[-1] == ".streamlit/secrets.toml"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def interpreter(user: int | None) -> tuple[str, dict[str, str]]:
    """A Python that ``user`` may run and that sees the pinned packages."""
    packages = sysconfig.get_path("purelib")
    debian = f"/usr/bin/python3.{sys.version_info.minor}"
    for python, extra in ((sys.executable, {}), (debian, {"PYTHONPATH": packages})):
        try:
            subprocess.run(
                [python, "-c", "import streamlit"],
                user=user,
                env=extra,
                cwd="/",
                check=True,
                capture_output=True,
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return python, extra
    pytest.skip(f"user {user} can reach no Python that sees {packages}")


@pytest.fixture
def container() -> Iterator[tuple[Path, int, subprocess.Popen[bytes]]]:
    """The Dockerfile's copies, environment and command, in an empty folder, by a user who may write data/runs alone."""
    user = NOBODY if os.getuid() == 0 else None
    python, extra = interpreter(user)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        tree = Path(folder) / "srv"
        for rest in docker("COPY"):
            source, target = rest.split()
            if (ROOT / source).is_dir():
                shutil.copytree(
                    ROOT / source,
                    tree / target,
                    ignore=shutil.ignore_patterns("build", "runs", "__pycache__"),
                )
            else:
                tree.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, tree / target)
        runs = tree / "data" / "runs"
        runs.mkdir()
        if user is not None:
            os.chown(runs, user, user)
        subprocess.run(["chmod", "-R", "a+rX,a-w", folder], check=True)
        subprocess.run(["chmod", "u+w", folder, str(runs)], check=True)
        env = dict(word.split("=", 1) for rest in docker("ENV") for word in rest.split()) | extra
        command = [python, *json.loads(docker("CMD")[0])[1:]]
        command[command.index("8501")] = str(port)
        process = subprocess.Popen(command, cwd=tree, user=user, env=env, stdout=log, stderr=log)
        try:
            yield tree, port, process
        finally:
            process.terminate()
            process.wait(20)
            log.seek(0)
            print(log.read().decode("utf-8", "replace"))
            subprocess.run(["chmod", "-R", "u+w", folder], check=True)


def status(port: int, path: str, host: str) -> int:
    try:
        return int(urlopen(Request(f"http://127.0.0.1:{port}{path}", headers={"Host": host}), timeout=5).status)
    except HTTPError as error:
        return error.code
    except (URLError, ConnectionError):
        return 0


def test_container_steps_as_an_unprivileged_user(
    container: tuple[Path, int, subprocess.Popen[bytes]],
) -> None:
    tree, port, process = container
    end = time.monotonic() + 60
    while status(port, "/_stcore/health", "localhost") != 200:
        assert process.poll() is None, "the start command ended"
        assert time.monotonic() < end, "no answer within 60 s"
        time.sleep(0.2)
    check = json.loads(docker("HEALTHCHECK")[0].split("CMD", 1)[1])
    check = [sys.executable, *(word.replace("8501", str(port)) for word in check[1:])]
    assert subprocess.run(check, timeout=20).returncode == 0
    assert status(port, "/", "localhost") == 200
    # bound to every address, it still answers to its own names alone
    assert status(port, "/", "evil.example") in (400, 403)
    assert list(tree.rglob("__pycache__")) == []
    process.terminate()
    process.wait(20)
    assert subprocess.run(check, timeout=20, capture_output=True).returncode != 0
