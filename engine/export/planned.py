"""Exports that a run plans for its end: what stands in their way, known before it starts, and the making of them.

A good run whose export fails for a missing tool, or for lack of room, is a complaint about every other tool. And an export
that fails here never takes the run along: the adapter is there, and `qlora-tui export` can be said again.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from qlora_tui.engine import shelf
from qlora_tui.engine.errors import ConfigError, EngineError, Problem, Stopped
from qlora_tui.engine.events import Event, Finding, Phase
from qlora_tui.engine.export import TARGETS, kind_of
from qlora_tui.engine.export.make import Bench, make
from qlora_tui.engine.export.merged import weights_bytes
from qlora_tui.engine.export.records import HOME
from qlora_tui.engine.export.room import ram_problems
from qlora_tui.engine.export.source import read_run
from qlora_tui.engine.export.target import Look, Target
from qlora_tui.engine.export.words import sentence
from qlora_tui.engine.models import ModelSpec
from qlora_tui.engine.spec import RunConfig, nearest
from qlora_tui.engine.text import one_line, redact

_log = logging.getLogger("qlora_tui.export")
_KEY, _TYPE = "export_to", "export_type"


def planned(run: RunConfig) -> list[tuple[Target, str]]:
    """Return the exports that `run` plans, with the type of their weights, in an order in which one can use another.

    Raises:
        ConfigError: a target that does not exist, or a type that none of those planned has.
    """
    names = [target.name for target in TARGETS]
    for name in run.export_to:
        if name not in names:
            raise ConfigError(f"no target {one_line(name)!r}", hint=nearest(name, names) or f"there are {', '.join(names)}", where=_KEY)
    chosen = [target for target in TARGETS if target.name in run.export_to]
    if run.export_type and not any(target.kinds for target in chosen):
        raise ConfigError("no export is planned that has a type", hint="plan gguf or ollama in export_to, or leave it out", where=_TYPE)
    return [(target, kind_of(target, run.export_type if target.kinds else "", where=_TYPE)) for target in chosen]


def problems(run: RunConfig, spec: ModelSpec, folder: Path) -> list[Problem]:
    """Return what stands in the way of the exports that `run` plans, from the small files of its model in `folder`."""
    if not (run.export_to or run.export_type):
        return []
    try:
        chosen = planned(run)
    except ConfigError as error:
        return [error.problem]
    found = [dataclasses.replace(problem, where=_KEY) for target, kind in chosen for problem in target.problems(run, spec, folder, kind)]
    return [*dict.fromkeys(found), *(dataclasses.replace(problem, where=_KEY) for problem in ram_problems(spec))]


def disk(run: RunConfig, spec: ModelSpec, folder: Path) -> int:
    """Return the bytes that the planned exports take, as if each were made alone."""
    weights = weights_bytes(folder, spec)
    return sum(target.disk(spec, weights, kind) for target, kind in planned(run))


def at_the_end(run: RunConfig, folder: Path, look: Look, say: Callable[[Event], object]) -> Iterator[Event]:
    """Make the planned exports of the run in `folder`; whatever becomes of them is told and ends nothing.

    `say` journals progress from inside the work; `look` raises where somebody asks to stop.
    """
    chosen = planned(run)
    if not chosen:
        return
    gc.collect()  # what was trained is still held in circles, and the gate loads the model again
    step, done = shelf.newest_step(folder) or 0, ""
    teller = _Teller(say)
    try:
        bench = Bench(read_run(folder, look, lambda part, total: teller.note(part, total, "bytes")), look, teller.note)
        for target, kind in chosen:
            done, began = target.name, time.monotonic()
            yield Phase("export", "begin", note=target.name)
            record = make(bench, target, folder / HOME / target.name, kind, replace=True)
            yield Phase("export", "end", seconds=time.monotonic() - began, note=target.name)
            passed = bool(record["parity"]["passed"])
            advice: tuple[str, ...] = () if passed else (_again(folder, target),)
            numbers = {"path": record["path"], "difference": record["parity"]["difference"], "limit": record["parity"]["limit"]}
            yield Finding("export", "info" if passed else "warn", step, redact(sentence(record)), advice, numbers)
    except Exception as error:  # noqa: BLE001  a trained adapter is not lost to its export
        _log.exception("the export failed")
        stopped = isinstance(error, Stopped)
        told = "was stopped" if stopped else f"failed: {one_line(error) if isinstance(error, EngineError) else type(error).__name__}"
        names = [target.name for target, _ in chosen]
        left = [target for target, _ in chosen[names.index(done) if done else 0 :]]  # none after it was begun
        advice = tuple(_again(folder, target) for target in left)
        yield Finding("export", "warn", step, redact(f"the export{f' to {done}' if done else ''} {told}; the adapter is whole"), advice)


def _again(folder: Path, target: Target) -> str:
    return f"qlora-tui export {folder.name} --to {target.name}"


class _Teller:
    """Journals progress at most four times a second, and the last of each kind."""

    def __init__(self, say: Callable[[Event], object]) -> None:
        self._say, self._last = say, 0.0

    def note(self, done: int, total: int, what: str) -> None:
        """Tell `done` of `total`."""
        now = time.monotonic()
        if now - self._last >= 0.25 or done >= total:
            self._last = now
            unit, _, by = what.partition(" ")
            self._say(Phase("export", "progress", done=done, total=total, unit=unit, note=by))
