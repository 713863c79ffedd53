"""What a person may name as data, and the files behind it.

A file, a folder with train and valid files, a dataset of a `dataset_info.json`, a dataset on the hub, or what is built in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_tui.engine.data import registry
from qlora_tui.engine.data.builtin_docs import NAME as PYTHON_DOCS
from qlora_tui.engine.data.builtin_docs import read_docs
from qlora_tui.engine.data.hub_rows import is_hub_name, read_hub
from qlora_tui.engine.data.raw import Raw
from qlora_tui.engine.data.reader import file_ending, read_file
from qlora_tui.engine.data.tape import Tape
from qlora_tui.engine.errors import DataError
from qlora_tui.engine.spec import BUILTIN, nearest
from qlora_tui.engine.text import one_line

Note = Callable[[str], None]
_SPLITS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "eval": "valid",
    "test": "test",
}
_SHARD = re.compile(r"(?P<split>[a-z]+)([-_.]?\d[\w-]*)?", re.IGNORECASE)
_FILES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """One file, or one stream, of rows; `size` is its bytes on this disk, 0 if it is not on it."""

    shown: str
    size: int
    open: Callable[[Tape, Note], Iterator[Raw]]


@dataclass(frozen=True, slots=True)
class Found:
    """What a name stands for: pieces to train on, pieces to measure on, and what was decided about them."""

    name: str
    pieces: tuple[Piece, ...]
    eval_pieces: tuple[Piece, ...] = ()
    eval_names: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    convert: registry.Convert | None = None
    format: str = ""
    notes: tuple[str, ...] = ()


def find(name: str) -> Found:
    """Return what `name` stands for; looks at folders, opens no rows.

    Raises:
        DataError: there is no such thing, or it does not say which of its files to use.
    """
    if name == PYTHON_DOCS:
        return Found(name, (_stream(name, read_docs),))
    if name.startswith(BUILTIN):
        hint = nearest(name, [PYTHON_DOCS]) or f"there is {PYTHON_DOCS}"
        raise DataError("no such data is built in", hint=hint, where=one_line(name))
    path, part = _path(name)
    if path is None:
        return Found(name, (_hub(name),)) if is_hub_name(name) else Found(name, (_file(Path(name).expanduser()),))
    if path.is_dir():
        return _folder(name, path, part)
    if path.name == registry.FILE:
        entries = registry.read_registry(path)
        if entries is not None:
            return _entry(name, path, entries, part)
    if part:
        raise DataError(f"this is a file and has no part {one_line(part, limit=60)!r}", where=one_line(path))
    return Found(name, (_file(path),))


def find_eval(name: str) -> Found:
    """Return what `name` stands for as data to measure on: of a folder, its valid files, else its test files.

    Raises:
        DataError: as `find`; or the folder has neither.
    """
    path, part = _path(name)
    if path is None or not path.is_dir() or part:
        return find(name)
    splits = _splits(path)
    files = splits.get("valid") or splits.get("test")
    if not files:
        raise DataError("there is neither a valid nor a test file in it", hint=_holds(path), where=one_line(name))
    return Found(name, tuple(_file(file) for file in files))


def absolute(name: str) -> str:
    """Return `name` so that it means the same from every folder; what is no path stays as it is."""
    path, part = (None, "") if not name or name.startswith(BUILTIN) else _path(name)
    if path is None:
        return name
    return f"{path.resolve()}:{part}" if part else str(path.resolve())


def train_alone(name: str) -> str:
    """Return what gives the same rows to train on and none to measure on, such as `FOLDER:train` of a folder that has both."""
    return f"{name}:train" if find(name).eval_pieces else name


def _path(name: str) -> tuple[Path | None, str]:
    """Return the path that is there and what follows it after a colon; None if there is no such path."""
    try:
        whole = Path(name).expanduser()
        if whole.exists():
            return whole, ""
        before, colon, part = name.rpartition(":")
        short = Path(before).expanduser()
        return (short, part) if colon and before and part and short.exists() else (None, "")
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"this cannot be a file name ({one_line(error, limit=120)})", where=one_line(name)) from None


def _folder(name: str, path: Path, part: str) -> Found:
    splits = _splits(path)
    if part in _SPLITS and (files := splits.get(_SPLITS[part])):
        return Found(name, tuple(_file(file) for file in files))
    entries = registry.read_registry(path / registry.FILE)
    if entries is not None and (part or "train" not in splits):
        return _entry(name, path / registry.FILE, entries, part)
    if part:
        raise DataError(f"there is no {one_line(part, limit=60)} file in it", hint=_holds(path), where=one_line(path))
    if "train" not in splits:
        raise DataError("this is a folder without a train file", hint=_holds(path), where=one_line(name))
    held, rest = splits.get("valid", []), splits.get("test", [])
    return Found(
        name,
        tuple(_file(file) for file in splits["train"]),
        eval_pieces=tuple(_file(file) for file in held),
        eval_names=tuple(str(file) for file in held),
        unused=tuple(str(file) for file in rest),
    )


def _splits(folder: Path) -> dict[str, list[Path]]:
    """Return the files of rows of each split: in the folder itself, in its `data` folder, or in a folder called like the split.

    Raises:
        DataError: a split is there twice, in two kinds of files, and nobody said which is meant.
    """
    for place in (folder, folder / "data"):
        found: dict[str, list[Path]] = {}
        for file in _files(place):
            split = _split_of(file)
            if split:
                found.setdefault(split, []).append(file)
        for below in sorted(place.iterdir()) if place.is_dir() else []:
            if below.is_dir() and (split := _SPLITS.get(below.name.lower(), "")) and (files := _files(below)):
                found.setdefault(split, []).extend(files)
        for split, files in found.items():
            _refuse_two_kinds(place, split, files)
        if found:
            return found
    return {"train": _files(folder)} if (folder / "state.json").is_file() and _files(folder) else {}  # a saved `datasets.Dataset`


def _files(folder: Path) -> list[Path]:
    """Return the files of rows of a folder, by name; the small JSON files that tools put beside them are none."""
    if not folder.is_dir():
        return []
    beside = {registry.FILE, "state.json", "dataset_dict.json"}
    return sorted(
        file
        for file in folder.iterdir()
        if file_ending(file.name) and file.name not in beside and not file.name.startswith((".", "cache-")) and file.is_file()
    )


def _split_of(file: Path) -> str:
    match = _SHARD.fullmatch(file.name[: file.name.lower().rfind(file_ending(file.name))])
    return _SPLITS.get(match["split"].lower(), "") if match else ""


def _refuse_two_kinds(folder: Path, split: str, files: Sequence[Path]) -> None:
    kinds = {_kind(file, folder) for file in files}
    if len(kinds) > 1:
        names = ", ".join(one_line(file.relative_to(folder), limit=60) for file in files[:_FILES_SHOWN])
        raise DataError(f"its {split} rows are there twice: {names}", hint="name the file that is meant", where=one_line(folder))


def _kind(file: Path, folder: Path) -> tuple[Path, str, bool, str]:
    """Return what the shards of one split have in common: their folder, what is around their number, and that they have one."""
    name = file.name.lower()
    stem = name[: name.rfind(file_ending(name))]
    match = _SHARD.fullmatch(stem)
    if file.parent != folder or match is None:
        return file.parent, "", False, name[len(stem) :]  # in a folder called like the split, files may be called anything
    return file.parent, match["split"], match[2] is not None, name[len(stem) :]


def _holds(folder: Path) -> str:
    names = [one_line(file.name, limit=60) for file in _files(folder)]
    if not names:
        return "name a file of rows, or a folder that holds train.jsonl"
    more = f" and {len(names) - _FILES_SHOWN} more" if len(names) > _FILES_SHOWN else ""
    return f"name a file in it: {', '.join(names[:_FILES_SHOWN])}{more}"


def _entry(name: str, path: Path, entries: Mapping[str, Mapping[str, object]], part: str) -> Found:
    entry = registry.find_entry(path, entries, part)
    if entry.file is None:
        hub = f"{entry.hub}:{entry.split}" if entry.split else entry.hub
        pieces: tuple[Piece, ...] = (_hub(hub, entry.subset),)
    elif entry.file.is_dir():
        pieces = tuple(_file(file) for file in _files(entry.file))
        if not pieces:
            raise DataError("there is no file of rows in it", where=one_line(entry.file))
    else:
        pieces = (_file(entry.file),)
    return Found(name, pieces, convert=entry.convert, format=entry.format, notes=entry.notes)


def _file(path: Path) -> Piece:
    size = path.stat().st_size if path.is_file() else 0
    return Piece(str(path), size, lambda tape, note: read_file(path, tape, note))


def _hub(name: str, subset: str = "") -> Piece:
    return Piece(name, 0, lambda tape, _note: read_hub(name, tape, subset=subset))


def _stream(name: str, rows: Callable[[], Iterator[Mapping[str, object]]]) -> Piece:
    def read(tape: Tape, _note: Note) -> Iterator[Raw]:
        for row in rows():
            tape.look()
            yield Raw(None, row)

    return Piece(name, 0, read)
