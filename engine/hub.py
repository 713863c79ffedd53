"""Model files from a folder or the hub: safetensors only, by commit, asked for once and briefly.

No code of a repository ever runs here: only data files with known names are fetched, and weights in Python's
pickle format (`.bin`, `.pt`) are refused, since reading those can run code. `HF_HUB_OFFLINE` is obeyed; where the
hub cannot be reached, files in its cache are used and otherwise one sentence says so.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.engine import child
from qlora_tui.engine.aside import aside
from qlora_tui.engine.errors import ConfigError, FetchError, ModelError, SpaceError, Stopped
from qlora_tui.engine.places import is_folder, is_here
from qlora_tui.engine.text import one_line, redact

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    INDEX,
)
ASK_SECONDS = 5.0
_LONGEST_HEADER = 100_000_000  # as the format says
SMALL_SECONDS = 120.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

Progress = Callable[[int, int], object]
Stopping = Callable[[], bool]
Look = Callable[[], object]
"""Called several times a second; raises to interrupt."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A folder that holds a model's small files; `complete` says that the weights lie there too.

    `commit` is the hub commit they belong to, resolved once, so that a branch that moves cannot mix two versions
    of a model; it is empty for a local folder.
    """

    folder: Path
    commit: str = ""
    complete: bool = False


def small_files(name: str, revision: str = "main", look: Look = lambda: None) -> ModelFiles:
    """Return config, tokenizer and chat template of `name`, a local folder or a hub id, without the weights.

    Whatever `look` raises interrupts the asking and the fetching.

    Raises:
        ModelError: no such model, a private one, one without safetensors, or no such revision; or HF_HUB_OFFLINE is set and
            the hub's cache does not hold it.
        FetchError: the hub cannot be reached and its cache does not hold the model.
        ConfigError: `name` can be neither a folder nor a hub id.
    """
    if is_folder(name):
        return _local(Path(name).expanduser())
    _refuse_odd_name(name)
    if _offline():
        cached = _cached(name, revision)
        if cached is None:
            raise ModelError(
                f"there is no folder {name}, HF_HUB_OFFLINE is set, and the hub's cache does not hold it",
                hint="unset it once, or name a folder",
            )
        return cached
    return _from_hub(name, revision, look)


def weights(name: str, revision: str, commit: str, progress: Progress, stopping: Stopping) -> Path:
    """Return the folder of `name` with its weights, fetching what is missing of `commit`.

    The download runs in a process of its own, so a wish to stop is obeyed within a second even when a connection
    hangs; `progress(done, total)` counts bytes on disk. Files already fetched are not fetched again.

    Raises:
        FetchError: the hub could not be reached or broke off.
        ModelError: the repository offers no safetensors, or HF_HUB_OFFLINE is set and they are not in the cache.
        SpaceError: the cache has no room.
        Stopped: `stopping()` became true.
    """
    files = _local(Path(name).expanduser()) if is_folder(name) else _cached(name, commit or revision)
    if files is not None and files.complete:
        return files.folder
    if files is not None and not files.commit:
        raise ModelError(f"no {SINGLE} or {INDEX} in the folder", where=name, hint="the weights are missing")
    if _offline():
        raise ModelError(f"HF_HUB_OFFLINE is set and the weights of {name} are not in the hub's cache", hint="unset it once")

    def look() -> None:
        if stopping():
            raise Stopped(f"stopped while fetching {name}; nothing half-made was kept")

    small, sizes = aside(lambda: _listing(name, commit or revision), look)
    blobs = _blobs(name)
    total = sum(size for _, size in sizes.values())
    _need_space(name, blobs, total - _done(blobs, sizes.values()))

    def watch() -> None:
        progress(min(_done(blobs, sizes.values()), total), total)

    # The small files once more: they cost nothing where they lie already, and all files are then of one commit.
    _fetch_in_child(name, commit or revision, [*small, *sizes], stopping=stopping, watch=watch)
    progress(total, total)
    found = _cached(name, commit or revision)
    if found is None or not found.complete:
        raise FetchError(f"the weights of {name} did not arrive whole", hint="start again")
    return found.folder


def pick_weights(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Return which of a repository's files are its weights.

    Raises:
        ModelError: none in safetensors form under the names that loaders look for.
    """
    known = set(names)
    if INDEX in known:
        return tuple(sorted(name for name in known if _SHARD.fullmatch(name)))
    if SINGLE in known:
        return (SINGLE,)
    if any(name.endswith(_PICKLED) for name in known):
        raise ModelError("its weights are only in pickled form, which can run code when read", where=where, hint="use a safetensors copy")
    if "adapter_config.json" in known:
        raise ModelError("this is an adapter, not a model", where=where, hint="name the base model that the adapter belongs to")
    raise ModelError(f"no weights here: neither {SINGLE} nor {INDEX}", where=where, hint="choose a model with safetensors weights")


