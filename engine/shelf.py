"""The shelf of a run's checkpoints: which there are, which prove sound, which one is what, and which may go.

A checkpoint is a folder with a manifest that was renamed into place whole. Nothing is believed because of its name: the
manifest lists every file with size and SHA-256, and it carries a digest of itself, as the index does. So a flipped
byte anywhere is seen before anything is loaded. No torch here: a command line can refuse a resume before it loads one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qlora_tui.engine.errors import CheckpointError, SpaceError
from qlora_tui.engine.places import discard, replace_file, settle
from qlora_tui.engine.text import one_line
from qlora_tui.engine.units import gib

FORMAT = 2
CHECKPOINTS, MANIFEST, INDEX = "checkpoints", "manifest.json", "index.json"
STATE, OPTIMIZER, RANDOM, ADAPTER_WEIGHTS = "state.json", "optimizer.safetensors", "random.safetensors", "adapter_model.safetensors"
PARTS = (STATE, OPTIMIZER, RANDOM, ADAPTER_WEIGHTS)
"""Without one of these a checkpoint is none."""
SPARE_BYTES = 64 * 2**20
"""Left free on the disk by every save, so that the journal and the log can go on."""
_STEP = "step-"
_DIGEST = "sha256"


@dataclass(frozen=True, slots=True)
class Marks:
    """What the index says: steps whose checkpoints are the latest, the last healthy and the best one, and the best held-out loss.

    `void` are steps that a roll back left behind: while their folders wait to be removed, nobody may resume from them.
    """

    latest: int | None = None
    healthy: int | None = None
    best: int | None = None
    best_loss: float | None = None
    void: tuple[int, ...] = ()


def name_of(step: int, kind: str = "step") -> str:
    """Return the folder name of the checkpoint of `step`.

    >>> name_of(100)
    'step-000100'
    """
    return f"{kind}-{step:06d}"


def steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint in the run `folder`, oldest first, whatever state it is in."""
    names = (path.name.removeprefix(_STEP) for path in (folder / CHECKPOINTS).glob(f"{_STEP}*"))
    return sorted(int(name) for name in names if name.isdecimal())


def path_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies or would lie."""
    return folder / CHECKPOINTS / name_of(step)


def step_of(path: Path) -> int:
    """Return the step of the checkpoint at `path`.

    >>> step_of(Path("checkpoints/step-000100"))
    100
    """
    return int(path.name.removeprefix(_STEP))


def write_manifest(path: Path, step: int, digests: Mapping[str, str]) -> None:
    """List the files of a checkpoint that is being written; `digests` are those of files whose bytes were at hand.

    The digest of such a file is of what should lie there, so reading it back proves the disk as well.
    """
    files = sorted(file for file in path.iterdir() if file.is_file())
    listed = {file.name: {"bytes": file.stat().st_size, _DIGEST: digests.get(file.name) or digest_of(file)} for file in files}
    (path / MANIFEST).write_text(_sealed({"format": FORMAT, "step": step, "files": listed}))


def verify(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking every file against it.

    Raises:
        CheckpointError: the first thing that is missing or differs, by name.
    """
    where = str(path)
    if path.is_symlink() or (path / MANIFEST).is_symlink():
        raise CheckpointError("it is a link, not a checkpoint of this run", where=where)
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing from the checkpoint", where=where) from None
    except (OSError, ValueError):
        raise CheckpointError(f"{MANIFEST} of the checkpoint cannot be read", where=where) from None
    manifest = _unsealed(text)
    if manifest is None:
        raise CheckpointError(f"{MANIFEST} is damaged: it is not what was saved", where=where)
    if manifest.get("format") != FORMAT:
        told = f"the checkpoint was written in format {one_line(manifest.get('format'))}; this version reads {FORMAT}"
        raise CheckpointError(told, where=where, hint="resume with the version of qlora-tui that wrote it")
    files = manifest.get("files")
    if not isinstance(files, dict) or (lost := [name for name in PARTS if name not in files]):
        raise CheckpointError(f"{lost[0] if isinstance(files, dict) else 'everything'} is missing from the checkpoint", where=where)
    for name, said in files.items():
        _verify_file(path, name, said)
    return manifest


def _verify_file(path: Path, name: str, said: Mapping[str, Any]) -> None:
    file = path / name
    if Path(name).name != name or file.is_symlink():
        raise CheckpointError(f"{one_line(name)} points out of the checkpoint", where=str(path))
    if not file.is_file():
        raise CheckpointError(f"{name} is missing from the checkpoint", where=str(path))
    try:
        size = file.stat().st_size
        sound = size == said["bytes"] and digest_of(file) == said[_DIGEST]
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}", where=str(path)) from None
    if not sound:
        told = f"{size} bytes of {said['bytes']} are there" if size != said["bytes"] else "it is not what was saved"
        raise CheckpointError(f"{name} is damaged: {told}", where=str(path))


