"""Lines for people and scripts: stdout is data, stderr is talk, and neither can stop a run.

Only this file and `cli` write to the terminal. A reader that goes away (`| head`) closes the output quietly;
the journal on disk goes on, and so does the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from qlora_tui.engine.events import (
    Command,
    Evaluated,
    Event,
    Finding,
    Finished,
    Forecast,
    Phase,
    Planned,
    Prepared,
    Probed,
    Record,
    Resumed,
    RolledBack,
    Sampled,
    Saved,
    Started,
    Stepped,
    encode,
    plain,
)
from qlora_tui.engine.places import is_here
from qlora_tui.engine.text import one_line, redact, safe_text
from qlora_tui.engine.units import count, gib, words
from qlora_tui.tui.descriptors import hold_descriptors
from qlora_tui.tui.scoretext import card_lines, probe_line

_BREAK = "\n"  # inside a line it is foreign: what follows would look like a line of ours
_STEP_LINES = 100
_QUIET_SECONDS = 30.0
_PHASES = {
    "fetch": "fetching the model",
    "load": "loading",
    "data": "reading the data",
    "plan": "planning",
    "probe": "trying the largest batch",
    "eval": "measuring the hold-out",
    "save": "saving",
    "pause": "paused",
    "sample": "sampling",
    "export": "exporting",
}


class Output:
    """One stream that may close at any time; what is written then is dropped, and the run is not told."""

    def __init__(self, stream: IO[str] | None) -> None:
        """Write to `stream`; None stands for a stream that was closed before the program started."""
        self._stream = stream
        self.closed = stream is None
        self.terminal = stream is not None and stream.isatty()

    @property
    def colours(self) -> bool:
        """Return whether colours are welcome: a terminal that knows them, and nobody said NO_COLOR."""
        return self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") not in ("", "dumb")

    def write(self, text: str) -> None:
        """Write and flush `text`, or drop it once nobody reads."""
        if self.closed or self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the reader went away, the terminal is gone, or the file is closed
            self.closed = True
            self._silence()

    def line(self, text: str = "") -> None:
        """Write one line; control characters in it are made visible."""
        self.write(safe_text(redact(text)) + "\n")

    def raw(self, text: str) -> None:
        """Write `text` past every buffer: safe in a signal handler that interrupts a `write`."""
        if self.closed or self._stream is None:
            return
        try:
            os.write(self._stream.fileno(), text.encode("utf-8", "replace"))
        except (OSError, ValueError):  # as in `write`; the next one finds out
            return

    def document(self, value: Any) -> None:
        """Write one JSON document."""
        self.write(json.dumps(plain(value), ensure_ascii=True, allow_nan=False, indent=2) + "\n")

    def event(self, record: Record) -> None:
        """Write one event as the line it is on disk."""
        self.write(encode(record) + "\n")

    def _silence(self) -> None:
        """Point the descriptor at nothing, so that Python's own flush at exit does not fail aloud."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())  # type: ignore[union-attr]  # a stream without one is suppressed
            os.close(nothing)


class Streams:
    """Where data and talk go in this process."""

    def __init__(self) -> None:
        """Take the process's own streams, made able to hold any character."""
        hold_descriptors()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and hasattr(stream, "reconfigure"):  # a replaced stream (tests) has no encoding to change
                stream.reconfigure(errors="backslashreplace")
        self.data = Output(sys.stdout)
        self.talk = Output(sys.stderr)

    @contextlib.contextmanager
    def apart(self, log: Path) -> Iterator[Streams]:
        """Keep what libraries print away from data and talk: descriptors 1 and 2 go to `log`, ours to where they were.

        C code and child processes write to the descriptors, so a replaced `sys.stdout` alone would not hold them.
        """
        kept: list[tuple[int, int]] = []
        for number in (1, 2):
            with contextlib.suppress(OSError):
                kept.append((number, os.dup(number)))
        before = (self.data, self.talk)
        by_number = {number: os.fdopen(os.dup(copy), "w", encoding="utf-8", errors="backslashreplace") for number, copy in kept}
        self.data, self.talk = Output(by_number.get(1)), Output(by_number.get(2))
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        for number, _ in kept:
            os.dup2(target, number)
        os.close(target)
        try:
            yield self
        finally:
            for number, copy in kept:
                os.dup2(copy, number)
                os.close(copy)
            for stream in by_number.values():
                with contextlib.suppress(OSError, ValueError):
                    stream.close()
            self.data, self.talk = before


