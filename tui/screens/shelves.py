"""Models on this disk: in the folder one is in, under a path that is typed, and in the hub's cache. No torch, no network."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_tui.engine import models
from qlora_tui.engine.errors import EngineError
from qlora_tui.engine.models import ModelSpec
from qlora_tui.tui.lengths import hub_cache

CONFIG, WEIGHTS = "config.json", ".safetensors"
_DEPTH = 2
_MOST_LOOKED_AT = 5000
_MOST_FOUND = 50
_SECONDS = 1.0
"""Bounds of one look: a home folder or a network disk may hold millions of files, and nobody waits for them."""
_SKIPPED = frozenset({"runs", "node_modules", "__pycache__", "site-packages", "snapshots", "blobs"})


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model one could train: where it is, how big, and what to know before fetching it."""

    name: str
    spec: ModelSpec
    place: str
    note: str = ""
    gated: bool = False


def folders(where: str) -> list[tuple[str, ModelSpec]]:
    """Return folders with a model in and under `where`, two levels deep, each as one would type it; slow, reads the disk.

    Hidden folders, and what cannot be read, are passed over.
    """
    found: list[tuple[str, ModelSpec]] = []
    for folder in _walk(Path(where).expanduser(), time.monotonic() + _SECONDS):
        try:
            spec = models.from_folder(folder)
        except (EngineError, OSError):
            continue
        found.append((_typed(folder, where), spec))
        if len(found) == _MOST_FOUND:
            break
    return found


def _walk(root: Path, deadline: float) -> Iterator[Path]:
    """Yield folders that hold a config and weights, the nearest first, within the bounds."""
    waiting, looked = [(root, 0)], 0
    while waiting:
        folder, depth = waiting.pop(0)
        below: list[Path] = []
        config = weights = False
        for entry in _entries(folder):
            looked += 1
            if looked > _MOST_LOOKED_AT or time.monotonic() > deadline:
                return
            config, weights = config or entry.name == CONFIG, weights or entry.name.endswith(WEIGHTS)
            if not entry.name.startswith(".") and entry.name not in _SKIPPED and _is_folder(entry):
                below.append(Path(entry.path))
        if config and weights:
            yield folder
        elif depth < _DEPTH:
            waiting += [(path, depth + 1) for path in sorted(below)]


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError:
        return


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=True)
    except OSError:
        return False


def _typed(folder: Path, where: str) -> str:
    """Return `folder` as one would type it where `where` was typed."""
    if where.startswith("~"):
        return f"~/{folder.relative_to(Path.home())}" if folder.is_relative_to(Path.home()) else str(folder)
    return str(folder) if Path(where).is_absolute() or where.startswith("..") else f"./{folder}"


def shape_of(name: str) -> ModelSpec | None:
    """Return the shape of a model in a folder or of the catalogue; a folder is read again only when its config changed."""
    try:
        folder = Path(name).expanduser()
        written = (folder / CONFIG).stat().st_mtime_ns
        return _shape_in(folder, written)
    except EngineError:
        return None
    except (OSError, ValueError, RuntimeError):  # no such folder, or a name that cannot be one
        return models.find(name)


@functools.lru_cache(maxsize=256)
def _shape_in(folder: Path, written: int) -> ModelSpec:
    return models.from_folder(folder)


@functools.cache
def cached() -> list[tuple[str, ModelSpec]]:
    """Return models in the hub's cache, read from its folders alone: importing the hub's library costs more."""
    found: dict[str, ModelSpec] = {}
    for config in sorted(hub_cache().glob("models--*/snapshots/*/config.json")):
        name = config.parents[2].name.removeprefix("models--").replace("--", "/")
        if not any(config.parent.glob("*.safetensors")):
            continue
        try:
            found[name] = models.from_folder(config.parent)
        except (EngineError, OSError):
            continue
    return list(found.items())