def digest_of(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, _DIGEST).hexdigest()


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that proves sound, and a sentence for each newer one that does not."""
    damaged: list[str] = []
    void = marks(folder).void
    for step in reversed(steps(folder)):
        if step in void:
            continue
        try:
            verify(path_of(folder, step))
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        return path_of(folder, step), damaged
    return None, damaged


def newest_step(folder: Path) -> int | None:
    """Return the step of the newest checkpoint that proves sound, or None."""
    path, _ = newest(folder)
    return None if path is None else int(path.name.removeprefix(_STEP))


def newest_sound(folder: Path) -> Path | None:
    """Return the checkpoint that a resume goes on from, or None where none was ever saved.

    Raises:
        CheckpointError: there are some, and none of them is sound.
    """
    path, damaged = newest(folder)
    if path is None and damaged:
        hint = "start a new run with the same settings; run.toml is in the folder"
        raise CheckpointError(f"no checkpoint of this run is sound ({damaged[0]})", where=str(folder), hint=hint)
    return path


def saved_config(path: Path) -> dict[str, Any]:
    """Return the settings that a verified checkpoint was trained with."""
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return dict(state.get("config") or {})


def last_healthy(folder: Path) -> Path | None:
    """Return the last checkpoint that was followed by enough clean steps and still proves sound, or None."""
    return _proved(folder, marks(folder).healthy)


def best(folder: Path) -> Path | None:
    """Return the checkpoint with the lowest held-out loss if it still proves sound, or None."""
    return _proved(folder, marks(folder).best)


def _proved(folder: Path, step: int | None) -> Path | None:
    if step is None:
        return None
    try:
        verify(path_of(folder, step))
    except CheckpointError:
        return None
    return path_of(folder, step)


def marks(folder: Path) -> Marks:
    """Return what the index says; without one, or with a damaged one, nothing is known and nothing is guessed."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        said = _unsealed((folder / CHECKPOINTS / INDEX).read_text(encoding="utf-8"))
        if said is not None and said["format"] == FORMAT:
            loss = said["best_loss"]
            return Marks(said["latest"], said["healthy"], said["best"], None if loss is None else float(loss), tuple(said["void"]))
    return Marks()


def mark(folder: Path, **changes: Any) -> Marks:
    """Change some of the marks, all at once and on the disk, and return them.

    Raises:
        SpaceError: the index could not be written; the old one stands.
    """
    found = replace(marks(folder), **changes)
    try:
        replace_file(folder / CHECKPOINTS / INDEX, _sealed({"format": FORMAT, **asdict(found)}))
    except OSError as error:
        told = f"the index of checkpoints could not be written: {error.strerror or error}"
        raise SpaceError(told, where=str(folder / CHECKPOINTS)) from error
    return found


def prune(folder: Path, keep: int, besides: Iterable[int] = ()) -> None:
    """Delete all but the `keep` newest checkpoints, those that count and those `besides`; called only after a newer one was proved."""
    known = marks(folder)
    stay = {*steps(folder)[-max(1, keep) :], known.latest, known.healthy, known.best, *besides}
    for step in steps(folder):
        if step not in stay:
            discard(path_of(folder, step))


def roll_back(folder: Path, step: int) -> None:
    """Make the checkpoint of `step` the latest one: newer ones are void at once, and then removed.

    Raises:
        SpaceError: the index could not be written; nothing was changed.
    """
    later = tuple(other for other in steps(folder) if other > step)
    known = marks(folder)
    gone = {"best": None, "best_loss": None} if known.best in later else {}
    mark(folder, latest=step, void=later, healthy=None if known.healthy in later else known.healthy, **gone)
    for other in later:
        discard(path_of(folder, other))
    mark(folder, void=tuple(other for other in later if path_of(folder, other).exists()))


def make_room(folder: Path, needed: int, besides: Iterable[int] = ()) -> int:
    """Return the free bytes of the disk once `needed` more fit; older checkpoints go where that helps, never the ones that count.

    Raises:
        SpaceError: there is no room; both figures are named.
    """
    settle(folder / CHECKPOINTS)
    for half in (folder / CHECKPOINTS).glob(f".{INDEX}.*"):  # an index that a kill cut short
        half.unlink(missing_ok=True)
    if free_bytes(folder) < needed + SPARE_BYTES:
        prune(folder, keep=1, besides=besides)
    free = free_bytes(folder)
    if free < needed + SPARE_BYTES:
        told = f"checkpoints need {gib(needed)} of disk with {gib(SPARE_BYTES)} to spare, and {gib(free)} are free"
        raise SpaceError(told, where=str(folder))
    return free


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that holds `folder`."""
    return shutil.disk_usage(folder).free


def _sealed(body: Mapping[str, Any]) -> str:
    return json.dumps({**body, _DIGEST: _seal_of(body)}, indent=1)


def _unsealed(text: str) -> dict[str, Any] | None:
    """Return what `_sealed` was given, or None if the text is not exactly that."""
    try:
        body = json.loads(text)
        seal = body.pop(_DIGEST)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return body if seal == _seal_of(body) else None


def _seal_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
