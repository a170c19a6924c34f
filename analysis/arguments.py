"""What the command line understands: every command with its options, its help and an example."""

from __future__ import annotations

import argparse
from pathlib import Path

from .export import FORMATS, TABLES
from .rounding import LARGEST_ERROR, WEIGHTS
from .whatif import EXAMPLES

MOST = 10**12
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _whole(text: str, least: int, most: int = MOST) -> int:
    """A number given on the command line; what is none, or beyond what any count can be, is said in words."""
    try:
        n = int(text)
    except ValueError:
        n = least - 1
    if not least <= n <= most:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number from {least} to {most:,}")
    return n


def _at_least_one(text: str) -> int:
    return _whole(text, 1)


def _threads(text: str) -> int:
    return _whole(text, 1, 1_024)


def _address(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: give auto, or host:port")
    return text


def _at_least_none(text: str) -> int:
    return _whole(text, 0)


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
    _add_capture_options(capture)
    params = add("params", "print what a model weighs, from its config alone: experts, total and active parameters, bytes",
                 "params data/demo-model")  # fmt: skip
    params.add_argument("config", help=f"a config.json, a model folder, or an example to learn from: {', '.join(EXAMPLES)}")
    params.add_argument("--json", action="store_true", help="print JSON")
    verify_model = add("verify-model", "prove on a checkpoint that what is captured is what it executes; status 1 where it differs",
                       "verify-model data/demo-model")  # fmt: skip
    verify_model.add_argument("model", help="folder of a transformers checkpoint, or a hub id with --hub")
    _add_model_options(verify_model)
    stats = add("stats", "print a run's load balance per layer", "stats data/demo-run")
    compare = add("compare", "print how far two runs over the same tokens choose the same experts, per layer, with interval and chance",
                  "compare data/runs/early data/runs/late")  # fmt: skip
    compare.add_argument("run", help="folder or address of a run")
    compare.add_argument("other", help="another over the same texts and tokenizer, such as a later checkpoint's")
    compare.add_argument("--json", action="store_true", help="print JSON")
    verify = add("verify", "check every file, invariant and count of a run", "verify data/demo-run")
    export = add("export", "write a table of a run", "export data/demo-run --table load --format csv -o load.csv")
    report = add("report", "write one HTML file of a run's main views that opens without a network", "report data/demo-run -o report.html")
    for command in (stats, verify, export, report):
        command.add_argument("run", help="folder or address (s3://..., gs://...) of the run")
    _add_cluster_options(stats)
    stats.add_argument("--json", action="store_true", help="print the table, n and the definitions as JSON")
    _add_export_options(export)
    report.add_argument("-o", "--output", type=Path, required=True, help="the file to write")
    copy = add("copy", "copy a finished run to or from a folder or an object store, every digest checked where it arrives",
               "copy data/demo-run s3://bucket/runs/demo-run")  # fmt: skip
    copy.add_argument("source", help="a run's folder, or its address (s3://..., gs://..., as pyarrow.fs reads them)")
    copy.add_argument("target", help="the new run's folder or address")
    runs = add("runs", "list the runs in a folder", "runs data/runs")
    runs.add_argument("folder", type=Path)
    delete = add("delete", "delete a run for good", "delete data/runs mine")
    delete.add_argument("folder", type=Path)
    delete.add_argument("name")
    return whole


def _add_export_options(export: argparse.ArgumentParser) -> None:
    export.add_argument(
        "--table", choices=sorted(TABLES), required=True, help="; ".join(f"{t.name}: {t.definition}" for t in TABLES.values())
    )
    export.add_argument("--format", choices=FORMATS, default="parquet")
    _add_table_settings(export)
    to = export.add_mutually_exclusive_group(required=True)
    to.add_argument("-o", "--output", type=Path, help="the file to write")
    to.add_argument("--describe", action="store_true", help="print what the table means, as JSON, and write nothing")


def _add_capture_options(capture: argparse.ArgumentParser) -> None:
    capture.add_argument("--model", required=True, help="folder of a transformers checkpoint, or a hub id with --hub")
    _add_model_options(capture)
    capture.add_argument("--input", type=Path, action="append", default=[], help=".txt, .csv or .jsonl; may be repeated")
    capture.add_argument("--text", action="append", default=[], help="a document given here; may be repeated")
    capture.add_argument("--label", help="label of the documents given with --text")
    capture.add_argument("--out", required=True, help="folder of the new run; with --cluster also an address (s3://..., gs://...)")
    capture.add_argument("--batch-size", type=_at_least_one, default=8, help="documents per forward pass (default 8)")
    capture.add_argument("--new-tokens", type=_at_least_none, default=0, help="continue each document greedily by so many tokens")
    capture.add_argument("--max-tokens", type=_at_least_one, help="refuse longer documents (default: the model's context)")
    capture.add_argument("--probabilities", action="store_true", help="keep every expert's probability (large)")
    capture.add_argument("--weights", choices=WEIGHTS, default="exact",
                         help=f"how gate weights are kept: exact (default), rounded to 8 bits (within {100 * LARGEST_ERROR:.1f} %%), or not at all: then only"
                         " sums of them, counted while recording, are known")  # fmt: skip
    _add_cluster_options(capture)
    capture.add_argument("--workers", type=_at_least_one, help="with --cluster: copies of the model (default: as many as have room)")
    capture.add_argument("--gpus", type=_at_least_none, default=0, help="with --cluster: GPUs per copy (default 0)")


def _add_table_settings(export: argparse.ArgumentParser) -> None:
    """What the tables of batches and of capacity depend on; None: as on the page where nothing is chosen."""
    told = export.add_argument_group("settings of a table")
    told.add_argument("--batch-tokens", type=_at_least_one, help="batches: tokens that fill one (default 1024; 1: each document)")
    told.add_argument("--order", choices=("mixed", "recorded"),
                      help="batches, capacity: documents shuffled with seed 0 (default), or as recorded")  # fmt: skip
    told.add_argument("--preset", help="capacity: whose arithmetic (default megatron)")
    told.add_argument("--policy", help="capacity: who is served first (default: as the preset has it)")
    told.add_argument("--scope", choices=("document", "documents", "tokens", "run"),
                      help="capacity: what is routed together (default documents)")  # fmt: skip
    told.add_argument("--size", type=_at_least_one, help="capacity: documents or tokens per batch (default 16 or 4096)")


def _add_cluster_options(command: argparse.ArgumentParser) -> None:
    text = "spread the work over a Ray cluster: host:port, or auto (the one running here, else one started for this command)"
    command.add_argument("--cluster", type=_address, metavar="auto|ADDRESS", help=text)


def _add_model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--hub", action="store_true", help="the model is a hub id (owner/name) in the local hub cache; needs --revision")
    command.add_argument("--allow-download", action="store_true", help="as --hub, but fetch from the hub what the cache lacks")
    command.add_argument("--revision", help="commit of a hub model, 40 hex digits")
    command.add_argument("--dtype", default="auto", choices=DTYPES, help="auto (default) is as stored")
    command.add_argument("--device-map", choices=("auto",), help="spread a model larger than a device over GPUs, memory and disk")
    command.add_argument("--offload-folder", type=Path, help="with --device-map: a folder for weights that fit nowhere else")
    command.add_argument("--threads", type=_threads, default=1, help="CPU threads (default 1: small models are fastest so)")
