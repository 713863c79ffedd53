"""`export`: what a run trained, in the form that other programs want, with the proof that it is the same model."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from qlora_tui.engine.errors import ConfigError, ExitCode, Stopped
from qlora_tui.engine.runs import LOG, find_run
from qlora_tui.engine.spec import nearest
from qlora_tui.engine.text import one_line, redact
from qlora_tui.tui.commands.lines import write_report
from qlora_tui.tui.printer import Streams
from qlora_tui.tui.reading import on_a_line

_CODES = {signal.SIGINT: ExitCode.INTERRUPTED, signal.SIGTERM: ExitCode.TERMINATED}


def export(options: argparse.Namespace) -> int:
    """Export a run; exit 1 if the parity gate refuses what came out."""
    from qlora_tui.engine.export.records import HOME

    target, kind = _chosen(options.to, options.type)
    folder = find_run(options.name, Path(str(options.flags.get("runs_dir", "runs"))).expanduser())
    out = Path(options.out).expanduser() if options.out else folder / HOME / target.name
    streams, wish = Streams(), _Wish()
    try:
        with wish.heard(streams):
            record = _made(streams, wish, folder, target, out, kind, checked=not options.unchecked)
    except Stopped as stopped:
        streams.talk.line(f"{stopped}: nothing half-made stays")
        return int(wish.code)
    write_report(folder, streams)
    if options.json:
        streams.data.document(record)
    else:
        _print(streams, record)
    refused = record["parity"] is not None and not record["parity"]["passed"]
    return int(ExitCode.FAILED if refused else ExitCode.DONE)


def _chosen(name: str, kind: str) -> tuple[Any, str]:
    """Return the target called `name`, and the type of its weights.

    Raises:
        ConfigError: there is no such target, or it has no such type.
    """
    from qlora_tui.engine.export import TARGETS, kind_of

    names = [target.name for target in TARGETS]
    if name not in names:
        raise ConfigError(f"no target {one_line(name)!r}", hint=nearest(name, names) or f"there are {', '.join(names)}", where="--to")
    target = TARGETS[names.index(name)]
    return target, kind_of(target, kind, where="--type")


def _made(streams: Streams, wish: _Wish, folder: Path, target: Any, out: Path, kind: str, *, checked: bool) -> dict[str, Any]:
    from qlora_tui.engine.export.make import Bench, make, refuse_full
    from qlora_tui.engine.export.source import open_run
    from qlora_tui.engine.session import settle_libraries

    refuse_full(out)
    settle_libraries()
    with on_a_line(streams.talk) as reading, streams.apart(folder / LOG):

        def note(done: int, total: int, what: str) -> None:
            reading.say(done / total if total else None, f"exporting {target.name}: {what}")

        source = open_run(folder, wish.look, lambda done, total: note(done, total, "fetching the base"))
        return make(Bench(source, wish.look, note), target, out, kind, checked=checked)


def _print(streams: Streams, record: dict[str, Any]) -> None:
    from qlora_tui.engine.export.words import lines

    streams.data.write("".join(f"{word:<8}{redact(text)}\n" for word, text in lines(record)))


class _Wish:
    """A wish to end, from a signal: obeyed between two parts of the work; the second one is obeyed at once."""

    def __init__(self) -> None:
        self.code = ExitCode.INTERRUPTED
        self._asked = False

    def look(self) -> None:
        """End the work if somebody asked for it.

        Raises:
            Stopped: somebody did.
        """
        if self._asked:
            raise Stopped("the export was stopped")

    @contextmanager
    def heard(self, streams: Streams) -> Iterator[None]:
        """Listen to Ctrl+C and SIGTERM, and put back what was there."""

        def handler(number: int, frame: FrameType | None) -> None:
            self.code = _CODES[signal.Signals(number)]
            if self._asked:
                raise Stopped("the export was stopped")
            self._asked = True
            streams.talk.raw("\nstopping after this part; once more stops at once\n")

        before = {number: signal.signal(number, handler) for number in _CODES}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)
