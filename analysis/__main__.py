"""The command line: python -m analysis capture | params | verify-model | stats | compare | verify | export | report | copy | runs | delete.

Exit status: 0 done, 1 verify or verify-model found problems, 2 an error (one sentence on stderr), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import pyarrow as pa

from .arguments import parser
from .checkpoints import ModelError, find_checkpoint
from .export import ExportError, describe, export_bytes, export_table
from .glossary import GLOSSARY
from .metrics import METRICS, balance_table
from .paths import saturation
from .places import Place
from .store import RunError, delete_run, list_runs, open_run, valid_run_name
from .trace import TraceError
from .untrusted import UNLIMITED, Prompt, UploadError, read_prompts
from .verifying import same_counts, verify_run
from .whatif import EXAMPLES, Example, weigh

if TYPE_CHECKING:
    from .capture import Progress

SATURATION = {
    "low, high": "95% bootstrap interval over documents",
    "chance": "uniform routing in both runs, k / E",
    "chance_given_loads": "independent choices at the two runs' loads",
    "shuffled": "mean with the other run's tokens turned round within each document, draws times: what documents have in common stays",
    "p": "probability that such a turn agrees as much",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        return int(globals()["_" + arguments.command.replace("-", "_")](arguments))
    except (RunError, TraceError, UploadError, ExportError, ModelError) as error:
        _say(f"error: {error}", sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away, as `head` does
        return 141
    except OSError as error:
        _say(f"error: {error.filename or arguments.command}: {error.strerror or error}", sys.stderr)
    except pa.ArrowException as error:
        _say(f"error: a file of the run cannot be read ({error}): try python -m analysis verify", sys.stderr)
    except MemoryError:
        _say("error: not enough memory: use a smaller --batch-size or fewer tokens", sys.stderr)
    except KeyboardInterrupt:
        _say("stopped", sys.stderr)
        return 130
    return 2


def _say(text: str, file: TextIO | None = None) -> None:
    """Print data text so that it cannot steer the terminal: what is not printable shows as its escape."""
    safe = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    stream = sys.stdout if file is None else file
    coding = stream.encoding or "utf-8"
    print(safe.encode(coding, "backslashreplace").decode(coding), file=stream)


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    if arguments.label is not None and not arguments.text:
        raise UploadError("--label names the texts given with --text; files carry labels in a column or field of their own")
    prompts = [Prompt(t, arguments.label, f"text {i}") for i, t in enumerate(arguments.text, 1)]
    if any(not p.text.strip() for p in prompts):
        raise UploadError("a text given with --text is empty")
    several = len(arguments.input) > 1
    for path in arguments.input:
        try:
            found = read_prompts(path.read_bytes(), path.name, UNLIMITED)
        except OSError as error:
            raise UploadError(f"{path} cannot be read: {error.strerror}") from None
        except UploadError as error:
            raise UploadError(f"{path}: {error}") from None
        prompts += [replace(p, name=f"{path.name}: {p.name}") for p in found] if several else found
    if not prompts:
        raise UploadError("give text with --input or --text")
    return prompts


def _capture(arguments: argparse.Namespace) -> int:
    out = Place.of(arguments.out)
    valid_run_name(out.name)
    if out.folder is None and not arguments.cluster:
        raise RunError(
            "an address takes parts from a cluster: give --cluster, or capture into a folder and copy it: python -m analysis copy"
        )
    prompts = _prompts(arguments)
    _before_torch()
    from .capture import CaptureError, capture
    from .proofs import canary
    from .routers import RouterError

    options: dict[str, Any] = {
        "labels": [p.label for p in prompts], "names": [p.name for p in prompts], "out": arguments.out, "batch_size": arguments.batch_size,
        "new_tokens": arguments.new_tokens, "max_tokens": arguments.max_tokens, "probabilities": arguments.probabilities, "weights": arguments.weights,
        "progress": _show_progress,
    }  # fmt: skip
    texts = [p.text for p in prompts]
    try:
        if arguments.cluster:
            from .cluster import Cluster, capture_on_cluster

            cluster = Cluster(arguments.cluster, arguments.workers, arguments.threads, arguments.gpus)
            trace = capture_on_cluster(_checkpoint(arguments), texts, cluster=cluster, loading=_loading(arguments), **options)
        else:
            folder, model, tokenizer = _load(arguments)
            canary(model)
            trace = capture(model, tokenizer, texts, model_path=folder, **options)
    except (CaptureError, RouterError) as error:
        _say(f"\nerror: {error}", sys.stderr)
        return 2
    except OSError as error:
        begun = out.folder is None or (out.folder / "progress").is_dir()
        more = "; finished parts are kept: repeat the same command to go on after them" if begun else ""
        _say(f"\nerror: {arguments.out}: {error.strerror or error}{more}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        _say(f"\nstopped: finished parts are kept in {arguments.out}; repeat the same command to go on after them", sys.stderr)
        return 130
    streams = dict.fromkeys(x.stream for x in trace.layers)
    tokens = ", ".join(f"{trace.n_tokens(s):,} {s} tokens" for s in streams)
    _say(f"\n{arguments.out}: {tokens}, {len(trace.layers)} routed layers", sys.stderr)
    if trace.weights_note:
        _say(trace.weights_note, sys.stderr)
    return 0


def _show_progress(done: Progress) -> None:
    total = "?" if done.total is None else done.total
    rate = done.tokens / done.seconds if done.seconds else 0.0
    print(f"\r{done.documents}/{total} documents, {done.tokens:,} tokens, {rate:,.0f} tokens/s ", end="", file=sys.stderr)


def _before_torch() -> None:
    """Settings that torch and transformers read when they are imported."""
    # Spinning OpenMP threads make a small model slower by orders of magnitude where the cores are busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Hub kernels are a code download: off unless the operator says otherwise.
    os.environ.setdefault("USE_HUB_KERNELS", "0")


def _checkpoint(arguments: argparse.Namespace) -> Path:
    hub = arguments.hub or arguments.allow_download
    return find_checkpoint(arguments.model, hub=hub, revision=arguments.revision, download=arguments.allow_download)


def _loading(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the options of a command say to load_model."""
    return {"dtype": arguments.dtype, "device_map": arguments.device_map, "offload_folder": arguments.offload_folder}