def _local(folder: Path) -> ModelFiles:
    """Look at a folder; one with a tokenizer alone is accepted, since looking at data needs no more."""
    names = {path.name for path in folder.iterdir()}
    if not names & {"config.json", "tokenizer.json", "tokenizer_config.json"}:
        raise ModelError("no config.json and no tokenizer in this folder", where=str(folder), hint="name a folder that holds a model")
    if "config.json" not in names:
        return ModelFiles(folder)
    pick_weights(names, str(folder))
    missing = [name for name in listed(folder) if name not in names]
    if missing:
        raise ModelError(f"{len(missing)} weight files are missing, such as {missing[0]}", where=str(folder), hint="copy the model again")
    torn = [name for name in listed(folder) if not _is_whole(folder / name)]
    if torn:
        raise ModelError(f"{torn[0]} is cut off or no safetensors file", where=str(folder), hint="copy the model again")
    return ModelFiles(folder, complete=True)


def _is_whole(path: Path) -> bool:
    """Say whether a weight file is as long as its own header promises; a copy that broke off is told before anything loads."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, _LONGEST_HEADER)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return path.stat().st_size == 8 + size + max(ends, default=0)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return False


def listed(folder: Path) -> list[str]:
    """Return the weight files that a folder must hold, as its index says."""
    index = folder / INDEX
    if not index.is_file():
        return [SINGLE]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{INDEX} cannot be read", where=str(folder), hint="copy the model again") from error
    return sorted(Path(str(name)).name for name in names)


def _refuse_odd_name(name: str) -> None:
    if is_here(name):
        raise ModelError("this is a file; a model is a folder with config.json and safetensors weights", where=one_line(name))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError("no such folder", where=one_line(name), hint="check the path; a hub model is written owner/name")
    if not _HUB_ID.fullmatch(name) or ".." in name:
        raise ConfigError("this is neither a folder nor a hub id (owner/name)", where=one_line(name))


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _cached(name: str, revision: str) -> ModelFiles | None:
    """Return what the hub's cache holds of `name` at `revision`, without asking anybody."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=revision)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    complete = all((folder / part).is_file() for part in listed(folder))
    return ModelFiles(folder, commit=folder.name, complete=complete)


def _from_hub(name: str, revision: str, look: Look) -> ModelFiles:
    try:
        names = {part.rfilename for part in aside(lambda: _info(name, revision), look).siblings or []}
    except _link_errors() as error:
        _explain(error, name, revision)
        cached = _cached(name, revision)
        if cached is not None:
            return cached
        why = one_line(redact(str(error)), limit=120)
        raise FetchError(f"the hub could not be reached for {name} ({why})", hint="check the network, or use a local folder") from error
    pick_weights(names, name)
    if "config.json" not in names:
        raise ModelError("no config.json: the loader cannot know what it is", where=name, hint="choose another copy of the model")
    _fetch_in_child(name, revision, [part for part in SMALL_FILES if part in names], seconds=SMALL_SECONDS, watch=look)
    found = _cached(name, revision)
    if found is None:
        raise FetchError(f"the small files of {name} did not arrive", hint="start again")
    return found


def _fetch_in_child(name: str, revision: str, files: Iterable[str], **options: Any) -> None:
    """Fetch `files` into the hub's cache in a process of its own, and raise here what it met there."""
    command = [sys.executable, "-P", "-m", "qlora_tui.engine.hub", name, revision, *files]
    ended = child.run(command, doing=f"fetching {name}", env=_child_env(), **options)
    if ended.code == 0:
        return
    child.raise_why(ended, ModelError, SpaceError)
    raise FetchError(f"fetching {name} broke off: {ended.last_words}", hint="start again: files that arrived whole are kept")


