"""Folders, shards and hub commits: what may be handed to transformers, and one sentence for everything else."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.checkpoints import ModelError, check_folder, find_checkpoint, hub_name, read_config

from . import tiny
from .hub import COMMIT, NAME, Hub, local_hub


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.build("olmoe").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> Iterator[Hub]:
    with local_hub(tmp_path / "cache", monkeypatch) as server:
        server.files = {p.name: p.read_bytes() for p in whole.iterdir()}
        server.files |= {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"\x80", "README.md": b"#", "original/model.pth": b"x"}
        yield server


def snapshot(cache: Path) -> Path:
    return cache / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT


# The hub


def test_a_download_fetches_one_commit_and_no_code(hub: Hub, tmp_path: Path, whole: Path) -> None:
    folder = find_checkpoint(NAME, hub=True, revision=COMMIT, download=True)
    assert hub_name(folder) == (NAME, COMMIT)
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}
    fetched = {p.rsplit("/", 1)[-1] for p in hub.asked if "/resolve/" in p}
    assert fetched == {p.name for p in whole.iterdir()}
    assert all((folder / p.name).read_bytes() == p.read_bytes() for p in whole.iterdir())


def test_what_is_in_the_cache_is_not_asked_for(hub: Hub) -> None:
    first = find_checkpoint(NAME, hub=True, revision=COMMIT, download=True)
    hub.asked.clear()
    assert find_checkpoint(NAME, hub=True, revision=COMMIT) == first
    assert find_checkpoint(NAME, hub=True, revision=COMMIT, download=True) == first
    assert hub.asked == []


def test_without_leave_nothing_is_asked(hub: Hub) -> None:
    with pytest.raises(ModelError, match="add --allow-download"):
        find_checkpoint(NAME, hub=True, revision=COMMIT)
    with pytest.raises(ModelError, match="--hub, or --allow-download"):
        find_checkpoint(NAME)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((403, "GatedRepo"), f"{NAME} is gated: ask for access"),
        ((401, "GatedRepo"), f"{NAME} is gated: ask for access"),
        ((404, "RepoNotFound"), f"the hub knows no model {NAME}, or it is private"),
        ((401, "RepoNotFound"), "or it is private"),
        ((404, "RevisionNotFound"), f"has no commit {COMMIT}"),
        ((403, "DisabledRepo"), "was disabled by the hub"),
        ((400, ""), "the hub answered 400"),
        ((418, ""), "the hub answered 418"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub: Hub, refusal: tuple[int, str], message: str) -> None:
    hub.refusal = refusal
    with pytest.raises(ModelError, match=message) as caught:
        find_checkpoint(NAME, hub=True, revision=COMMIT, download=True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_hub_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's library retries for 20 seconds; what it raises then is made at once here."""
    import httpx2
    import huggingface_hub

    def unreachable(*_: Any, local_files_only: bool = False, **__: Any) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("x")
        raise huggingface_hub.errors.LocalEntryNotFoundError("x") from httpx2.ConnectError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelError, match="the hub cannot be reached or broke off \\(ConnectError\\)"):
        find_checkpoint(NAME, hub=True, revision=COMMIT, download=True)


