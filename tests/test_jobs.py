import time
from pathlib import Path

import pytest

from analysis.store import open_run
from analysis.untrusted import Prompt
from app.jobs import Job, QueueFull, Worker

from . import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.build("olmoe").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def finished(job: Job) -> Job:
    for _ in range(600):
        if job.over:
            return job
        time.sleep(0.05)
    raise AssertionError(job.state)


def test_two_sessions_get_their_own_runs(model: Path, tmp_path: Path) -> None:
    worker = Worker()
    jobs = [worker.submit(Job(s, model, [Prompt(f"text of {s}", s, "p")], tmp_path / s)) for s in ("one", "two")]
    for job, session in zip(jobs, ("one", "two"), strict=True):
        assert finished(job).state == "done", job.message
        trace = open_run(tmp_path / session)
        assert "".join(trace.tokens["token"].to_pylist()) == f"text of {session}" and trace.labels == (session,)
        assert worker.of_session(session) is job
    assert worker.of_session("three") is None


def test_one_capture_per_session(model: Path, tmp_path: Path) -> None:
    worker = Worker()
    long = worker.submit(Job("one", model, [Prompt("x" * 200, None, "p")] * 200, tmp_path / "a"))
    with pytest.raises(QueueFull, match="of yours is under way"):
        worker.submit(Job("one", model, [Prompt("x", None, "p")], tmp_path / "b"))
    waiting = worker.submit(Job("two", model, [Prompt("x", None, "p")], tmp_path / "c"))
    waiting.stop.set()
    long.stop.set()
    assert finished(long).state == "cancelled" and finished(waiting).state == "cancelled"
    assert not (tmp_path / "a").exists() and not (tmp_path / "c").exists()


def test_failures_are_sentences_without_the_prompt(model: Path, tmp_path: Path) -> None:
    worker = Worker()
    job = finished(worker.submit(Job("one", model, [Prompt("secret " * 100, None, "long one")], tmp_path / "a")))
    assert job.state == "failed" and "long one has 700 tokens, the limit is 256" in job.message and "secret" not in job.message
    job = finished(worker.submit(Job("one", tmp_path / "none", [Prompt("secret", None, "p")], tmp_path / "b")))
    assert job.state == "failed" and "no model at" in job.message
    assert finished(worker.submit(Job("one", model, [Prompt("fine", None, "p")], tmp_path / "c"))).state == "done"
