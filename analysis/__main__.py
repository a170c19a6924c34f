"""The command line: python -m analysis capture | stats | verify | export | runs | delete. Errors are one sentence, exit 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .export import FORMATS, TABLES, ExportError, export_table
from .metrics import METRICS, balance_table
from .store import RunError, delete_run, list_runs, open_run, verify_run
from .trace import TraceError
from .untrusted import Prompt, UploadError, read_prompts


def parser() -> argparse.ArgumentParser:
    """The whole command line, with an example per command."""
    whole = argparse.ArgumentParser(prog="python -m analysis", description="Routing of mixture-of-experts models, exactly.")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, example: str) -> argparse.ArgumentParser:
        style = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, help=text, description=text, formatter_class=style,
                                   epilog=f"example:\n  python -m analysis {example}")  # fmt: skip

    capture = add("capture", "run a model over text and record its routing; resumes an interrupted run",
                  "capture --model data/demo-model --input prompts.jsonl --out data/runs/mine")  # fmt: skip
    capture.add_argument("--model", required=True, help="folder of a transformers checkpoint, or a hub id with --hub")
    capture.add_argument("--hub", action="store_true", help="allow a download; needs --revision")
    capture.add_argument("--revision", help="commit of a hub model, 40 hex digits")
    capture.add_argument("--input", type=Path, action="append", default=[], help=".txt, .csv or .jsonl; may be repeated")
    capture.add_argument("--text", action="append", default=[], help="a document given here; may be repeated")
    capture.add_argument("--label", help="label of the documents given with --text")
    capture.add_argument("--out", type=Path, required=True, help="folder of the new run")
    capture.add_argument("--batch-size", type=int, default=8, help="documents per forward pass (default 8)")
    capture.add_argument("--new-tokens", type=int, default=0, help="continue each document greedily by so many tokens")
    capture.add_argument("--max-tokens", type=int, help="refuse longer documents (default: the model's context)")
    capture.add_argument("--probabilities", action="store_true", help="keep every expert's probability (large)")
    capture.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, float16")
    capture.add_argument("--threads", type=int, default=1, help="CPU threads (default 1: small models are fastest so)")
    stats = add("stats", "print a run's load balance per layer", "stats data/demo-run")
    verify = add("verify", "check every file, invariant and count of a run", "verify data/demo-run")
    export = add("export", "write a table of a run", "export data/demo-run --table load --format csv -o load.csv")
    for command in (stats, verify, export):
        command.add_argument("run", type=Path, help="folder of the run")
    export.add_argument("--table", choices=sorted(TABLES), required=True, help="; ".join(f"{t.name}: {t.definition}" for t in TABLES.values()))
    export.add_argument("--format", choices=FORMATS, default="parquet")
    export.add_argument("-o", "--output", type=Path, required=True)
    runs = add("runs", "list the runs in a folder", "runs data/runs")
    runs.add_argument("folder", type=Path)
    delete = add("delete", "delete a run for good", "delete data/runs mine")
    delete.add_argument("folder", type=Path)
    delete.add_argument("name")
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        return int(globals()[f"_{arguments.command}"](arguments))
    except (RunError, TraceError, UploadError, ExportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    prompts = [Prompt(t, arguments.label, f"text {i}") for i, t in enumerate(arguments.text, 1)]
    for path in arguments.input:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UploadError(f"{path} cannot be read: {error.strerror}") from None
        prompts += read_prompts(data, path.name)
    if not prompts:
        raise UploadError("give text with --input or --text")
    return prompts


def _capture(arguments: argparse.Namespace) -> int:
    prompts = _prompts(arguments)
    # Spinning OpenMP threads make a small model slower by orders of magnitude where the cores are busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from .capture import CaptureError, Progress, capture
    from .models import ModelError, load_model
    from .routers import RouterError

    torch.set_num_threads(arguments.threads)

    def show(p: Progress) -> None:
        total = "?" if p.total is None else p.total
        rate = p.tokens / p.seconds if p.seconds else 0.0
        print(f"\r{p.documents}/{total} documents, {p.tokens:,} tokens, {rate:,.0f} tokens/s ", end="", file=sys.stderr)

    try:
        model, tokenizer = load_model(arguments.model, hub=arguments.hub, revision=arguments.revision, dtype=arguments.dtype)
        trace = capture(
            model, tokenizer, [p.text for p in prompts], labels=[p.label for p in prompts], names=[p.name for p in prompts],
            out=arguments.out, model_path=arguments.model, batch_size=arguments.batch_size, new_tokens=arguments.new_tokens,
            max_tokens=arguments.max_tokens, probabilities=arguments.probabilities, progress=show,
        )  # fmt: skip
    except (ModelError, CaptureError, RouterError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: repeat the same command to resume where it was", file=sys.stderr)
        return 130
    print(f"\n{arguments.out}: {trace.n_tokens():,} tokens, {len(trace.layers)} routed layers", file=sys.stderr)
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    trace = open_run(arguments.run)
    table = balance_table(trace)
    print(f"{trace.model.name} ({trace.model.family}); columns: " + "; ".join(f"{m.name} = {m.definition}" for m in METRICS.values()))
    print(table.to_pandas().round(4).to_string(index=False))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    problems = verify_run(arguments.run)
    print("\n".join(problems) if problems else f"{arguments.run}: sound")
    return 1 if problems else 0


def _export(arguments: argparse.Namespace) -> int:
    rows = export_table(open_run(arguments.run), arguments.table, arguments.format, arguments.output)
    print(f"{arguments.output}: {rows:,} rows")
    return 0


def _runs(arguments: argparse.Namespace) -> int:
    for run in list_runs(arguments.folder):
        state = "" if run.complete else "  UNFINISHED"
        print(f"{run.name:32} {run.n_tokens:>12,} tokens  {run.bytes / 1e6:>9.1f} MB  {run.created}  {run.model}{state}")
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    delete_run(arguments.folder, arguments.name)
    print(f"deleted {arguments.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
