"""A run as lines on stdout: its journal, read as it grows; and its report, made anew after it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tui.engine.errors import EngineError
from qlora_tui.engine.events import Finished, Record, decode
from qlora_tui.engine.journal import EVENTS, Tail, read_records
from qlora_tui.engine.text import one_line
from qlora_tui.tui.printer import Printer, Streams

if TYPE_CHECKING:
    from qlora_tui.engine.session import Session

LOOKS_A_SECOND = 4


class RunLines:
    """Print a run from its journal, from now on; a slow reader of stdout delays only this."""

    def __init__(self, folder: Path, streams: Streams, *, as_json: bool) -> None:
        """Pass over what earlier attempts, or this one so far, have said."""
        self._tail = Tail(folder / EVENTS)
        self._printer = Printer(streams, folder)
        self._streams, self._json = streams, as_json
        self._last: Record | None = None
        self._ended, self._seq = False, 0
        while records := self._tail.records():
            for record in records:
                self._printer.note(record)
                self._last = record

    def until(self, session: Session) -> None:
        """Print until the session has ended and all it said is printed."""
        while True:
            ended = session.wait(1 / LOOKS_A_SECOND)
            self.drain()
            if ended:
                break
        if not self._ended and session.last_word is not None:  # a full disk kept it out of the journal
            record = Record(session.attempt, self._seq + 1, round(time.time(), 3), session.last_word)
            if self._json:
                self._streams.data.event(record)
            else:
                self._printer.show(record)

    def last_word(self) -> None:
        """Say how the run ended, when it ended before this began to look."""
        if self._last is not None and isinstance(self._last.event, Finished):
            self._printer.show(self._last)

    def drain(self) -> None:
        """Print what is new."""
        if self._json:
            while lines := self._tail.lines():
                self._streams.data.write("".join(f"{line}\n" for line in lines))
                self._note([record for line in lines if (record := decode(line)) is not None])
            return
        while records := self._tail.records():
            self._note(records)
            for record in records:
                self._printer.show(record)

    def _note(self, records: Sequence[Record]) -> None:
        self._ended = any(isinstance(record.event, Finished) for record in records)
        self._seq = records[-1].seq if records else self._seq


def write_report(folder: Path, streams: Streams) -> None:
    """Make the reports of a run anew, where it has a journal; a full disk is told, and what was done before stays done."""
    from qlora_tui.engine import report

    try:
        if (folder / EVENTS).is_file():
            report.write(folder, read_records(folder / EVENTS))
    except (OSError, EngineError) as error:
        streams.talk.line(f"the report could not be written anew: {one_line(error)}")
