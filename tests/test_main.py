import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from analysis.__main__ import main, parser
from analysis.capacity import capacity_curves
from analysis.capture import capture
from analysis.export import TABLES
from analysis.metrics import balance_table
from analysis.paths import saturation
from analysis.store import open_run

from . import tiny
from .families import FAMILIES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.build("mixtral").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def test_the_whole_way(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"text": "one", "label": "x"}) + "\n" + json.dumps({"text": "two"}))
    run = str(tmp_path / "run")
    assert main(["capture", "--model", model, "--input", str(prompts), "--text", "three", "--label", "y", "--out", run]) == 0
    trace = open_run(run)
    assert trace.n_tokens() == 11 and trace.labels == ("x", "y") and trace.model.family == "mixtral"
    assert main(["verify", run]) == 0 and main(["stats", run]) == 0 and main(["runs", str(tmp_path)]) == 0
    assert "maxvio" in capsys.readouterr().out
    assert main(["export", run, "--table", "load", "--format", "json", "-o", str(tmp_path / "l.json")]) == 0
    assert len(json.loads((tmp_path / "l.json").read_text())["rows"]) == 16
    next((tmp_path / "run" / "routing").iterdir()).write_bytes(b"x")
    assert main(["verify", run]) == 1 and main(["stats", run]) == 2
    assert main(["delete", str(tmp_path), "run"]) == 0 and not Path(run).exists()


DEPARTING = ("llama4", "jetmoe", "longcat_flash", "doge", "zaya", "switch_transformers", "qwen3_vl_moe", "nemotron_h")


