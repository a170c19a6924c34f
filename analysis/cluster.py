"""The same capture and the same statistics on a Ray cluster. Ray is optional and imported only where it is used.

One process per copy of the model, a *replica*, captures whole parts and writes them as a capture in one process does, into a folder that
every node sees or below an address of an object store; this process plans the parts, and writes the manifest when every part's record is
there. A part is fixed beforehand by its documents and row numbers, so who captures it, when, and how often changes nothing.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .layout import PART_TOKENS, part_tokens
from .places import Place, RunError
from .stats import Statistics, merge_statistics
from .store import open_run, read_manifest
from .tokens import Pieces
from .trace import ModelCard, Part, Trace
from .verifying import count_part
from .writing import CAPTURE, RunWriter, write_part

if TYPE_CHECKING:
    from .capture import PlannedDocument, PlannedPart, Progress

RETRIES = 8  # of a part whose process died; one that kills every process it meets must not do so for ever
SLICES = 4  # of the texts that each replica plans, so that long ones are shared
AT_ONCE = 2  # parts of a replica: one that is captured, one that is written
ANSWER_SECONDS = 10  # to reach the head node of a cluster
POLL_SECONDS = 0.2
STORE_BYTES = 128 * 2**20  # of a cluster started here, through which only texts and counts pass


class ClusterError(RunError):
    """A cluster that cannot be used, or a node that is not like the others; the message says what to do."""


@dataclass(frozen=True)
class Cluster:
    """Which cluster, and what each replica of the model gets of it.

    ``address``: a running cluster's (host:port), or "auto": the one running here, else one started for this
    call. ``replicas``: None for as many as the cluster holds, at most one per part. ``threads`` (CPUs) and ``gpus`` are per replica.
    """

    address: str = "auto"
    replicas: int | None = None
    threads: int = 1
    gpus: int = 0


class Replica:
    """One copy of the model in a process of a node. It loads when first asked, so that what fails is an answer and not a dead process.

    It may be asked from AT_ONCE threads: parts take turns at the model, and one is written while the next is captured, as in one process.
    """

    def __init__(self, model: Path, loading: Mapping[str, Any], threads: int) -> None:
        self.folder, self.loading, self.threads = model, dict(loading), threads
        self.loaded: tuple[Any, Any, ModelCard, Pieces] | None = None
        self.turn = threading.Lock()

    def _model(self) -> tuple[Any, Any, ModelCard, Pieces]:
        """What is loaded; for whom ``turn`` is."""
        if self.loaded is None:
            import torch

            from .models import load_model, model_card
            from .proofs import canary

            torch.set_num_threads(self.threads)
            model, tokenizer = load_model(self.folder, **self.loading)
            canary(model)
            self.loaded = model, tokenizer, model_card(model, tokenizer, self.folder), Pieces.of(tokenizer)
        return self.loaded

    def load(self) -> None:
        """Load the model ahead of being asked to capture with it, which raises what fails here."""
        with self.turn, suppress(Exception):
            self._model()

    def plan(self, texts: Sequence[str], **given: Any) -> tuple[ModelCard, list[PlannedDocument]]:
        """The model's card, and what ``texts`` will be; ``given`` goes to capture.plan_documents."""
        with self.turn:  # imports too: two threads that import transformers at once find it half made
            from .capture import plan_documents

            model, tokenizer, card, _ = self._model()
            return card, plan_documents(model, tokenizer, texts, **given)

    def capture(self, planned: PlannedPart, card: ModelCard, texts: Sequence[str], run: str, options: Mapping[str, Any]) -> None:
        """Capture one planned part and store it in the folder or below the address ``run``. Raises ClusterError where nodes differ."""
        place = Place.of(run)
        if not place.holds(CAPTURE):
            raise ClusterError(f"node {os.uname().nodename} does not see the folder of {place.name}: --out must be shared by all nodes")
        with self.turn:
            part = self._captured(planned, card, texts, options)
        write_part(place, part, card.layers)

    def _captured(self, planned: PlannedPart, card: ModelCard, texts: Sequence[str], options: Mapping[str, Any]) -> Part:
        from .capture import capture_parts

        model, tokenizer, mine, pieces_of = self._model()
        if mine != card:
            raise ClusterError(f"node {os.uname().nodename} has other weights or another tokenizer in {self.folder.name}: copy it again")
        _, labels, names = zip(*planned.documents, strict=True)
        numbers: dict[str, Any] = {
            "first_document": planned.first_document, "first_part": planned.index, "first_rows": planned.first_rows}  # fmt: skip
        parts = list(capture_parts(model, tokenizer, texts, labels=labels, names=names, pieces_of=pieces_of, **numbers, **options))
        found = [(p.first_rows, {s: len(p.stream_tokens(s)) for s in p.first_rows}) for p in parts]
        if found != [(planned.first_rows, planned.rows)]:
            raise ClusterError(f"part {planned.index} came out with other rows than planned ({found}): report this with its documents")
        return parts[0]