def _load(arguments: argparse.Namespace) -> tuple[Path, Any, Any]:
    """(folder, model, tokenizer) as the options of a command say. Raises ModelError."""
    folder = _checkpoint(arguments)
    import torch

    from .models import load_model

    torch.set_num_threads(arguments.threads)
    return folder, *load_model(folder, **_loading(arguments))


def _params(arguments: argparse.Namespace) -> int:
    if arguments.config in EXAMPLES:
        return _example(EXAMPLES[arguments.config], arguments.json)
    _before_torch()
    from .params import read_size
    from .routers import RouterError

    try:
        size = read_size(Path(arguments.config))
    except RouterError as error:
        raise ModelError(str(error)) from error
    _say(json.dumps(size.to_json(), indent=1) if arguments.json else "\n".join(size.lines()))
    return 0


def _example(example: Example, as_json: bool) -> int:
    m, w = example.mixture, weigh(example.mixture)
    if as_json:
        _say(json.dumps({"name": example.name, "status": example.status, "mixture": asdict(m), "weight": w.to_json()}, indent=1))
        return 0
    memory = ", ".join(f"{n / 1e9:,.0f} GB in {name}" for name, n in w.bytes.items())
    _say(f"{example.title}\n{example.status}\n")
    _say(
        f"  experts {m.experts}, {m.top_k} per token, {m.layers} layers\n  total   {w.total:,} parameters ({w.experts_total:,} in experts)"
    )
    _say(f"  active  {w.active:,} per token ({w.experts_active:,} in experts)\n  memory  {memory}\n\n{example.note}")
    return 0


def _verify_model(arguments: argparse.Namespace) -> int:
    _before_torch()
    from .capture import CaptureError
    from .proofs import DIFFERS, NOT_CHECKED, verify_model
    from .routers import RouterError

    try:
        folder, model, tokenizer = _load(arguments)
        proofs = verify_model(model, tokenizer)
    except (CaptureError, RouterError) as error:
        raise ModelError(str(error)) from error
    for p in proofs:
        _say(f"{p.verdict:12} {f'{p.where}: ' if p.where else ''}{p.name}: {p.detail}")
    wrong, unknown = (sum(p.verdict == v for p in proofs) for v in (DIFFERS, NOT_CHECKED))
    open_ones = f", {unknown} not checked" if unknown else ""
    _say(f"{folder}: {f'{wrong} of {len(proofs)} proofs differ' if wrong else f'{len(proofs) - unknown} proofs pass'}{open_ones}")
    return 1 if wrong else 0


