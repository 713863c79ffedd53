"""`qlora-tui eval`: a run's adapter measured once more, by the definition of the run itself.

It is the product's own run without its training: the same owner thread, checks and signals, in a folder of its own that is
thrown away. The run's folder is only read.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tui.engine import adapters, preflight, runs
from qlora_tui.engine.adapters import Chosen
from qlora_tui.engine.errors import ConfigError, ExitCode
from qlora_tui.engine.events import Evaluated, Event, Finding, Phase, Probed, plain
from qlora_tui.engine.journal import EVENTS, Tail, read_records
from qlora_tui.engine.report.seen import see
from qlora_tui.engine.runs import LOG
from qlora_tui.engine.signals import Signals
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.text import one_line
from qlora_tui.tui.commands.run import anchored
from qlora_tui.tui.printer import Streams
from qlora_tui.tui.reading import Reading, on_a_line
from qlora_tui.tui.scoretext import card_lines, probe_line

if TYPE_CHECKING:
    from qlora_tui.engine.session import Session

_LOOK_SECONDS = 0.25
_DOING = {"fetch": "fetching the model", "load": "loading", "data": "preparing the rows", "plan": "planning", "eval": "measuring"}


def evaluate(options: argparse.Namespace) -> int:
    """Measure base and tuned, print the scorecard, and return the exit code of that work."""
    folder = runs.find_run(options.name, Path(str(options.flags.get("runs_dir", "runs"))).expanduser())
    chosen = adapters.find(folder, best=options.best)
    streams = Streams()
    place = Path(tempfile.mkdtemp(prefix="qlora-tui-eval-"))
    try:
        run = _config(chosen, str(options.flags.get("eval_data", "")), place, checks=options.checks)
        code, events = _measure(run, chosen, place, streams)
        if code:
            return code
        _print(streams, chosen, run, events, other_rows="eval_data" in options.flags, as_json=options.json)
        return int(ExitCode.DONE)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _config(chosen: Chosen, data: str, place: Path, *, checks: bool) -> RunConfig:
    """Return the run's own settings, without what concerns its training alone."""
    run = adapters.config_of(chosen.folder)
    free = {"until": "", "max_time": 0.0, "learning_rate_changes": (), "sample_prompts": (), "max_temperature": 0.0}
    run = dataclasses.replace(run, runs_dir=str(place), final_checks=checks, **free)  # type: ignore[arg-type]  # of these keys' types
    return anchored(dataclasses.replace(run, eval_data=data)) if data else run


def _measure(run: RunConfig, chosen: Chosen, place: Path, streams: Streams) -> tuple[int, list[Event]]:
    """Let an owner thread measure, telling how far it is; returns its exit code and all that it said."""
    from qlora_tui.engine.session import Session, train_for_real

    folder = place / chosen.folder.name
    folder.mkdir(mode=0o700)
    with Signals(restore=lambda: shutil.rmtree(place, ignore_errors=True)) as signals:
        with on_a_line(streams.talk) as reading:
            checked = preflight.check(run, stopping=reading.stopping, progress=reading.progress)
        session = signals.mind(Session(run, checked, folder=folder, train=functools.partial(train_for_real, measured=chosen)))
        with streams.apart(folder / LOG):
            signals.say = lambda text: streams.talk.raw(f"\n{text.replace(' and saving', '').replace(' without saving', '')}\n")
            session.start()
            _follow(session, streams)
    word = session.last_word
    if session.exit_code and word is not None:
        streams.talk.line("stopped: nothing was measured" if word.outcome in ("stopped", "aborted") else one_line(word.reason))
        _keep_log(folder / LOG, word.reason, streams)
    return session.exit_code, [record.event for record in read_records(folder / EVENTS)]


def _follow(session: Session, streams: Streams) -> None:
    """Tell how far the owner is until it has ended."""
    with on_a_line(streams.talk) as reading:
        tail, told = Tail(session.folder / EVENTS), _Told(reading)
        while not session.wait(_LOOK_SECONDS):
            told.see([record.event for record in tail.records()])


