"""Where a checkpoint is, and whether it may be handed to transformers: a local folder, or one commit of a hub model.

Looks at names, sizes and JSON only, but for ``weights_digest``; does not know torch. Nothing is fetched unless a caller says
``download``; then only configuration, tokenizer and safetensors files of one pinned commit, never code or pickles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import folder_digest

CONFIG_LIMIT = 4_000_000
INDEX = "model.safetensors.index.json"
# What a plain checkpoint consists of. No *.py, *.bin, *.pt: what is not fetched cannot run.
FETCHED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt", "*.tiktoken")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
COMMIT = re.compile(r"[0-9a-f]{40}")


class ModelError(ValueError):
    """A model that will not be loaded; the message is one sentence with the reason and what to do."""


def find_checkpoint(path: str | Path, *, hub: bool = False, revision: str | None = None, download: bool = False) -> Path:
    """Folder of a checkpoint that passed ``check_folder``.

    ``path`` is a folder; with ``hub`` it is a hub id (owner/name) at ``revision`` (40 hex digits), looked for in the local
    hub cache first and fetched only with ``download``. Raises ModelError.
    """
    if not hub:
        folder = Path(path)
        if not (folder / "config.json").is_file() and HUB_ID.fullmatch(str(path)) and not folder.exists():
            raise ModelError(f"no model at {str(path)!r}: a folder with config.json is needed; a hub id needs --hub, or --allow-download")
        check_folder(folder)
        return folder
    name = str(path)
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"{name!r} is no hub id: it has the form owner/name")
    if not COMMIT.fullmatch(revision or ""):
        raise ModelError("a hub model needs --revision with the full commit (40 hex digits), so that runs can be repeated" + _known(name))
    assert revision is not None
    folder = _cached(name, revision) or (_fetched(name, revision) if download else _absent(name, revision))
    check_folder(folder)
    return folder


def weights_digest(folder: Path) -> str:
    """As ModelCard.digest: sha256 hex over a folder's weights and configuration. Reads them all."""
    return folder_digest(folder, "*.safetensors", "config.json")


def hub_name(folder: Path) -> tuple[str, str]:
    """("owner/name", commit) of a folder in the hub cache, ("", "") of any other."""
    repository = folder.parent.parent.name.split("--")
    if folder.parent.name == "snapshots" and len(repository) == 3 and repository[0] == "models" and COMMIT.fullmatch(folder.name):
        return "/".join(repository[1:]), folder.name
    return "", ""


def check_folder(folder: Path) -> None:
    """Raise ModelError unless ``folder`` looks like a whole checkpoint that may be handed to transformers."""
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"no model at {str(folder)!r}: a folder with config.json is needed")
    read_config(config)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"no .safetensors weights in {str(folder)!r}: convert the checkpoint, other formats can run code")
    if missing := missing_shards(folder):
        raise ModelError(f"{missing[0]!r} and {len(missing) - 1} more of the shards that {INDEX} names are missing in {str(folder)!r}: "
                         "finish the download or copy")  # fmt: skip


def missing_shards(folder: Path) -> list[str]:
    """Weight files that the index names and the folder lacks, sorted. Raises ModelError for an index that is not one."""
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        shards = sorted({str(n) for n in named})
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{INDEX} in {str(folder)!r} has no weight_map: copy the checkpoint again") from error
    # A name with a path would let the checkpoint read files elsewhere on this machine.
    strange = [n for n in shards if not re.fullmatch(r"[\w.-]+\.safetensors", n)]
    if strange:
        raise ModelError(f"{INDEX} in {str(folder)!r} names {strange[0]!r}, which is no safetensors file beside it; refused")
    return [n for n in shards if not (folder / n).is_file()]


def read_config(path: Path) -> dict[str, Any]:
    """Values of a config.json that names a model type and asks for no code. Raises ModelError."""
    where = f"{path.name} in {str(path.parent)!r}"
    if not path.is_file():
        raise ModelError(f"there is no file {str(path)!r}: give a model's config.json or its folder")
    if path.stat().st_size > CONFIG_LIMIT:
        raise ModelError(f"{where} is over {CONFIG_LIMIT:,} bytes: that is no model config")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where} is not valid JSON") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ModelError(f"{where} names no model_type")
    if unwanted := sorted(_asks_for_code(values)):
        raise ModelError(f"{where} asks for code from elsewhere ({unwanted[0]}); refused")
    return values


def _asks_for_code(values: Any) -> Iterator[str]:
    """Keys, at any depth, by which transformers would import or download code (its own names for kernels hold no "/")."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        if isinstance(value, dict):
            waiting += value.values()
            yield from (k for k in value if k == "auto_map" or re.fullmatch(r"_.*_internal", k))
            yield from (k for k, v in value.items() if k.endswith("_implementation") and "/" in json.dumps(v))


def _cached(name: str, revision: str) -> Path | None:
    """Folder of this commit in the hub's local cache, None where it is absent or incomplete. No network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(FETCHED), local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    # The hub's library vouches for a snapshot only where it kept the listing; a cache copied by hand has none.
    whole = (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) and not missing_shards(folder)
    return folder if whole else None


def _absent(name: str, revision: str) -> Path:
    raise ModelError(f"{name} at {revision[:12]} is not (whole) in the local hub cache: add --allow-download, or give a folder")


def _fetched(name: str, revision: str) -> Path:
    """Download one commit, with the hub library's progress bars on stderr. Raises ModelError with one sentence."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FETCHED)))
    except Exception as error:  # besides its own, the hub's library lets through OSError and its HTTP library's errors
        raise ModelError(_refusal(name, revision, error)) from error


def _refusal(name: str, revision: str, error: Exception) -> str:
    """What went wrong with a download, and what to do."""
    from huggingface_hub import errors as hub

    at = f"{name} at {revision[:12]}"
    # "Not found locally" is said of every failed request when the cache has nothing either; the cause is the reason.
    if isinstance(error, hub.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, hub.OfflineModeIsEnabled):
        return f"{at} is not in the local hub cache, and HF_HUB_OFFLINE forbids a download: unset it"
    if isinstance(error, hub.GatedRepoError):
        return f"{name} is gated: ask for access on its page at the hub, then `hf auth login`, or give a local folder"
    if isinstance(error, hub.DisabledRepoError):
        return f"{name} was disabled by the hub: give a local folder"
    if isinstance(error, hub.RevisionNotFoundError):
        return f"{name} has no commit {revision}: its page at the hub lists them under Files, History"
    if isinstance(error, hub.RepositoryNotFoundError):
        return f"the hub knows no model {name}, or it is private: check the spelling, or `hf auth login`"
    if isinstance(error, hub.HfHubHTTPError):
        return f"the hub answered {error.response.status_code} for {at}: try again later, or give a local folder"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{at} cannot be stored in the local hub cache: {error.strerror}"
    return f"{at} is not in the local hub cache, and the hub cannot be reached or broke off ({type(error).__name__}): try again, or give a folder"


def _known(name: str) -> str:
    """Names the commit that the local cache holds as main, for an operator who has the model but not its number."""
    from huggingface_hub import constants

    main = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "refs", "main")
    commit = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    return f"; the local cache holds {commit}" if COMMIT.fullmatch(commit) else ""