def capture_on_cluster(
    model: Path,
    texts: Sequence[str],
    *,
    out: str | Path,
    cluster: Cluster,
    labels: Sequence[str | None] | None = None,
    names: Sequence[str] | None = None,
    loading: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    **options: Any,
) -> Trace:
    """As ``capture(..., out=out)`` in one process, spread over replicas of the model in the folder ``model``.

    ``out`` and ``model`` are the same folders on every node; ``loading`` goes to load_model. ``out`` may also be an address that pyarrow.fs
    opens, with the credentials of each node: parts go there from the nodes. An interrupted capture is resumed, whoever started it. Raises
    ClusterError and what ``capture`` raises; generation is refused: row numbers must be known beforehand.
    """
    from .capture import plan_parts

    if options.get("new_tokens"):
        raise ClusterError("a cluster records given text: how many tokens a model adds is not known beforehand; leave out new tokens")
    place, model = Place.of(out), model.resolve()
    run = str(place.folder or place.address)
    with _connected(cluster.address) as ray:
        crew = _Crew(ray, cluster, model, loading or {})
        try:
            most = sum(len(t.encode()) for t in texts)  # a text has seldom more tokens than bytes
            crew.grow(1 + most // (options.get("part_tokens") or PART_TOKENS))
            card, documents = crew.plan(list(texts), labels, names, options.get("max_tokens"), cancelled)
            options["part_tokens"] = options.get("part_tokens") or part_tokens(card.layers)
            plan = plan_parts(documents, options["part_tokens"])
            with RunWriter.open(run, card, options) as writer:
                done = writer.refresh()
                _check_stored(writer, plan, done)
                jobs = [(p, card, texts[p.first_document : p.first_document + len(p.documents)], run, options)
                        for p in plan if p.index not in done]  # fmt: skip
                crew.capture(jobs, plan, progress, cancelled)
                crew.dismiss()
                if missing := {p.index for p in plan} - (done := writer.refresh()).keys():
                    raise ClusterError(
                        f"{len(missing)} parts were reported written but are not in {place.name}: is it shared by all nodes?"
                    )
                _check_stored(writer, plan, done)  # again: an address has no lock
                writer.finish()
                return open_run(run)
        finally:
            crew.dismiss()


def statistics_on_cluster(run: str | Path, cluster: Cluster) -> Statistics:
    """The statistics of a stored run, counted again from its decisions part by part on the nodes, and added up here in order.

    Counts equal the stored ones; what only the capture knew is 0: sums of router probabilities, and of gate weights not stored. Raises ClusterError, RunError.
    """
    place = Place.of(run)
    run = str(place.folder or place.address)
    numbers = [p["index"] for p in read_manifest(place)["parts"]]
    with _connected(cluster.address) as ray:
        task = ray.remote(num_cpus=cluster.threads, max_retries=RETRIES, scheduling_strategy="SPREAD")(_counted)
        window = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        return merge_statistics(_in_order(ray, task, run, numbers, window))


def _counted(run: str, number: int) -> Statistics:
    return count_part(Place.of(run), open_run(run), read_manifest(run)["parts"][number])


def _in_order(ray: Any, task: Any, run: str, numbers: Iterable[int], window: int) -> Iterator[Statistics]:
    """Results of ``task`` in the order of ``numbers``, at most ``window`` of them waiting."""
    waiting: deque[Any] = deque()
    for number in numbers:
        if len(waiting) == window:
            yield _answer(ray, waiting.popleft())
        waiting.append(task.remote(run, number))
    while waiting:
        yield _answer(ray, waiting.popleft())


class _Crew:
    """The replicas of one capture: they plan, capture what there is to capture, and are dismissed."""

    def __init__(self, ray: Any, cluster: Cluster, model: Path, loading: Mapping[str, Any]) -> None:
        self.ray, self.cluster = ray, cluster
        has = ray.cluster_resources()
        self.room = int(min(has.get("CPU", 0) // cluster.threads, has.get("GPU", 0) // cluster.gpus if cluster.gpus else 1 << 30))
        if self.room < (cluster.replicas or 1):
            raise ClusterError(f"the cluster has room for {self.room} replicas of {cluster.threads} CPUs and {cluster.gpus} GPUs:"
                               " ask for fewer, for fewer threads each, or add nodes")  # fmt: skip
        actor = ray.remote(num_cpus=cluster.threads, num_gpus=cluster.gpus, max_restarts=-1, max_task_retries=RETRIES,
                           max_concurrency=AT_ONCE, scheduling_strategy="SPREAD")(Replica)  # fmt: skip
        self._new = lambda: actor.remote(model, dict(loading), cluster.threads)
        self.actors: list[Any] = []

    def grow(self, parts: int) -> None:
        """As many replicas as there are parts, or as there may be; they load all at once, and while the first one plans."""
        while len(self.actors) < min(self.cluster.replicas or self.room, parts):
            self.actors.append(self._new())
            self.actors[-1].load.remote()

    def plan(self, texts: Sequence[str], labels: Sequence[str | None] | None, names: Sequence[str] | None,
             max_tokens: int | None, cancelled: Callable[[], bool] | None) -> tuple[ModelCard, list[PlannedDocument]]:  # fmt: skip
        """The model's card and what the texts will be, told by all replicas, SLICES of the texts each. Raises ClusterError where nodes differ,
        CaptureCancelled."""
        size = max(1, -(-len(texts) // (SLICES * len(self.actors))))
        answers = []
        for i, first in enumerate(range(0, max(len(texts), 1), size)):
            last = first + size if first + size < len(texts) else None  # what labels or names are too many are told by the last
            mine = {n: x if x is None else x[first:last] for n, x in (("labels", labels), ("names", names))}
            actor = self.actors[i % len(self.actors)]
            answers.append(actor.plan.remote(texts[first:last], **mine, first_document=first, max_tokens=max_tokens))

        def told(answer: Any) -> Any:
            while not self._answered([answer], cancelled):
                pass
            return _answer(self.ray, answer)

        cards, documents = zip(*map(told, answers), strict=True)
        if any(card != cards[0] for card in cards):
            raise ClusterError("nodes have different weights or tokenizers in the model's folder: copy it to all of them again")
        return cards[0], [d for some in documents for d in some]

    def capture(self, jobs: Sequence[tuple[Any, ...]], plan: Sequence[PlannedPart], progress: Callable[[Progress], None] | None,
                cancelled: Callable[[], bool] | None) -> None:  # fmt: skip
        """Spread ``jobs``, the arguments of Replica.capture, over the replicas: AT_ONCE each, the last ones to whoever is free."""
        from .capture import Progress

        self.grow(len(jobs))
        began, total, tokens = time.monotonic(), sum(len(p.documents) for p in plan), 0
        documents = total - sum(len(job[0].documents) for job in jobs)
        waiting = deque(jobs)
        running: dict[Any, tuple[Any, PlannedPart]] = {}

        def hand_out(actor: Any) -> None:
            if waiting and (len(waiting) > len(self.actors) or all(other is not actor for other, _ in running.values())):
                job = waiting.popleft()
                running[actor.capture.remote(*job)] = actor, job[0]

        for actor in self.actors * AT_ONCE:
            hand_out(actor)
        while running:
            for answer in self._answered(list(running), cancelled):
                actor, planned = running.pop(answer)
                _answer(self.ray, answer)
                hand_out(actor)  # first, so that no replica waits for whom progress is told
                documents, tokens = documents + len(planned.documents), tokens + max(planned.rows.values())
                if progress is not None:
                    progress(Progress(documents, total, tokens, time.monotonic() - began))

    def _answered(self, waiting: list[Any], cancelled: Callable[[], bool] | None) -> list[Any]:
        """The first of ``waiting`` that is answered, none where that takes longer than POLL_SECONDS. Raises CaptureCancelled."""
        from .recorder import CaptureCancelled

        if cancelled is not None and cancelled():
            raise CaptureCancelled("capture cancelled")
        answered: list[Any] = self.ray.wait(waiting, timeout=POLL_SECONDS)[0]
        return answered

    def dismiss(self) -> None:
        """End the replicas, whatever they are doing: a part they have not finished is not there."""
        while self.actors:
            self.ray.kill(self.actors.pop())


def _answer(ray: Any, reference: Any) -> Any:
    """What a node answered; what it raised is raised here as itself."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ClusterError(f"a process of the cluster died {RETRIES + 1} times at the same part ({type(error).__name__}): is its memory"
                           " enough for the model?") from error  # fmt: skip


def _check_stored(writer: RunWriter, plan: Sequence[PlannedPart], done: Mapping[int, Mapping[str, Any]]) -> None:
    """Raise RunError unless the parts that are there hold the documents planned for them, under the numbers planned for them."""
    planned = {p.index: (p.first_document, p.first_rows, p.documents) for p in plan}
    if any((r["first_document"], r["first_rows"], tuple(writer.documents_of(i))) != planned.get(i) for i, r in done.items()):
        raise RunError(f"{writer.place.name} was interrupted with other texts: give the same texts, or delete the run")


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected as a Cluster's ``address`` says; a connection made here ends here. Raises ClusterError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read at import
    try:
        import ray
    except ImportError:
        raise ClusterError("a cluster needs Ray: pip install -r requirements-cluster.txt") from None
    if ray.is_initialized():
        yield ray
        return
    _check_answers(ray, address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        if address != "auto" or not isinstance(error, ConnectionError):
            raise ClusterError(f"no cluster answers at {address!r} ({type(error).__name__}): give host:port of its head node") from error
        _start_here(ray, quiet)
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(ray: Any, address: str) -> None:
    """Raise ClusterError where nothing listens at ``host:port``: Ray itself would try for minutes. What else an address may be is Ray's to say."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    hosts = (host, ray.util.get_node_ip_address()) if host in ("localhost", "127.0.0.1") else (host,)  # which Ray puts in their place
    for name in hosts:
        with suppress(OSError, OverflowError, UnicodeError):
            socket.create_connection((name.strip("[]"), int(port)), ANSWER_SECONDS).close()
            return
    raise ClusterError(f"no cluster answers at {address!r}: nothing listens there; give host:port of its head node")


def _start_here(ray: Any, quiet: Mapping[str, Any]) -> None:
    """Start a cluster all of whose ports are on the loopback address.

    Ray does that where it has no clusters, on other systems than Linux, and has no option for it: its own switch is turned for as long as
    the cluster starts, here and in the processes that it starts. Later connections to other clusters need the machine's own address.
    """
    switch, constants = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", ray._private.ray_constants
    before, possible = os.environ.get(switch), constants.ENABLE_RAY_CLUSTER
    os.environ[switch], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        ray.init("local", include_dashboard=False, object_store_memory=STORE_BYTES, _node_ip_address="127.0.0.1", **quiet)
    finally:
        constants.ENABLE_RAY_CLUSTER = possible
        os.environ.pop(switch)
        if before is not None:
            os.environ[switch] = before