class Printer:
    """Events as lines for people; progress bars only where stderr is a terminal."""

    def __init__(self, streams: Streams, folder: Path) -> None:
        """Print the run in `folder`."""
        self._out, self._folder = streams, folder
        self._bar = False
        self._shown_at = 0.0
        self._phase_at = 0.0
        self._left = ""
        self._base: Evaluated | None = None
        self._steps: tuple[Stepped, Stepped] | None = None

    def show(self, record: Record) -> None:
        """Print one event, or nothing where it says nothing new to a person."""
        text = self._text(record.event, record.t)
        if text:
            self._clear_bar()
            self._out.data.write("".join(f"{redact(safe_text(line)).replace(_BREAK, ' ')}\n" for line in text))
            self._shown_at = record.t

    def note(self, record: Record) -> None:
        """Take an event into account without printing it: the summary at the end rests on the whole run."""
        if isinstance(record.event, Phase):
            return
        self._text(record.event, record.t)

    def _text(self, event: Event, t: float) -> Sequence[str]:
        match event:
            case Phase():
                return self._phase(event, t)
            case Stepped():
                return self._step(event, t)
            case Forecast():
                self._left = f"left {words(event.seconds_left[1])} ({words(event.seconds_left[0])} - {words(event.seconds_left[2])})"
                return ()
            case Evaluated():
                self._base = event if event.base_loss is not None else self._base
                return (_evaluated(event),)
            case Probed():
                return (probe_line(event),)
            case Finished():
                return self._finished(event)
            case _:
                return _plain_lines(event, self._folder)

    def _phase(self, event: Phase, t: float) -> Sequence[str]:
        if event.name == "train":
            return ()
        name = _PHASES.get(event.name, event.name)
        if event.name == "eval" and event.note:  # other rows than those held out
            name, event = f"measuring {one_line(event.note)}", dataclasses.replace(event, note="")
        if event.state == "begin":
            self._phase_at = t
            return (f"{name}{f': {one_line(event.note)}' if event.note else ''} ...",) if event.name != "save" else ()
        if event.state == "progress":
            return self._progress(name, event, t)
        took = f"  {words(event.seconds)}" if event.seconds is not None and event.seconds >= 1 else ""
        about = f": {one_line(event.note)}" if event.note else ""
        return (f"{name}{about}: done{took}",) if took else ()

    def _progress(self, name: str, event: Phase, t: float) -> Sequence[str]:
        """Draw a bar on a terminal; elsewhere say a line now and then, so that a log is no endless list."""
        if event.done is None:
            return (f"{name}: {one_line(event.note)} ...",) if event.note else ()
        text = f"{name}  {_amount(event.done, event.unit)}" + (f" of {_amount(event.total, event.unit)}" if event.total else "")
        if self._out.talk.terminal:
            share = min(1.0, event.done / event.total) if event.total else 0.0
            bar = f"[{'#' * round(share * 24):<24}] " if event.total else ""
            self._out.talk.write(f"\r\x1b[K{bar}{one_line(text, limit=100)}")
            self._bar = True
            return ()
        if t - max(self._phase_at, self._shown_at) < _QUIET_SECONDS / 3:
            return ()
        return (text,)

    def _step(self, event: Stepped, t: float) -> Sequence[str]:
        self._steps = (self._steps[0] if self._steps else event, event)
        every = max(1, event.total_steps // _STEP_LINES)
        due = event.step in (1, event.total_steps) or event.step % every == 0 or t - self._shown_at >= _QUIET_SECONDS
        if not due and not event.skipped:
            return ()
        speed = f"{count(round(event.tokens / event.seconds))} tok/s" if event.seconds > 0 else ""
        memory = gib(event.memory_allocated_bytes) if event.memory_allocated_bytes else ""
        parts = [
            f"step {event.step}/{event.total_steps}",
            f"epoch {event.epoch:.2f}",
            f"loss {event.loss:.4f}",
            f"grad {event.grad_norm:.3g}{' clipped' if event.clipped else ''}",
            f"lr {event.lr:.2e}",
            speed,
            memory,
            "SKIPPED: not finite" if event.skipped else "",
            self._left,
        ]
        return ("  ".join(part for part in parts if part),)

    def _finished(self, event: Finished) -> Sequence[str]:
        """Say how it ended, whether it helped, where the adapter is and what to type next."""
        reason = one_line(event.reason)
        lines = ["", reason if reason.startswith(event.outcome) else f"{event.outcome}: {reason}"]
        if self._base and self._base.base_loss is not None:
            lines += card_lines(self._base)
        elif self._steps:
            lines.append(f"loss of a step: {self._steps[0].loss:.4f} -> {self._steps[1].loss:.4f}")
        if event.adapter:
            lines.append(f"adapter: {one_line(self._folder / event.adapter)}")
        if event.report:
            page = f"{event.report.removesuffix('.md')}.html"
            beside = f", and {one_line(page)}" if is_here(self._folder / page) else ""
            lines.append(f"report:  {one_line(self._folder / event.report)}{beside}")
        run = self._folder.name
        if event.outcome in ("stopped", "aborted"):
            lines.append(f"go on:   qlora-tui --resume {run}")
        elif event.outcome == "done":
            lines.append(f"look:    qlora-tui attach {run}")
            lines += [f"compare: qlora-tui judge {run}"] if self._base and event.adapter else []
        else:
            lines.append(f"log:     {self._folder / 'log.txt'}")
            lines += [f"go on:   qlora-tui --resume {run}"] if self._steps and event.outcome == "failed" else []
        return lines

    def _clear_bar(self) -> None:
        if self._bar:
            self._out.talk.write("\r\x1b[K")
            self._bar = False


def _plain_lines(event: Event, folder: Path) -> Sequence[str]:
    match event:
        case Started(resumed_from=step):
            return (f"run {event.run_id} in {folder}{f', resumed from step {step}' if step is not None else ''}",)
        case Prepared():
            return _prepared(event)
        case Planned():
            return _planned(event)
        case Sampled():
            return (f"sample after step {event.step}: {one_line(event.prompt, limit=80)} -> {one_line(event.text) or '(nothing)'}",)
        case Saved():
            return (f"saved {event.kind} of step {event.step}: {one_line(event.path)} ({gib(event.bytes)})",)
        case Resumed():
            return (f"going on after step {event.to_step}",)
        case RolledBack():
            rate = f"{event.rate_factor:g} times the learning rate"
            return (f"back to step {event.to_step}, from here on with {rate}: {one_line(event.why)}",)
        case Finding():
            mark = {"info": "note", "warn": "WARNING", "stop": "STOP"}[event.severity]
            advice = f" Try: {'; '.join(one_line(text) for text in event.advice)}." if event.advice else ""
            return (f"{mark} at step {event.step}: {one_line(event.message)}.{advice}",)
        case Command():
            return (f"{event.name}: {'asked for' if event.obeyed else 'refused'}{f', {one_line(event.why)}' if event.why else ''}",)
        case _:
            return ()


def _prepared(event: Prepared) -> Sequence[str]:
    rows = f"{count(event.train_rows)} rows to train on, {count(event.holdout_rows)} held out"
    tokens = f"{count(event.tokens)} tokens an epoch, {count(event.supervised_tokens)} of them trained"
    lines = [f"data: {one_line(event.why or event.format)}", f"      {rows}; {tokens}; {count(event.total_steps)} steps"]
    missing = {**{f"refused: {reason}": number for reason, number in event.refused.items()}, **event.dropped}
    lines += [f"      {count(number)} rows left out: {one_line(reason)}" for reason, number in missing.items() if number]
    return [*lines, *(f"note: {one_line(note)}" for note in event.notes)]


def _planned(event: Planned) -> Sequence[str]:
    total, device = event.budget.get("total_bytes"), event.budget.get("device") or {}
    lines = []
    if isinstance(total, (int, float)):
        of = f" of {gib(device['total_bytes'])}" if device.get("total_bytes") else ""
        lines.append(f"memory: about {gib(total)}{of} predicted (an estimate)")
    if event.why:
        lines.append(f"plan: {one_line(event.why)}")
    return [*lines, *(f"chosen: {one_line(name)} = {one_line(value)}" for name, value in event.choices.items())]


def _evaluated(event: Evaluated) -> str:
    spread = f" ± {event.stderr:.4f}" if event.stderr > 0 else ""
    if event.base_loss is None:
        return f"held-out loss at step {event.step}: {event.loss:.4f}{spread} on {count(event.rows)} rows"
    return f"held-out loss at step {event.step}: {event.loss:.4f}, base {event.base_loss:.4f}: {one_line(event.verdict)}"


def _amount(number: int, unit: str) -> str:
    return gib(number) if unit == "bytes" else f"{count(number)} {unit}".rstrip()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under a head, in columns as wide as what they hold; every cell is one safe line."""
    cells = [[one_line(cell, limit=200) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(head))]
    return "".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in cells)
