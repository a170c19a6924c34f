"""The Trace: recorded routing of some documents through one model, with its Arrow schemas and invariants.

This is the ground every other module stands on. It knows nothing of torch, of files, or of the web.

Vocabulary
----------
site      one routed block, in execution order. ``LayerInfo.index`` numbers the sites; ``LayerInfo.layer`` is the
          model's own layer number. A model layer may hold two sites, and sites may differ in k, E and token stream.
stream    a sequence of tokens that sites see: "decoder" (also for decoder-only models) or "encoder".
row       a token's number within its stream, counted over the whole run. Arrays of a site are aligned with it.
part      a run of whole documents, captured and stored together; counts over parts add up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .rounding import NOTES

if TYPE_CHECKING:
    from .stats import Statistics

SCHEMA_VERSION = 2  # since 2 tokens have `predicted`; runs of version 1 open, with it null
NO_EXPERT = -1
STREAMS = ("encoder", "decoder")

_TEXT = pa.dictionary(pa.int32(), pa.string())
TOKENS = pa.schema(
    [
        ("stack", _TEXT),  # stream: "decoder" or "encoder"
        ("document", pa.int32()),
        ("position", pa.int32()),  # 0 is the document's first recorded token
        ("token_id", pa.int32()),
        ("token", _TEXT),  # readable; bytes that are not UTF-8 on their own appear as \xNN
        ("token_bytes", pa.dictionary(pa.int32(), pa.binary())),  # exact; null where the tokenizer cannot say
        ("label", _TEXT),
        ("loss", pa.float32()),  # nats of predicting the next token; null where there is none
        ("phase", _TEXT),  # "prefill" or "decode"
        ("predicted", pa.int32()),  # id of the largest logit: the next token as the model would have it; null where it gave none
    ]
)
DOCUMENTS = pa.schema(
    [
        ("document", pa.int32()),
        ("stack", pa.string()),
        ("name", pa.string()),
        ("label", pa.string()),
        ("first_row", pa.int64()),
        ("n_tokens", pa.int32()),
        ("digest", pa.string()),  # sha256 of the text's token ids as little-endian int32, the same in every stream
    ]
)


class TraceError(ValueError):
    """Routing data that contradicts itself; the message says what, where and what to do."""


@dataclass(frozen=True)
class LayerInfo:
    """One site.

    ``n_experts`` counts experts with weights; ``n_special`` counts router classes without weights (zero-compute,
    skip), whose ids run from ``n_experts`` upwards. ``scoring`` names the score function ("softmax", "sigmoid",
    "softmax-topk", "sqrtsoftplus", "sparsemixer", "product-keys", or "unknown"); ``selection`` the rule from scores to
    experts ("top-k", "group-limited top-k", "top-1 with capacity", "hash", "product keys"). ``weights_on`` says whether
    a weight multiplies the expert's output or input; ``scaled_after`` is a factor the block applies to the experts' sum
    (None: none). ``n_shared`` experts run on every token, behind a gate of their own where ``shared_gate``.
    ``router`` holds the settings a what-if needs (groups, bias, scaling); JSON values only.
    ``note`` states what else a reader of the weights must know.
    """

    index: int
    layer: int
    stack: str
    name: str
    n_experts: int
    top_k: int
    scoring: str
    stream: str = "decoder"
    n_special: int = 0
    n_shared: int = 0
    normalised: bool | None = None
    native_capacity: int | None = None
    router: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    selection: str = "top-k"
    weights_on: str = "output"
    scaled_after: float | None = None
    shared_gate: bool = False

    @property
    def n_classes(self) -> int:
        """Ids a token can have at this site: experts with weights and special classes."""
        return self.n_experts + self.n_special

    @property
    def title(self) -> str:
        """How the site is called on screen: "layer 3", with its stack where the model has several."""
        return f"layer {self.layer}" if self.stack == "decoder" else f"{self.stack} layer {self.layer}"


@dataclass(frozen=True)
class ModelCard:
    """What is known of the model behind a trace. Parameters are counts; ``digest`` is sha256 over its files.

    ``revision`` is the commit of a model that came from the hub, "" for any other.
    """

    name: str
    family: str
    architecture: str
    n_layers: int
    hidden_size: int
    vocab_size: int
    parameters: int
    active_parameters: int
    dtype: str
    layers: tuple[LayerInfo, ...]
    max_tokens: int | None = None
    digest: str = ""
    tokenizer_digest: str = ""
    revision: str = ""
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The card as JSON values; ``from_json`` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelCard:
        """Rebuild a card from ``to_json`` output. Raises TypeError on unknown or missing keys."""
        layers = tuple(LayerInfo(**layer) for layer in values["layers"])
        return cls(**{**values, "layers": layers, "warnings": tuple(values.get("warnings", ()))})


@dataclass(frozen=True)
class SiteRouting:
    """Decisions of one site for n tokens.

    experts  int16 or int32 [n, k]; executed expert ids, -1 = none (dropped natively or skipped).
    weights  float32 [n, k]; gate weights as executed (Trace.weights_note: or rounded); 0 where there is no expert. None: not stored.
    chosen   [n, k]; ids before native capacity; the same array object where nothing was dropped.
    Slot order is not rank, but where weights are None it is that of falling weight.
    """

    experts: np.ndarray
    weights: np.ndarray | None
    chosen: np.ndarray


@dataclass(frozen=True)
class SiteScores:
    """What the router thought, for n tokens of one site, float32 [n] each.

    entropy    nats, of the router's probabilities over all classes (sigmoid scores are normalised first).
    margin     score of the last chosen minus the best rejected class, in selection scores; NaN where not defined.
    logsumexp  of the router logits; NaN where the router has none.
    probabilities  float32 [n, n_classes], or None unless asked for at capture.
    """

    entropy: np.ndarray
    margin: np.ndarray
    logsumexp: np.ndarray
    probabilities: np.ndarray | None = None


@dataclass(frozen=True)
class Part:
    """Whole documents captured together.

    ``first_rows`` gives, per stream, the row number of the part's first token. ``probability_sums`` holds, per site,
    the sum over tokens of the router's probabilities, float64 [n_classes] (NaN-free; zeros where unknown).
    ``weights`` says how gate weights are kept, one of rounding.WEIGHTS: under "none" ``routing`` has them until it is stored, to be counted.
    """

    index: int
    tokens: pa.Table
    documents: pa.Table
    routing: tuple[SiteRouting, ...]
    scores: tuple[SiteScores, ...]
    probability_sums: tuple[np.ndarray, ...]
    first_rows: Mapping[str, int]
    weights: str = "exact"

    def stream_tokens(self, stream: str) -> pa.Table:
        """The part's token rows of one stream, in row order."""
        return _of_stream(self.tokens, stream)