def _stats(arguments: argparse.Namespace) -> int:
    trace = open_run(arguments.run)
    if arguments.cluster:
        from .cluster import Cluster, statistics_on_cluster

        if not same_counts(trace.stats, statistics_on_cluster(arguments.run, Cluster(arguments.cluster)), trace.weights_kept):
            raise RunError(f"{trace.name}: its statistics are not those of its decisions, counted again: try python -m analysis verify")
        _say(
            "counted again from the recorded decisions on the cluster: equal to the stored statistics\n",
            sys.stderr if arguments.json else None,
        )
    if arguments.json:
        print(export_bytes(trace, "balance", "json").decode(), end="")
        return 0
    table = balance_table(trace).to_pandas()
    table.insert(0, "", [x.title for x in trace.layers])
    _say(f"{trace.name}: {trace.model.name} ({trace.model.family}), one column per routed layer, n = tokens\n")
    if trace.weights_note:
        _say(f"{trace.weights_note}\n")
    shown = table.drop(columns=["site", "layer", "stack"]).set_index("").T
    # One metric a line, so that the definitions can stand below and the table stays narrow; 8 layers fit 100 columns.
    for start in range(0, shown.shape[1], 8):
        block = shown.iloc[:, start : start + 8]
        _say(block.to_string(float_format=lambda x: f"{x:,.0f}" if x == int(x) else f"{x:.4g}", na_rep="-") + "\n")
    for metric in METRICS.values():
        lacks = f"; -: not defined without {metric.needs}" if table[metric.name].isna().any() else ""
        _say(f"  {metric.name}: {metric.definition} [{metric.unit}]; by chance: {metric.chance_here(trace)}{lacks}")
    return 0


def _layers_done(done: int, total: int) -> None:
    print(f"\r{done}/{total} layers ", end="\n" if done == total else "", file=sys.stderr)


def _compare(arguments: argparse.Namespace) -> int:
    runs = open_run(arguments.run), open_run(arguments.other)
    table, term = saturation(*runs, _layers_done), GLOSSARY["router_saturation"]
    names = [x.name for x in runs]
    if arguments.json:
        rows = [{k: None if v != v else v for k, v in row.items()} for row in table.to_pylist()]  # JSON knows no NaN
        _say(json.dumps({"run": names[0], "other": names[1], "metric": term.name, "definition": term.definition, "rows": rows}, indent=1))
        return 0
    shown = table.to_pandas().drop(columns=["site", "layer"])
    shown.index = [x.title for x in runs[0].layers]
    _say(f"{names[0]} and {names[1]}: router saturation, one row per routed layer, n = tokens of both runs\n")
    _say(shown.to_string(formatters={"n": "{:,}".format}, float_format="{:.4f}".format) + "\n")
    for name, text in {"saturation": f"{term.definition} [{term.source}]", **SATURATION}.items():
        _say(f"  {name}: {text}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    problems = verify_run(arguments.run)
    _say("\n".join(problems) if problems else f"{arguments.run}: sound")
    return 1 if problems else 0


def _export(arguments: argparse.Namespace) -> int:
    trace = open_run(arguments.run)
    settings = {n: v for n in ("batch_tokens", "order", "preset", "policy", "scope", "size") if (v := getattr(arguments, n)) is not None}
    if arguments.describe:
        print(json.dumps(describe(trace, arguments.table, settings), indent=1))
        return 0
    rows = export_table(trace, arguments.table, arguments.format, arguments.output, settings)
    _say(f"{arguments.output}: {rows:,} rows")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    # Streamlit's own log would say that no page is open.
    logging.getLogger("streamlit").setLevel(logging.ERROR)
    from app.report import write_report

    size = write_report(open_run(arguments.run), arguments.output)
    _say(f"{arguments.output}: {size / 1e6:,.1f} MB")
    return 0


def _copy(arguments: argparse.Namespace) -> int:
    from .copying import copy_run

    size = copy_run(arguments.source, arguments.target, lambda done, total: print(f"\r{done}/{total} files ", end="", file=sys.stderr))
    _say(f"\n{arguments.target}: {size / 1e6:,.1f} MB", sys.stderr)
    return 0


def _runs(arguments: argparse.Namespace) -> int:
    if not arguments.folder.is_dir():
        raise RunError(f"there is no folder {arguments.folder}")
    found = list_runs(arguments.folder)
    for run in found:
        state = "" if run.complete else "  UNFINISHED"
        took = "" if run.seconds is None else f"in {run.seconds:,.0f} s"
        _say(f"{run.name:32} {run.n_tokens:>12,} tokens  {run.bytes / 1e6:>9.1f} MB  {took:>10}  {run.created}  {run.model}{state}")
    if not found:
        _say(f"no runs in {arguments.folder}")
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    delete_run(arguments.folder, arguments.name)
    _say(f"deleted {arguments.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