def _link_errors() -> tuple[type[BaseException], ...]:
    """Return what the hub's client raises when it is not answered, or answered with an error.

    It moved from httpx to httpx2; its own error extends the base class of whichever is installed.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    bases = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    return (*bases, HfHubHTTPError, LocalEntryNotFoundError, OSError)


def _info(name: str, revision: str, *, sizes: bool = False) -> Any:
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT).model_info(name, revision=revision, timeout=ASK_SECONDS, files_metadata=sizes)


def _explain(error: BaseException, name: str, revision: str) -> None:
    """Raise our own error where the cause is known; return for a hub that did not answer."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        hint = f"accept its licence at https://huggingface.co/{name}, then run: hf auth login"
        raise ModelError("this model asks for a licence to be accepted", where=name, hint=hint) from error
    if isinstance(error, RepositoryNotFoundError):
        hint = "check the spelling; for a private model run: hf auth login"
        raise ModelError("no such folder here and no such model on the hub", where=name, hint=hint) from error
    if isinstance(error, RevisionNotFoundError):
        raise ModelError(f"the model has no revision {one_line(revision)}", where=name, hint="main is the usual one") from error
    if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
        raise SpaceError(
            f"the hub's cache cannot be written ({error.strerror})", hint="make room, or set HF_HOME to another disk"
        ) from error


def _listing(name: str, commit: str) -> tuple[list[str], dict[str, tuple[str, int]]]:
    """Return the small files, and of each weight file its name in the cache (the content's hash) and its bytes."""
    try:
        siblings = {part.rfilename: part for part in _info(name, commit, sizes=True).siblings or []}
    except _link_errors() as error:
        _explain(error, name, commit)
        raise FetchError(f"the hub could not be reached for {name}", hint="check the network and start again") from error
    chosen = [siblings[part] for part in pick_weights(siblings, name)]
    small = [part for part in SMALL_FILES if part in siblings]
    return small, {part.rfilename: (str(part.lfs.sha256 if part.lfs else part.blob_id), int(part.size or 0)) for part in chosen}


def _blobs(name: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "blobs"


def _done(blobs: Path, files: Iterable[tuple[str, int]]) -> int:
    """Return how many bytes of `files` are on disk, whole or on their way (`<hash>.….incomplete`)."""
    largest: dict[str, int] = {}
    try:
        for path in blobs.iterdir():
            blob = path.name.partition(".")[0]
            largest[blob] = max(largest.get(blob, 0), path.stat().st_size)
    except OSError:  # the folder is not made yet, or a file was renamed under our eyes: the next look is soon
        pass
    return sum(min(largest.get(blob, 0), size) for blob, size in files)


def _need_space(name: str, blobs: Path, missing: int) -> None:
    there = next(folder for folder in (blobs, *blobs.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < missing:
        raise SpaceError(
            f"{name} needs {missing / 2**30:.1f} GiB more on disk, {free / 2**30:.1f} GiB are free",
            where=str(there),
            hint="make room, or set HF_HOME to another disk",
        )


def _child_env() -> Mapping[str, str]:
    from huggingface_hub import constants

    return {
        "HF_ENDPOINT": constants.ENDPOINT,
        "HF_HUB_CACHE": str(constants.HF_HUB_CACHE),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def _download(name: str, revision: str, files: list[str]) -> int:
    """Fetch `files` of one commit; the child's side of `_fetch_in_child`.

    The first is asked for by branch, so that the cache remembers what the branch meant and an offline start finds
    it again; the others by the commit that this one belongs to.
    """
    from huggingface_hub import hf_hub_download

    try:
        commit = Path(hf_hub_download(name, files[0], revision=revision, etag_timeout=ASK_SECONDS)).parent.name
        for part in files[1:]:
            hf_hub_download(name, part, revision=commit, etag_timeout=ASK_SECONDS)
    except _link_errors() as error:
        try:
            _explain(error, name, revision)
        except (ModelError, SpaceError) as known:
            return child.say_why(known)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(_download(sys.argv[1], sys.argv[2], sys.argv[3:]))
