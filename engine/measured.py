"""What this machine measured: peaks beside their predictions, the speed of its pieces, and real steps by length.

One small file in the state folder, replaced under a lock, so that two runs lose nothing of each other's. It
only sharpens estimates: a file that is damaged, or was written by a newer version, counts as empty, and a disk
that cannot be written loses a measurement, never a run.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from qlora_tui.engine.places import locked, place, replace_file

FILE = "measured.json"
_VERSION = 2  # 1 kept a layer's host seconds, not a launch's
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
_RUNS_KEPT = 50  # memory records of one card and versions
_RUNS_USED = 20
_GROUPS_KEPT = 40  # cards and versions, and kinds of step: so that the file stays small for ever
_STEPS_KEPT = 60  # lengths of one kind of step
_SAME_LENGTH = 0.05  # a new measurement replaces one of nearly the same length
_BIAS = (0.8, 1.25)  # beyond this it is a fault, not a bias, and is not corrected away
_LEAST_ERROR = 0.01
_MOST = 1e30  # no size, rate or time is larger; keeps damaged numbers out of the arithmetic


@dataclass(frozen=True, slots=True)
class Correction:
    """How measured peaks compare with predicted ones: their steady ratio, and the share by which they still differ."""

    bias: float
    error: float
    runs: int


@dataclass(frozen=True, slots=True)
class Speed:
    """What a device reaches, in units a second; `launch_seconds` is what its host spends on one kernel: Python, torch and driver.

    `dequant_bytes` counts what is read and written while 4-bit weights become 16-bit ones: 2.5 bytes a weight. The shares are of the
    seconds of a product in 16 bits that one in 8 takes, rounding and turning apart; 0: not measured.
    """

    matmul_flops: float
    bandwidth_bytes: float
    dequant_bytes: float
    launch_seconds: float
    fp8_share: float = 0.0
    int8_share: float = 0.0


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds for one token in real steps of `rows` rows at once, each of about `tokens_per_row` tokens.

    `parts` are the micro-batches of such a step, over which its one update is spread; 0: not known, as in older files.
    """

    tokens_per_row: int
    rows: int
    seconds_per_token: float
    parts: int = 0


@dataclass(frozen=True, slots=True)
class Around:
    """Seconds of what lies around the steps of one kind of run: until its first step, of a checkpoint, and of measuring a token."""

    load_seconds: float
    save_seconds: float
    eval_seconds_per_token: float


@functools.cache
def versions() -> str:
    """Return the libraries that decide memory and time, as `torch 2.13.0, ...`; none of them is imported for it."""
    import importlib.metadata  # 40 ms, and most screens never ask

    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} missing")
    return ", ".join(found)


def remember_memory(machine_name: str, versions: str, predicted: Mapping[str, int], measured: Mapping[str, int]) -> None:
    """Keep a run's peaks beside what was predicted for them, by phase.

    Args:
        machine_name: the device's name.
        versions: the libraries, as `versions()` says them.
        predicted: bytes by phase as the formulas gave them, before any correction: else a bias would hide itself.
        measured: bytes by phase as they were.
    """
    record = {"predicted": _sizes(predicted), "measured": _sizes(measured)}
    if not set(record["predicted"]) & set(record["measured"]):
        return

    def add(book: dict[str, Any]) -> None:
        runs = _group(book["memory"], f"{machine_name}, {versions}")
        runs.append(record)
        del runs[:-_RUNS_KEPT]

    _rewrite(add)


def correction(machine_name: str, versions: str) -> Correction | None:
    """Return how far predictions were off on this device with these libraries; None before two runs.

    The bias is the median over the last runs of measured / predicted in the phase that was predicted biggest;
    the error is the largest deviation that is left once it is corrected.
    """
    ratios = [_ratio(record) for record in _read()["memory"].get(f"{machine_name}, {versions}", ())][-_RUNS_USED:]
    if len(ratios) < 2:
        return None
    bias = min(max(statistics.median(ratios), _BIAS[0]), _BIAS[1])
    error = max(abs(ratio / bias - 1) for ratio in ratios)
    return Correction(bias, max(error, _LEAST_ERROR), len(ratios))


def correction_now(machine_name: str) -> Correction | None:
    """Return `correction` for the libraries installed; they are only looked up where the device has a record at all."""
    known = any(name.startswith(f"{machine_name}, ") for name in _read()["memory"])
    return correction(machine_name, versions()) if known else None


def remember_speed(machine_name: str, versions: str, speed: Speed) -> None:
    """Keep the measured pieces of a device; the newest measurement replaces the one before."""
    pieces = list(astuple(speed))
    if not _is_speed({"pieces": pieces}):
        return

    def add(book: dict[str, Any]) -> None:
        book["speed"].pop(machine_name, None)
        book["speed"][machine_name] = {"versions": versions, "pieces": pieces}
        _drop_oldest(book["speed"])

    _rewrite(add)


def speed(machine_name: str) -> Speed | None:
    """Return the measured pieces of a device; None where none were measured."""
    kept = _read()["speed"].get(machine_name)
    return Speed(*kept["pieces"]) if kept else None


def remember_steps(machine_name: str, key: str, tokens_per_row: int, rows: int, seconds_per_token: float, parts: int = 0) -> None:
    """Keep what real steps took; a measurement of nearly the same length and as many rows gives way to it.

    Args:
        machine_name: the device's name.
        key: the kind of step, as `planner.step_key` says it.
        tokens_per_row: tokens of a row, the mean over the steps.
        rows: rows at once.
        seconds_per_token: seconds of a whole optimizer step over its real tokens.
        parts: micro-batches of such a step; 0: not known.
    """
    if not (tokens_per_row > 0 and rows > 0 and _positive(seconds_per_token)):
        return

    def add(book: dict[str, Any]) -> None:
        kinds = book["steps"].setdefault(machine_name, {})
        points = _group(kinds, key)
        points[:] = [point for point in points if point[1] != rows or abs(point[0] / tokens_per_row - 1) > _SAME_LENGTH]
        points.append([int(tokens_per_row), int(rows), float(seconds_per_token), int(parts)])
        del points[:-_STEPS_KEPT]
        _drop_oldest(book["steps"])

    _rewrite(add)