def _keep_log(log: Path, reason: str, streams: Streams) -> None:
    """Put the log of a failure of ours where a person can read it: the folder that it lies in goes."""
    if LOG in reason:
        kept = Path(tempfile.mkdtemp(prefix="qlora-tui-log-")) / LOG
        shutil.copyfile(log, kept)
        streams.talk.line(f"log: {kept}")


class _Told:
    """Turns what the owner says into a line of progress."""

    def __init__(self, reading: Reading) -> None:
        self._reading, self._doing = reading, ""

    def see(self, events: Sequence[Event]) -> None:
        """Tell the newest of `events`."""
        for event in events:
            if isinstance(event, Phase) and event.state == "begin":
                note = event.note if event.name == "eval" else ""
                self._doing = f"{_DOING.get(event.name, event.name)} {note}".rstrip()
            if isinstance(event, Phase) and event.state != "end":
                share = event.done / event.total if event.total and event.done is not None else None
                rows = f"  {event.done} of {event.total} {event.unit}" if share is not None and event.unit == "rows" else ""
                self._reading.say(share, f"{self._doing}{rows}")


def _print(streams: Streams, chosen: Chosen, run: RunConfig, events: Sequence[Event], *, other_rows: bool, as_json: bool) -> None:
    card = next((event for event in reversed(events) if isinstance(event, Evaluated) and event.base_loss is not None), None)
    if card is None:
        hint = "name rows with --data" if not run.eval_data else "name other rows with --data"
        raise ConfigError(f"run {one_line(chosen.folder.name)} holds no rows out that could be measured", hint=hint, where="RUN")
    probes = [event for event in events if isinstance(event, Probed)]
    looked = any(probed.name == "other_question" for probed in probes)
    if not looked and not other_rows and (own := _own_word(chosen)) is not None:
        card, looked = dataclasses.replace(card, verdict=own.verdict if own.manner else card.verdict, manner=own.manner), True
    findings = [event for event in events if isinstance(event, Finding) and event.severity != "info"]
    if as_json:
        streams.data.document(_document(chosen, run, card, probes, findings) | {"manner": card.manner if looked else None})
        return
    streams.data.line(f"adapter: {chosen.which}, of run {one_line(chosen.folder.name)}")
    if run.eval_data:
        streams.data.line(f"rows: {one_line(run.eval_data)}")
    for text in [*card_lines(card, len(card.worst)), *map(probe_line, probes)]:
        streams.data.line(text)
    if not looked:
        how = "these rows are too few for it" if run.final_checks else "--checks measures that"
        streams.data.line(f"not checked: whether more than the manner of the answers was learned; {how}")
    for found in findings:
        streams.data.line(f"WARNING, {one_line(found.detector)}: {one_line(found.message)}")


def _own_word(chosen: Chosen) -> Evaluated | None:
    """Return what the run itself said of this adapter, where it checked for manner as well."""
    seen = see(read_records(chosen.folder / EVENTS))
    found = seen.scorecard
    return found if found is not None and found.step == chosen.step and "other_question" in seen.probes else None


def _document(chosen: Chosen, run: RunConfig, card: Evaluated, probes: Sequence[Probed], findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the scorecard as `--json` promises it, and what is known beside it."""
    found: dict[str, Any] = plain(
        {
            "run": chosen.folder.name,
            "adapter": chosen.which,
            "step": chosen.step,
            "data": run.eval_data or None,
            "rows": card.rows,
            "base_loss": card.base_loss,
            "loss": card.loss,
            "drop": card.drop,
            "interval": card.interval,
            "better_share": card.better_share,
            "verdict": card.verdict,
            "worst": card.worst,
            "checks": [dataclasses.asdict(probed) for probed in probes],
            "findings": [{"detector": one.detector, "severity": one.severity, "message": one.message} for one in findings],
        }
    )
    return found
