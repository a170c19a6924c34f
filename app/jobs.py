"""Captures started from the browser: one worker, a short queue, progress and cancel. Jobs belong to their session."""

from __future__ import annotations

import os
import queue
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streamlit as st

from analysis.untrusted import Prompt

QUEUE = 16


class QueueFull(RuntimeError):
    """Too many captures wait, or this session already has one."""


@dataclass
class Job:
    """One capture: written by the worker, read by the page of the session that asked for it."""

    session: str
    model: Path
    prompts: Sequence[Prompt]
    out: Path
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    state: str = "waiting"  # waiting, loading, running, done, failed, cancelled
    message: str = ""
    documents: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class Worker:
    """Runs jobs one after another in its own thread; models stay loaded between jobs."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[Job] = queue.Queue(QUEUE)
        self._current: dict[str, Job] = {}
        self._models: dict[Path, Any] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._work, daemon=True, name="capture").start()

    def submit(self, job: Job) -> Job:
        """Queue a job. Raises QueueFull where the session has one under way, or the queue is full."""
        with self._lock:
            mine = self._current.get(job.session)
            if mine is not None and not mine.over:
                raise QueueFull("a capture of yours is under way: wait for it or cancel it")
            try:
                self._waiting.put_nowait(job)
            except queue.Full:
                raise QueueFull(f"{QUEUE} captures wait already: try again in a minute") from None
            self._current[job.session] = job
        return job

    def of_session(self, session: str) -> Job | None:
        """The session's latest job."""
        return self._current.get(session)

    def _work(self) -> None:
        while True:
            job = self._waiting.get()
            if job.stop.is_set():
                job.state = "cancelled"
                continue
            try:
                self._run(job)
            except Exception as error:  # the worker must outlive any job
                self._report(job, error)

    def _run(self, job: Job) -> None:
        job.state = "loading"
        import torch

        from analysis.capture import Progress, capture
        from analysis.models import load_model
        from analysis.proofs import canary

        torch.set_num_threads(int(os.environ.get("ROUTERSCOPE_THREADS", "1")))
        if job.model not in self._models:
            loaded = load_model(job.model)
            canary(loaded[0])
            self._models = {job.model: loaded}  # one model in memory at a time
        model, tokenizer = self._models[job.model]

        def show(p: Progress) -> None:
            job.documents, job.tokens, job.seconds = p.documents, p.tokens, p.seconds

        job.state = "running"
        columns: dict[str, Any] = {c: [getattr(p, s) for p in job.prompts] for c, s in (("labels", "label"), ("names", "name"))}
        capture(model, tokenizer, [p.text for p in job.prompts], **columns, out=job.out, model_path=job.model,
                progress=show, cancelled=job.stop.is_set)  # fmt: skip
        job.state = "done"

    @staticmethod
    def _report(job: Job, error: Exception) -> None:
        """Named errors are shown as they are; anything else only by kind, since its text may repeat a prompt."""
        from analysis.capture import CaptureCancelled, CaptureError
        from analysis.models import ModelError
        from analysis.routers import RouterError
        from analysis.store import RunError, delete_run
        from analysis.trace import TraceError

        named = isinstance(error, (CaptureError, ModelError, RouterError, RunError, TraceError))
        job.message = str(error) if named else f"the capture stopped with {type(error).__name__}; see the server's log"
        if (job.out / "progress").is_dir():
            delete_run(job.out.parent, job.out.name)
        job.state = "cancelled" if isinstance(error, CaptureCancelled) else "failed"


@st.cache_resource(show_spinner=False)
def worker() -> Worker:
    """The server's one worker."""
    return Worker()


@st.cache_resource(show_spinner=False)
def warm_up() -> None:
    """Once the first page is out, in the background: import torch and compile the kernels, so that first uses start at once."""

    def warm() -> None:
        from analysis import policies, shuffling

        policies.warm_up()
        shuffling.warm_up()
        import analysis.capture  # noqa: F401 (and with it torch)

    timer = threading.Timer(5.0, warm)
    timer.daemon = True
    timer.start()


def session_id() -> str:
    """An id of this browser session, never shown and never in a URL."""
    if "_session" not in st.session_state:
        st.session_state["_session"] = uuid.uuid4().hex
    return str(st.session_state["_session"])