def steps(machine_name: str, key: str) -> list[StepTime]:
    """Return the real steps measured for one kind of step, shortest rows first."""
    return sorted(all_steps(machine_name).get(key, ()), key=lambda point: (point.rows, point.tokens_per_row))


def all_steps(machine_name: str) -> dict[str, list[StepTime]]:
    """Return the real steps measured on a device, by kind."""
    kinds = _read()["steps"].get(machine_name, {})
    return {key: [StepTime(*point) for point in points] for key, points in kinds.items()}


def remember_around(machine_name: str, key: str, around: Around) -> None:
    """Keep what lay around the steps of a run of kind `key`, in place of what was known of it; figures that are none are left out."""
    figures = [around.load_seconds, around.save_seconds, around.eval_seconds_per_token]
    if not all(_positive(figure) for figure in figures):
        return

    def add(book: dict[str, Any]) -> None:
        kinds = book["around"].setdefault(machine_name, {})
        kinds.pop(key, None)
        kinds[key] = figures
        _drop_oldest(kinds)
        _drop_oldest(book["around"])

    _rewrite(add)


def around(machine_name: str, key: str) -> Around | None:
    """Return what lies around the steps of a run of kind `key`; None where none was measured."""
    figures = _read()["around"].get(machine_name, {}).get(key)
    return Around(*figures) if figures else None


def stamp() -> tuple[int, int]:
    """Return what changes whenever something is remembered, so that what rests on it can be kept until then."""
    return _stamp(place("state") / FILE)


def _group(groups: dict[str, list[Any]], name: str) -> list[Any]:
    """Return the list called `name`, made the newest of its groups; the oldest goes when there are too many."""
    groups[name] = groups.pop(name, [])
    _drop_oldest(groups)
    return groups[name]


def _drop_oldest(groups: dict[str, Any]) -> None:
    while len(groups) > _GROUPS_KEPT:
        del groups[next(iter(groups))]


def _ratio(record: Mapping[str, Mapping[str, int]]) -> float:
    predicted, found = record["predicted"], record["measured"]
    biggest = max(predicted.keys() & found.keys(), key=lambda phase: (predicted[phase], phase))
    return found[biggest] / predicted[biggest]


def _rewrite(change: Callable[[dict[str, Any]], None]) -> None:
    """Change the file under its lock; a disk that is full or read-only only loses the measurement."""
    path = place("state") / FILE
    try:
        with locked(path):
            book = _parse(path)
            change(book)
            replace_file(path, json.dumps({"v": _VERSION, **book}, indent=1))
    except OSError:
        return


def _read() -> Mapping[str, Any]:
    path = place("state") / FILE
    return _parsed(path, _stamp(path))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_ino)


@functools.lru_cache(maxsize=4)
def _parsed(path: Path, stamp: tuple[int, int]) -> Mapping[str, Any]:
    """Return the file's content; it is read again only when it was replaced, since the wizard asks at every key."""
    return _parse(path) if stamp != (0, 0) else _empty()


def _empty() -> dict[str, Any]:
    return {"memory": {}, "speed": {}, "steps": {}, "around": {}}


def _parse(path: Path) -> dict[str, Any]:
    """Read the file and keep what is whole; anything else, a newer version included, is as if it were not there."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return _empty()
    if not isinstance(raw, dict) or raw.get("v") != _VERSION:
        return _empty()
    devices = {name: _lists(kinds, _is_point) for name, kinds in _table(raw.get("steps")).items()}
    return {
        "memory": _lists(raw.get("memory"), _is_run),
        "speed": {name: kept for name, kept in _table(raw.get("speed")).items() if _is_speed(kept)},
        "steps": devices,
        "around": {name: _whole_around(kinds) for name, kinds in _table(raw.get("around")).items()},
    }


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _lists(value: object, whole: Callable[[object], bool]) -> dict[str, list[Any]]:
    return {name: [part for part in parts if whole(part)] for name, parts in _table(value).items() if isinstance(parts, list)}


def _is_run(value: object) -> bool:
    predicted, found = (_table(_table(value).get(name)) for name in ("predicted", "measured"))
    return bool(predicted.keys() & found.keys()) and all(_positive(size) for size in (*predicted.values(), *found.values()))


def _is_speed(value: object) -> bool:
    """Say whether it is the pieces of a `Speed`; older files have no shares."""
    pieces = _table(value).get("pieces")
    if not isinstance(pieces, list) or len(pieces) not in (4, 6):
        return False
    return all(_positive(piece) for piece in pieces[:4]) and all(share == 0 or _positive(share) for share in pieces[4:])


def _is_point(value: object) -> bool:
    """Say whether it is tokens, rows, seconds, and in newer files the parts of a step."""
    if not isinstance(value, list) or len(value) not in (3, 4):
        return False
    return all(_positive(part) for part in value[:3]) and all(part == 0 or _positive(part) for part in value[3:])


def _whole_around(value: object) -> dict[str, list[float]]:
    kinds = _table(value).items()
    return {name: part for name, part in kinds if isinstance(part, list) and len(part) == 3 and all(_positive(one) for one in part)}


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _MOST


def _sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    return {phase: int(size) for phase, size in sizes.items() if _positive(size)}