@pytest.mark.parametrize("family", DEPARTING)
def test_the_whole_way_for_families_that_depart(family: str, tmp_path: Path) -> None:
    """Two sites a layer, special classes, native drops, weights on the input, a text tower alone: captured, read, exported."""
    model = FAMILIES[family].build()
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    folder, run, text = str(tmp_path / "model"), str(tmp_path / "run"), "Il pleut, é選🎉"
    assert main(["params", folder]) == 0 and main(["verify-model", folder]) == 0
    assert main(["capture", "--model", folder, "--text", text, "--text", "x", "--out", run]) == 0
    trace, direct = open_run(run), capture(model, tiny.tokenizer(), [text, "x"])
    assert main(["verify", run]) == 0 and main(["stats", run]) == 0
    assert len(trace.layers) > 0 and trace.model.architecture == type(model).__name__
    for layer in trace.layers:
        assert np.array_equal(trace.experts(layer.index), direct.experts(layer.index))
        assert np.array_equal(trace.chosen(layer.index), direct.chosen(layer.index))
    for table in TABLES:
        asked = ["--policy", "position"] if table == "capacity" else []  # of natively dropped assignments the weights are not known
        for kind in ("csv", "parquet"):
            assert main(["export", run, "--table", table, *asked, "--format", kind, "-o", str(tmp_path / f"{table}.{kind}")]) == 0
    kept, read = pq.read_table(tmp_path / "decisions.parquet"), pd.read_csv(tmp_path / "decisions.csv")
    assert kept.num_rows == len(read) == sum(trace.n_tokens(x.stream) for x in trace.layers)
    load = pq.read_table(tmp_path / "load.parquet").to_pandas()
    for layer in trace.layers:
        ids = trace.experts(layer.index)
        counts = [int((ids == e).sum()) for e in range(layer.n_classes)]
        assert load[load.site == layer.index].assignments.tolist() == counts and sum(counts) == (ids >= 0).sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["capture", "--model", "{model}", "--out", "{tmp}/r"], "give text"), (["capture", "--model", "/none", "--text", "a", "--out", "{tmp}/r"], "no model at"),
     (["capture", "--model", "{model}", "--text", "{long}", "--out", "{tmp}/r"], "the limit is 256"), (["stats", "{tmp}/none"], "not a finished run"),
     (["capture", "--model", "{model}", "--input", "{tmp}/none.txt", "--out", "{tmp}/r"], "cannot be read"),
     (["capture", "--model", "x/y", "--hub", "--text", "a", "--out", "{tmp}/r"], "40 hex"), (["delete", "{tmp}", "../x"], "run name")],
)  # fmt: skip
def test_errors_are_one_sentence(
    arguments: list[str], message: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"{model}": model, "{tmp}": str(tmp_path), "{long}": "x" * 300}
    for key, value in values.items():
        arguments = [a.replace(key, value) for a in arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "Traceback" not in error


def test_params_of_a_folder_a_file_and_an_example(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    loaded = tiny.build("mixtral")
    assert found["total"] == sum(p.numel() for p in loaded.parameters()) and len(found["sites"]) == 2
    assert main(["params", f"{model}/config.json"]) == 0
    shown = capsys.readouterr().out
    assert (
        f"{found['total']:,}" in shown and f"{found['active_without_embedding']:,}" in shown and f"{found['sites'][0]['expert']:,}" in shown
    )
    assert main(["params", "gpt-4-rumour"]) == 0
    shown = capsys.readouterr().out
    assert "RUMOUR" in shown and "1,760,000,000,000" in shown
    assert main(["params", "64x16b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["weight"]["experts_active"]) == ("EXAMPLE: round numbers, no real model", 128 * 10**9)


def test_params_needs_no_weights_and_its_errors_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    for values, message in (
        ({"model_type": "\x1b[2Jevil"}, "'\\x1b[2Jevil' is unknown"),
        ({"model_type": "llama", "num_hidden_layers": 1}, "no router layers"),
        ({"model_type": "mixtral", "num_hidden_layers": 10**9}, "more than any model has"),
    ):
        config.write_text(json.dumps(values))
        assert main(["params", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1 and "\x1b" not in error
    assert main(["params", str(tmp_path / "none")]) == 2


def test_verify_model_says_pass_or_what_differs(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["verify-model", model]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 8 and all(line.startswith("pass ") for line in shown[:7]) and shown[-1].endswith("tiny: 7 proofs pass")
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    honest = MixtralExperts.forward
    monkeypatch.setattr(MixtralExperts, "forward", lambda self, hidden_states, top_k_index, top_k_weights: honest(
        self, hidden_states, (top_k_index + 1) % 8, top_k_weights))  # fmt: skip
    assert main(["verify-model", model]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("differs ") for line in shown) == 2 and shown[-1].endswith("2 of 7 proofs differ")
    assert main(["verify-model", "/none"]) == 2 and capsys.readouterr().err.startswith("error: no model at")


def test_capture_refuses_a_model_that_routes_at_random(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    honest = MixtralTopKRouter.forward
    monkeypatch.setattr(MixtralTopKRouter, "forward", lambda self, hidden: honest(self, torch.randn_like(hidden)))
    assert main(["capture", "--model", model, "--text", "a", "--out", str(tmp_path / "r")]) == 2
    assert "cannot be captured exactly" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_capture_from_the_hub_records_its_commit(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from .hub import COMMIT, NAME, local_hub

    out = str(tmp_path / "r")
    command = ["capture", "--model", NAME, "--revision", COMMIT, "--text", "one", "--out", out]
    with local_hub(tmp_path / "cache", monkeypatch) as hub:
        hub.files = {p.name: p.read_bytes() for p in Path(model).iterdir()}
        assert main(command) == 2 and "a hub id needs --hub" in capsys.readouterr().err
        assert main([*command, "--hub"]) == 2 and "add --allow-download" in capsys.readouterr().err
        assert hub.asked == []
        assert main([*command, "--allow-download"]) == 0
        hub.refusal = (403, "GatedRepo")
        other = command.index(COMMIT)
        command[other] = COMMIT[::-1]
        assert main([*command, "--allow-download"]) == 2
    assert f"error: {NAME} is gated" in capsys.readouterr().err
    card = open_run(out).model
    assert (card.name, card.revision, card.family) == (NAME, COMMIT, "mixtral")


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    commands = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    told = ("capture", "params", "verify-model", "stats", "compare", "verify", "export", "report", "runs", "copy", "delete")
    assert set(commands) == set(told)
    for name in commands:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert f"python -m analysis {name}" in capsys.readouterr().out


def test_an_interrupted_capture_resumes(model: str, tmp_path: Path) -> None:
    from analysis.capture import CaptureCancelled, CaptureError, capture
    from analysis.models import load_model

    loaded, tokenizer = load_model(model)
    texts = [f"document {i}" for i in range(9)]
    done = []
    with pytest.raises(CaptureCancelled):
        capture(
            loaded,
            tokenizer,
            texts,
            out=tmp_path / "r",
            batch_size=1,
            part_tokens=30,
            progress=done.append,
            cancelled=lambda: len(done) >= 5,
        )
    with pytest.raises(CaptureError, match="document 2 differs"):
        capture(loaded, tokenizer, ["document 0", "another", *texts[2:]], out=tmp_path / "r", batch_size=1, part_tokens=30)
    with pytest.raises(CaptureError, match="1 texts were given, but this interrupted run has recorded"):
        capture(loaded, tokenizer, texts[:1], out=tmp_path / "r", batch_size=1, part_tokens=30)
    resumed = capture(loaded, tokenizer, texts, out=tmp_path / "r", batch_size=1, part_tokens=30)
    whole = capture(loaded, tokenizer, texts, batch_size=1, part_tokens=30)
    from .synthetic import differences

    assert differences(whole, resumed) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["capture", "--model", "{tmp}", "--text", "a", "--out", "{tmp}/Bad Name"], "run name"),
        (["capture", "--model", "{tmp}", "--text", " ", "--out", "{tmp}/r"], "--text is empty"),
        (["capture", "--model", "{tmp}", "--input", "{tmp}/p.txt", "--label", "x", "--out", "{tmp}/r"], "--label names"),
        (["capture", "--model", "{tmp}", "--input", "{tmp}/bad.jsonl", "--out", "{tmp}/r"], "bad.jsonl: line 1"),
        (["runs", "{tmp}/none"], "there is no folder"),
        (["export", "data/demo-run", "--table", "load", "-o", "{tmp}"], "Is a directory"),
        (["export", "data/demo-run", "--table", "load", "-o", "/proc/none/l.csv"], "No such file"),
    ],
)
def test_more_errors_are_one_sentence(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("text")
    (tmp_path / "bad.jsonl").write_text("{")
    assert main([a.replace("{tmp}", str(tmp_path)) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("option", ["--batch-size=0", "--batch-size=x", "--new-tokens=-1", "--threads=0", "--max-tokens=0", "--dtype=int8",
                                    "--batch-size=99999999999999999999", "--threads=100000", "--cluster="])  # fmt: skip
def test_numbers_out_of_range_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["capture", "--model", "m", "--text", "a", "--out", "r", option])
    assert caught.value.code == 2 and option.split("=")[0] in capsys.readouterr().err


def test_what_a_model_is_called_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from .synthetic import make_trace

    trace = make_trace()
    hostile = replace(trace, model=replace(trace.model, name="\x1b[2J\u202eevil\r"))
    monkeypatch.setattr("analysis.__main__.open_run", lambda run: hostile)
    assert main(["stats", "run"]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b[2J\\u202eevil\\r" in shown and all(c.isprintable() or c == "\n" for c in shown)


def test_describe_says_what_a_csv_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "data/demo-run", "--table", "balance", "--describe"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["run"] == "demo-run" and about["tokens"]["decoder"] == open_run("data/demo-run").n_tokens()
    assert "Binomial" in about["definitions"]["chance_cv"]


def test_a_script_chooses_what_a_table_depends_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, target = ["export", "data/demo-run", "--table", "capacity", "--policy", "position", "--scope", "tokens"], str(tmp_path / "c.csv")
    assert main([*base, "--format", "csv", "-o", target]) == 0
    assert main([*base, "--size", "512", "--describe"]) == 0
    about = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert about["settings"] == {"preset": "megatron", "policy": "position", "scope": "tokens", "size": 512, "order": "mixed"}
    asked = capacity_curves(open_run("data/demo-run"), policy="position", scope="tokens", size=4_096, mixed=0)
    assert pd.read_csv(target)["dropped"].tolist() == asked["dropped"].to_pylist()
    assert main(["export", "data/demo-run", "--table", "load", "--size", "3", "-o", target]) == 2
    assert "the table load takes no size" in capsys.readouterr().err


def test_stats_as_json_are_the_balance_with_its_definitions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "data/demo-run", "--json"]) == 0
    told, table = json.loads(capsys.readouterr().out), balance_table(open_run("data/demo-run"))
    assert [r["cv"] for r in told["rows"]] == table["cv"].to_pylist() and told["about"]["definitions"].keys() == set(table.column_names)


def test_stats_shows_n_and_every_metric_with_its_definition(capsys: pytest.CaptureFixture[str]) -> None:
    from analysis.metrics import METRICS

    assert main(["stats", "data/demo-run"]) == 0
    shown = capsys.readouterr().out
    assert f"{open_run('data/demo-run').n_tokens():,}" in shown
    assert [m.name for m in METRICS.values() if f"  {m.name}: {m.definition}" not in shown] == []


def test_documents_of_several_files_keep_apart(model: str, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    inputs = [x for name in ("a.txt", "b.txt") for x in ("--input", str(tmp_path / name))]
    assert main(["capture", "--model", model, *inputs, "--out", str(tmp_path / "r")]) == 0
    assert open_run(tmp_path / "r").documents["name"].to_pylist() == ["a.txt: prompt 1", "b.txt: prompt 1"]


def test_a_corpus_is_not_limited_as_an_upload_is(model: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n' * 1_001)
    assert (
        main(["capture", "--model", model, "--input", str(tmp_path / "p.jsonl"), "--batch-size", "1001", "--out", str(tmp_path / "r")]) == 0
    )
    assert len(open_run(tmp_path / "r").documents) == 1_001


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(KeyboardInterrupt(), 130, "stopped: "), (OSError(28, "No space left on device"), 2, "/r: No space left on device; ")],
)
def test_ctrl_c_and_a_full_disk_keep_what_is_finished_and_say_so(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    said: str,
) -> None:
    """The interrupt arrives while the second part is written; repeating the command gives the uninterrupted run."""
    import sys

    from analysis import capture as whole
    from analysis.models import load_model
    from analysis.writing import RunWriter

    from .synthetic import differences

    texts = [f"document {i}" for i in range(9)]
    command = ["capture", "--model", model, "--out", str(tmp_path / "r"), "--batch-size", "1"]
    command += [x for t in texts for x in ("--text", t)]
    module = sys.modules["analysis.capture"]
    monkeypatch.setattr(module, "default_part_tokens", lambda layers: 30)
    write = RunWriter.write

    def interrupted(self: RunWriter, part: object) -> None:
        if self.parts == 1:
            raise error
        write(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "write", interrupted)
        assert main(command) == status
    told = capsys.readouterr().err
    assert said in told and "finished parts are kept" in told and "repeat the same command" in told
    assert not (tmp_path / "r/run.json").exists() and list((tmp_path / "r/routing").iterdir())
    assert main(command) == 0
    loaded, tokenizer = load_model(model)
    names = [f"text {i}" for i in range(1, 10)]
    assert differences(whole(loaded, tokenizer, texts, names=names, batch_size=1), open_run(tmp_path / "r")) == []


def test_two_runs_are_compared_layer_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["def f(x): return x" * 3, "Il pleut." * 5, "x"]
    for name, seed, mine in (
        ("early", 0, texts),
        ("late", 1, texts),
        ("elsewhere", 1, texts[:2]),
        ("one", 1, texts[:1]),
        ("uno", 0, texts[:1]),
    ):
        capture(tiny.build("olmoe", seed=seed), tiny.tokenizer(), mine, out=tmp_path / name)
    early, late, elsewhere, one, uno = (str(tmp_path / x) for x in ("early", "late", "elsewhere", "one", "uno"))
    expected = saturation(open_run(early), open_run(late)).to_pylist()
    assert main(["compare", early, late, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == expected and (told["run"], told["other"], told["metric"]) == ("early", "late", "router_saturation")
    assert main(["compare", early, late]) == 0
    shown, progress = capsys.readouterr()
    assert f"{len(expected)}/{len(expected)} layers" in progress
    lines = {" ".join(x.split()[:2]): x.split()[2:] for x in shown.splitlines() if x.startswith("layer ")}
    assert len(lines) == len(expected) > 1 and shown.count("95% bootstrap interval") == 1
    for row in expected:
        values = lines[f"layer {row['layer']}"]
        assert values[0] == f"{row['n']:,}" and values[1:4] == [f"{row[x]:.4f}" for x in ("saturation", "low", "high")]
    assert main(["compare", one, uno, "--json"]) == 0  # one document: no interval
    assert {(r["low"], r["high"]) for r in json.loads(capsys.readouterr().out)["rows"]} == {(None, None)}
    assert main(["compare", early, elsewhere]) == 2 and "not over the same token ids" in capsys.readouterr().err
    assert main(["compare", early, str(tmp_path / "missing")]) == 2
