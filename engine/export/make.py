"""One export from its first look at the run to its proof: what is asked, done under a name of its own, judged, and only then named.

A kill at any instant leaves the folder that was asked for whole or not there. What the parity gate refuses is kept for a look,
under a name that says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tui.engine.data import Tokenizer, load_tokenizer
from qlora_tui.engine.errors import ConfigError, SpaceError
from qlora_tui.engine.export import records
from qlora_tui.engine.export.merged import weights_bytes
from qlora_tui.engine.export.room import Room, room_for
from qlora_tui.engine.export.rows import rows_of
from qlora_tui.engine.export.source import trained_losses
from qlora_tui.engine.export.target import RECORD, Json, Look, Note, Rows, Source, Target, Work
from qlora_tui.engine.places import sync_folder
from qlora_tui.engine.units import gib

if TYPE_CHECKING:
    from qlora_tui.engine.export.engines import Reference

FAILED = ".failed"
_STALE_SECONDS = 24 * 3600.0


@dataclass(slots=True)
class Bench:
    """What several exports of one run share: the rows they are proved on, and the adapter's losses on them."""

    source: Source
    look: Look
    note: Note
    room: Room | None = None
    _rows: Rows | None = None
    _reference: Reference | None = None
    tokenizer: Tokenizer = field(init=False)

    def __post_init__(self) -> None:
        """Read the tokenizer that was trained with: the base's, as the run asked for it, never one that was exported."""
        self.tokenizer = load_tokenizer(self.source.base, self.source.run.chat_template)

    def rows(self) -> Rows:
        """Return the rows, read once."""
        self._rows = self._rows or rows_of(self.source, self.tokenizer, self.look)
        return self._rows

    def reference(self, work: Work) -> Reference:
        """Return the losses by the adapter and by the base, measured once."""
        from qlora_tui.engine.export.engines import reference

        self._reference = self._reference or reference(work)
        return self._reference


def make(bench: Bench, target: Target, out: Path, kind: str, *, checked: bool = True, replace: bool = False) -> dict[str, Any]:
    """Export a run to the folder `out` and return the record that lies in it.

    With `replace` what is in `out` gives way once the new one is whole. Not `checked`, nobody has compared it with the adapter.
    The record's `parity` says whether the gate let it pass; if not, its `path` is that of the folder under another name.

    Raises:
        ConfigError: there is something in `out`, or the run or its model stand in the way of this target.
        SpaceError: the disk has no room.
        WontFit: the model does not fit into memory to be compared.
        EngineError: anything else that ends it; nothing half-written stays.
    """
    source = bench.source
    refuse(target.problems(source.run, source.spec, source.base, kind), source)
    if not replace:
        refuse_full(out)
    check_disk(out, target.disk(source.spec, weights_bytes(source.base, source.spec), kind))
    room = bench.room or (room_for(source.spec) if checked else Room("cpu", "float32"))
    bench.room = room
    with _folders(out) as (folder, spare):
        work = Work(source=source, folder=folder, spare=spare, kind=kind, rows=bench.rows(), room=room, look=bench.look, note=bench.note)
        target.write(work)
        parity = _proved(bench, target, work) if checked else None
        failed = parity is not None and not parity["passed"]
        path = _failed_name(out) if failed else out
        record = _record(work, target, path, parity)
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _publish(folder, path)
    records.remember(source.folder, record)
    return record


def refuse(found: list[Any], source: Source) -> None:
    """Refuse an export for the first thing that stands in its way.

    Raises:
        ConfigError: there is one.
    """
    if found:
        raise ConfigError(found[0].message, hint=found[0].hint, where=source.folder.name)


def refuse_full(out: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        ConfigError: it does, or it is no folder.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if os.path.lexists(out):
        raise ConfigError(
            "this is no empty folder, and an export replaces nothing", hint="remove it, or name another with --out", where=str(out)
        )


def check_disk(out: Path, needed: int) -> None:
    """Check that there is room for the export where it goes.

    Raises:
        SpaceError: there is not.
    """
    there = next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise SpaceError(
            f"this export takes about {gib(needed)} of disk and {gib(free)} are free", where=str(there), hint="make room, or choose --out"
        )


def _proved(bench: Bench, target: Target, work: Work) -> dict[str, Any]:
    from qlora_tui.engine.export.engines import memory_told

    with memory_told():
        return _proof(bench, target, work)


def _proof(bench: Bench, target: Target, work: Work) -> dict[str, Any]:
    from qlora_tui.engine.export import parity

    served = target.serve(work)
    known = bench.reference(work)
    before = trained_losses(bench.source.folder)
    quantized = [before[row.row] for row in work.rows.tokens if row.row in before]
    means = parity.Means(
        adapter=[row.mean for row in known.adapter],
        base=[row.mean for row in known.base],
        export=served.losses(work.rows.tokens),
        quantized=quantized if len(quantized) == len(work.rows.tokens) else (),
    )
    limit = parity.limit_of(work.room.type_name, work.kind)
    return dataclasses.asdict(parity.judge(work.rows, means, served, bench.tokenizer, limit))


def _record(work: Work, target: Target, path: Path, parity: Json | None) -> dict[str, Any]:
    source, here = work.source, work.folder
    files = {file.relative_to(here).as_posix(): file.stat().st_size for file in sorted(here.rglob("*")) if file.is_file()}
    return {
        "v": 1,
        "target": target.name,
        "type": work.kind,
        "path": str(path.absolute()),
        "made": round(time.time(), 3),
        "run": source.folder.name,
        "base": source.run.model_name_or_path,
        "commit": source.commit,
        "method": source.run.method,
        "adapter_sha256": records.adapter_digest(source),
        "files": files,
        "bytes": sum(files.values()),
        "use": target.use(source, path.absolute(), work.kind),
        "parity": parity,
    }


@contextlib.contextmanager
def _folders(out: Path) -> Iterator[tuple[Path, Path]]:
    """Lend a folder to fill and one for scratch beside `out`; both are gone afterwards unless they were given a name.

    What a killed process left here a day ago goes too.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for old in out.parent.glob(f".{out.name}.export-*"):
            if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        home = out.with_name(f".{out.name}.export-{os.getpid()}")
        shutil.rmtree(home, ignore_errors=True)
        for part in (home, home / "out", home / "spare"):
            part.mkdir()
    except OSError as error:
        raise SpaceError(
            f"the export cannot be written: {error.strerror}", where=str(out), hint="choose another folder with --out"
        ) from None
    try:
        yield home / "out", home / "spare"
    except OSError as error:
        raise SpaceError(f"the export could not be written: {error.strerror or error}", where=str(out), hint="make room") from error
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _publish(folder: Path, path: Path) -> None:
    """Put a filled folder on the disk and give it its name; what lies there gives way."""
    inside = sorted(folder.rglob("*"), reverse=True)
    for file in inside:
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if path.is_dir() and any(path.iterdir()):
        path.rename(folder.with_name("before"))
    folder.rename(path)
    sync_folder(path.parent)


def _failed_name(out: Path) -> Path:
    """Return the name under which a refused export is kept: that of an earlier refused one gives way, anything else does not."""
    for number in range(1, 100):
        path = out.with_name(out.name + FAILED + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(path) or (path / RECORD).is_file():
            return path
    return out.with_name(f"{out.name}{FAILED}-{time.time_ns()}")