class RoutingSource(Protocol):
    """Where a Trace reads decisions from: memory, or a run on disk. Ranges are rows of the site's stream."""

    def routings(self, sites: Sequence[int], start: int, stop: int) -> tuple[SiteRouting, ...]: ...

    def experts(self, site: int, start: int, stop: int) -> np.ndarray: ...

    def scores(self, site: int, start: int, stop: int) -> SiteScores: ...


@dataclass(frozen=True)
class Trace:
    """The recorded routing of some documents through one model. Immutable.

    A run may hold statistics alone (counts imported from a serving engine): then ``source`` and the tokens table are
    None, and views that need tokens say so. ``load_tokens`` defers reading until ``tokens`` is asked for; of a run on disk
    ``load_rows`` reads (stream, start, stop, columns) without the rest.
    """

    model: ModelCard
    documents: pa.Table
    stats: Statistics
    source: RoutingSource | None
    load_tokens: Callable[[], pa.Table] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    load_rows: Callable[[str, int, int, Sequence[str]], pa.Table] | None = None

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """The sites, in execution order; MoE layers only."""
        return self.model.layers

    @cached_property
    def tokens(self) -> pa.Table | None:
        """One row per token (schema TOKENS), read whole and kept, or None for a run of statistics alone; see ``stream_tokens``."""
        return None if self.load_tokens is None else self.load_tokens()

    @property
    def labels(self) -> tuple[str, ...]:
        """Distinct labels of the documents, sorted; unlabelled documents have none."""
        return tuple(sorted({x for x in self.documents["label"].to_pylist() if x is not None}))

    @property
    def weights_kept(self) -> str:
        """How gate weights are kept, one of rounding.WEIGHTS."""
        return str(self.options.get("weights", "exact"))

    @property
    def weights_note(self) -> str:
        """What a reader of gate weights must know, in sentences; "" where they are exact."""
        return NOTES[self.weights_kept]

    def documents_in(self, stream: str) -> pa.Table:
        """The rows of ``documents`` of one stream, by document number; put in order once, as every site of the stream asks."""
        if stream not in self._documents_in:
            mine = self.documents.filter(pc.equal(self.documents["stack"], stream))
            self._documents_in[stream] = mine.sort_by("document").combine_chunks()
        return self._documents_in[stream]

    @cached_property
    def _documents_in(self) -> dict[str, pa.Table]:
        return {}

    def n_tokens(self, stream: str = "decoder") -> int:
        """Tokens recorded in a stream."""
        return int(pc.sum(self.documents["n_tokens"].filter(pc.equal(self.documents["stack"], stream))).as_py() or 0)

    def stream_tokens(self, stream: str, start: int = 0, stop: int | None = None, columns: Sequence[str] = TOKENS.names) -> pa.Table:
        """Rows start to stop (default all) of one stream, aligned with the arrays of its sites; ``columns`` of schema TOKENS.

        Of a run on disk only the row groups and columns that are needed are read, and not kept. Raises TraceError without tokens.
        """
        return self._token_rows(stream, start, stop, columns).unify_dictionaries()

    def token_column(self, stream: str, column: str, start: int, stop: int) -> pa.ChunkedArray:
        """One column of ``stream_tokens`` as it is stored: each chunk of texts has a dictionary of its own, which takes as long to unify as to read."""
        return self._token_rows(stream, start, stop, [column])[column]

    def _token_rows(self, stream: str, start: int, stop: int | None, columns: Sequence[str]) -> pa.Table:
        if self.load_tokens is None:
            raise TraceError(f"run {self.name!r} holds statistics only, no tokens: capture it again with tokens")
        if self.load_rows is not None:
            return self.load_rows(stream, start, self.n_tokens(stream) if stop is None else stop, columns)
        rows = _of_stream(self.tokens, stream).select(columns)
        return rows.slice(start, None if stop is None else stop - start)

    def document_range(self, document: int, stream: str = "decoder") -> tuple[int, int]:
        """(start, stop) rows of a document in a stream. Raises TraceError for an unknown document."""
        mask = pc.and_(pc.equal(self.documents["document"], document), pc.equal(self.documents["stack"], stream))
        rows = self.documents.filter(mask).to_pylist()
        if len(rows) != 1:
            raise TraceError(f"no document {document} in stream {stream!r} of run {self.name!r}")
        return rows[0]["first_row"], rows[0]["first_row"] + rows[0]["n_tokens"]

    def routing(self, layer: int, start: int = 0, stop: int | None = None) -> SiteRouting:
        """Decisions of one site, rows start to stop (default all). ``layer`` is LayerInfo.index."""
        source, stop = self._range(layer, stop)
        return source.routings([layer], start, stop)[0]

    def routings(self, layers: Sequence[int], start: int, stop: int) -> tuple[SiteRouting, ...]:
        """``routing`` of several sites of one stream, read together: what a document is shown from. TraceError for sites of two streams."""
        sources = [self._range(i, stop)[0] for i in layers]
        if len({self.layers[i].stream for i in layers}) > 1:
            raise TraceError("sites of two streams have different rows: ask for each stream on its own")
        return sources[0].routings(layers, start, stop) if sources else ()

    def scores(self, layer: int, start: int = 0, stop: int | None = None) -> SiteScores:
        """Router scores of one site, rows start to stop (default all)."""
        source, stop = self._range(layer, stop)
        return source.scores(layer, start, stop)

    def experts(self, layer: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """int array [tokens, k]: executed expert ids, -1 = none (dropped natively, skip expert). On disk, weights are not read."""
        source, stop = self._range(layer, stop)
        return source.experts(layer, start, stop)

    def weights(self, layer: int) -> np.ndarray:
        """float32 [tokens, k]: gate weights as executed; rounded where ``weights_note`` says so. TraceError where they are not stored."""
        return gate_weights(self.routing(layer), f"run {self.name!r}")

    def chosen(self, layer: int) -> np.ndarray:
        """As ``experts`` but before native capacity; the same array where nothing was dropped."""
        return self.routing(layer).chosen

    def _range(self, layer: int, stop: int | None) -> tuple[RoutingSource, int]:
        if self.source is None:
            raise TraceError(f"run {self.name!r} holds statistics only, no decisions: capture it again with tokens")
        if not 0 <= layer < len(self.layers):
            raise TraceError(f"no site {layer}: this model has sites 0 to {len(self.layers) - 1}")
        return self.source, self.n_tokens(self.layers[layer].stream) if stop is None else stop


def gate_weights(routing: SiteRouting, where: str) -> np.ndarray:
    """float32 [n, k]: the gate weights. Raises TraceError where they are not stored; ``where`` names the run."""
    if routing.weights is None:
        raise TraceError(f"{where} stored no gate weights (it was captured with weights 'none'): capture it again with exact or 8-bit ones")
    return routing.weights


def check_part(part: Part, layers: Sequence[LayerInfo]) -> None:
    """Raise TraceError unless the part keeps every invariant: aligned rows, ids in range, k distinct per token."""
    if not len(part.routing) == len(part.scores) == len(part.probability_sums) == len(layers):
        raise TraceError(f"part {part.index}: {len(part.routing)} sites recorded, the model has {len(layers)}")
    for layer, routing, scores in zip(layers, part.routing, part.scores, strict=True):
        check_site(layer, routing, len(part.stream_tokens(layer.stream)), f"part {part.index}")
        if not len(scores.entropy) == len(scores.margin) == len(scores.logsumexp) == len(routing.experts):
            raise TraceError(f"part {part.index}, {layer.name}: scores and decisions differ in length")


def check_site(layer: LayerInfo, routing: SiteRouting, n_tokens: int, where: str) -> None:
    """Raise TraceError unless one site's decisions are [n_tokens, k], finite, in range and distinct per token."""
    shape = (n_tokens, layer.top_k)
    for what, array in (("experts", routing.experts), ("weights", routing.weights), ("chosen", routing.chosen)):
        if array is not None and array.shape != shape:
            raise TraceError(f"{where}, {layer.name}: {what} has shape {array.shape}, expected {shape}")
    if routing.weights is not None and not np.isfinite(routing.weights).all():
        raise TraceError(f"{where}, {layer.name}: a gate weight is NaN or infinite; the model's output is unusable")
    for ids in (routing.experts,) if routing.chosen is routing.experts else (routing.experts, routing.chosen):
        if ids.size and (ids.min() < NO_EXPERT or ids.max() >= layer.n_classes):
            raise TraceError(f"{where}, {layer.name}: expert id {ids.max()} outside 0..{layer.n_classes - 1}")
        slots = np.ascontiguousarray(ids.T)  # to compare each with all after it takes a fraction of sorting every row
        if any(((slots[i + 1 :] == slots[i]) & (slots[i] != NO_EXPERT)).any() for i in range(layer.top_k - 1)):
            raise TraceError(f"{where}, {layer.name}: a token was sent to one expert twice")


def id_dtype(n_classes: int) -> np.dtype:
    """Width of expert ids in arrays; follows from the number of classes, never from the data."""
    return np.dtype(np.int16 if n_classes <= np.iinfo(np.int16).max else np.int32)


def token_digest(token_ids: Iterable[int]) -> str:
    """sha256 hex of token ids as little-endian int32: equal text under equal tokenization, equal digest."""
    return hashlib.sha256(np.fromiter(token_ids, dtype="<i4").tobytes()).hexdigest()


def by_document(documents: pa.Table, stream: str = "decoder") -> Iterator[tuple[int, int, int, str | None]]:
    """Yield (document, start, stop, label) for each document of a stream, in row order."""
    for row in documents.filter(pc.equal(documents["stack"], stream)).to_pylist():
        yield row["document"], row["first_row"], row["first_row"] + row["n_tokens"], row["label"]


def _of_stream(tokens: pa.Table, stream: str) -> pa.Table:
    mine = pc.equal(tokens["stack"], stream)
    return tokens if pc.all(mine).as_py() else tokens.filter(mine)  # most runs have one stream: nothing is copied