def test_a_full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    import huggingface_hub

    real = huggingface_hub.snapshot_download

    def full(*given: Any, **options: Any) -> str:
        if options.get("local_files_only"):
            return real(*given, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(ModelError, match="cannot be stored in the local hub cache: No space left"):
        find_checkpoint(NAME, hub=True, revision=COMMIT, download=True)


def test_offline_by_environment(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE forbids"):
        find_checkpoint(NAME, hub=True, revision=COMMIT, download=True)
    assert hub.asked == []


def test_a_broken_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.cut = "model.safetensors"
    with pytest.raises(ModelError, match="broke off") as caught:
        find_checkpoint(NAME, hub=True, revision=COMMIT, download=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="not \\(whole\\) in the local hub cache"):
        find_checkpoint(NAME, hub=True, revision=COMMIT)
    hub.cut = ""
    hub.asked.clear()
    folder = find_checkpoint(NAME, hub=True, revision=COMMIT, download=True)
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert not [p for p in hub.asked if p.endswith("/config.json")]


@pytest.mark.parametrize("name", ["one", "a/b/c", "../b", "a/..", "", "-a/b", "a/b\n", "https://x/y"])
def test_what_is_no_hub_id(name: str) -> None:
    with pytest.raises(ModelError, match="no hub id"):
        find_checkpoint(name, hub=True, revision=COMMIT, download=True)


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:-1], COMMIT.upper(), COMMIT + "\n"])
def test_a_revision_that_pins_nothing(hub: Hub, revision: str | None) -> None:
    with pytest.raises(ModelError, match="40 hex digits"):
        find_checkpoint(NAME, hub=True, revision=revision, download=True)
    assert hub.asked == []


def handmade(cache: Path, whole: Path) -> Path:
    """A cache as another tool or an older release leaves it: refs and snapshots, no listing."""
    folder = snapshot(cache)
    shutil.copytree(whole, folder)
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs/main").write_text(COMMIT)
    return folder


def test_a_cache_without_a_listing(hub: Hub, tmp_path: Path, whole: Path) -> None:
    folder = handmade(tmp_path / "cache", whole)
    assert find_checkpoint(NAME, hub=True, revision=COMMIT).samefile(folder)
    with pytest.raises(ModelError, match=f"the local cache holds {COMMIT}"):
        find_checkpoint(NAME, hub=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="not \\(whole\\)"):
        find_checkpoint(NAME, hub=True, revision=COMMIT)
    assert hub.asked == []
    assert find_checkpoint(NAME, hub=True, revision=COMMIT, download=True).samefile(folder)


def test_other_folders_have_no_hub_name(tmp_path: Path) -> None:
    assert hub_name(tmp_path) == ("", "")
    assert hub_name(Path("/x/models--a--b/snapshots/main")) == ("", "")
    assert hub_name(Path(f"/x/datasets--a--b/snapshots/{COMMIT}")) == ("", "")


# Folders


def test_missing_shards_and_an_index_that_leaves_the_folder(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(whole, folder)
    index = folder / "model.safetensors.index.json"
    for weight_map, message in (
        ({"a": "model.safetensors", "b": "model-2.safetensors"}, "'model-2.safetensors' and 0 more of the shards"),
        ({"a": "../../secret.safetensors"}, "no safetensors file beside it; refused"),
        ({"a": "/etc/x.safetensors"}, "refused"),
        ({"a": "pytorch_model.bin"}, "refused"),
        (["a"], "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelError, match=message):
            check_folder(folder)
    index.write_text("{")
    with pytest.raises(ModelError, match="has no weight_map"):
        check_folder(folder)
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    check_folder(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoConfig": "mod.C"}},
        {"text_config": {"auto_map": {"AutoConfig": "mod.C"}}},
        {"parts": [{"auto_map": {}}]},
        {"_attn_implementation_internal": "x/y"},
        {"attn_implementation": "x/y"},
        {"_attn_implementation": "x/y:kernel"},
        {"attn_implementation": {"text_config": "x/y"}},
        {"vision_config": {"experts_implementation": "x/y"}},
    ],
)
def test_code_is_refused_at_any_depth(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "mixtral"} | change))
    with pytest.raises(ModelError, match="asks for code"):
        read_config(path)


def test_a_native_implementation_is_no_code(tmp_path: Path) -> None:
    values = {"model_type": "mixtral", "attn_implementation": "sdpa", "experts_implementation": "eager"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path / "config.json") == values


def test_a_deep_config_does_not_exhaust_the_stack(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(900):
        deep = {"x": deep}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "deep": deep}))
    assert read_config(tmp_path / "config.json")["model_type"] == "mixtral"
