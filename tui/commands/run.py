"""A run from the command line: with the screen, without, detached, resumed, or only looked at.

What checks and trains is imported where it is called: the wizard is on the screen before it is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tui.engine import notify, preset, resume, runs
from qlora_tui.engine.errors import ConfigError, EngineError, ExitCode, JournalError
from qlora_tui.engine.events import Event, Finished, Outcome
from qlora_tui.engine.journal import EVENTS, Journal, Tail, is_running
from qlora_tui.engine.places import is_here, replace_file
from qlora_tui.engine.rules import problems
from qlora_tui.engine.runs import LOG
from qlora_tui.engine.signals import Signals
from qlora_tui.engine.spec import BUILTIN, RunConfig, from_values, values_of
from qlora_tui.engine.text import without_secrets
from qlora_tui.engine.values import Value
from qlora_tui.tui.commands import CHILD
from qlora_tui.tui.commands.lines import RunLines
from qlora_tui.tui.commands.settings import resolved
from qlora_tui.tui.printer import Streams
from qlora_tui.tui.reading import Reading, on_a_line

if TYPE_CHECKING:
    from qlora_tui.engine.session import Session, Train

_BEGIN_SECONDS = 120.0
_END_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asks for: the config, a name for the run, and the folder when it goes on with one."""

    run: RunConfig
    name: str
    folder: Path | None = None
    demo: bool = False


Begin = Callable[[Plan, RunConfig, Reading], "Session"]


def run(options: argparse.Namespace) -> int:
    """Run the wizard and the run screen, or the run alone with `--no-ui`."""
    return _launch(options, planned(options))


def planned(options: argparse.Namespace) -> Plan:
    """Return what the options ask for: a new run, or with `--resume` one to go on with."""
    return _resumed(options) if options.resume else _new(options)


def demo(options: argparse.Namespace) -> int:
    """Run the demo: the preset of that name, whose values the options may replace."""
    if options.preset not in ("", "demo"):
        raise ConfigError(
            f"the demo is a preset itself and cannot be {options.preset}", hint=f"qlora-tui --preset {options.preset}", where="--preset"
        )
    if options.resume:
        return _launch(options, dataclasses.replace(_resumed(options), demo=True))
    options.preset = "demo"
    return _launch(options, dataclasses.replace(_new(options), demo=True))


def child(options: argparse.Namespace) -> int:
    """Run what `--detach` prepared in a folder; this is that process."""
    folder = Path(options.folder)
    plan = Plan(from_values(preset.read_file(folder / runs.RUN_FILE)), folder.name, folder)
    try:
        return headless(plan, Streams(), as_json=False)
    except EngineError as error:
        if not is_running(folder):
            _not_begun(plan.run, folder, error)
        raise


def scores(options: argparse.Namespace) -> int:
    """Let the base score the answers of the run in a folder, and stop there; this is the process that `tui.scoring` starts."""
    from qlora_tui.engine.session import score_for_real

    folder = Path(options.folder)
    plan = Plan(from_values(preset.read_file(folder / runs.RUN_FILE)), folder.name, folder)
    return headless(plan, Streams(), as_json=False, begin=functools.partial(begin, train=score_for_real))


def _not_begun(run: RunConfig, folder: Path, error: EngineError) -> None:
    """Leave a last word where the run could not begin after all: without one it would count as crashed."""
    outcome: Outcome = "will_not_fit" if error.exit_code is ExitCode.WILL_NOT_FIT else "failed"
    word = Finished(outcome, int(error.exit_code), without_secrets(error, limit=2000))
    _last_word(folder, word)
    notify.tell(run, notify.Facts(folder), word)


def _last_word(folder: Path, word: Finished) -> None:
    journal = Journal(folder)
    journal.write(word)
    journal.close()


def _stopped_early(plan: Plan, code: int, why: str) -> None:
    """Leave a last word in the folder that `--detach` made, when a signal came before its run began."""
    if plan.folder is not None and not (plan.folder / EVENTS).exists():
        _last_word(plan.folder, Finished("stopped", code, why))


def _new(options: argparse.Namespace) -> Plan:
    chosen = resolved(options)
    return Plan(chosen, options.preset or chosen.model_name_or_path.removeprefix(BUILTIN))


def _resumed(options: argparse.Namespace) -> Plan:
    """Return the plan of `--resume`: the run's own settings, with the few changes that a resume allows.

    Raises:
        ConfigError: there is no such run, it is done, or a change would make it another run.
        JournalError: it is running.
    """
    if options.config or options.preset:
        raise ConfigError("a resumed run keeps its own settings", hint="leave out --config and --preset", where="--resume")
    flags: dict[str, Value] = dict(options.flags)
    folder = runs.find_run(options.resume, Path(str(flags.pop("runs_dir", "runs"))).expanduser())
    if is_running(folder):
        raise JournalError(f"run {folder.name} is running", hint=f"qlora-tui attach {folder.name}", where="--resume")
    written = from_values(preset.read_file(folder / runs.RUN_FILE))
    saved = resume.trained_with(folder) or written
    chosen, effects = resume.resumable(saved, {**values_of(written), **_as_saved(flags)})
    info = runs.read_info(folder)
    if "max_steps" in flags and 0 < chosen.max_steps <= info.step:
        raise ConfigError(f"run {folder.name} is at step {info.step} already", hint="name a later step", where="--max-steps")
    longer = (chosen.max_steps, chosen.num_train_epochs) != (saved.max_steps, saved.num_train_epochs)
    if info.outcome == "done" and info.step >= info.total_steps and not longer:
        raise ConfigError(f"run {folder.name} is done", hint=f"--max-steps {info.total_steps * 2} would go on", where="--resume")
    for effect in effects:
        Streams().talk.line(effect)
    return Plan(chosen, folder.name, folder)


def _as_saved(flags: Mapping[str, Value]) -> dict[str, Value]:
    """Return `flags` with local paths as a run.toml holds them, so that naming the same file again is no change."""
    placed = values_of(anchored(from_values(flags)))
    return {name: placed[name] for name in flags}


def _launch(options: argparse.Namespace, plan: Plan) -> int:
    streams = Streams()
    if options.dry_run:
        from qlora_tui.tui.commands import facts

        return facts.dry_run(plan.run, streams, as_json=options.json)
    if options.detach:
        return detach(plan, streams, as_json=options.json)
    wanted = not (options.no_ui or options.json)
    if wanted and not can_draw():
        _without_terminal(plan.run)
        streams.talk.line("no terminal here: going on as with --no-ui")
        wanted = False
    if wanted:
        return on_screen(options, plan, streams)
    return headless(plan, streams, as_json=options.json)


def can_draw() -> bool:
    """Say whether a screen can be drawn: it reads stdin and draws on stderr; stdout may be a pipe."""
    return bool(
        sys.stdin and sys.stdin.isatty() and sys.stderr and sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb")
    )


def _without_terminal(run: RunConfig) -> None:
    if found := problems(run):
        missing = "\n".join(f"  {problem}" for problem in found)
        raise ConfigError(f"there is no terminal for the wizard, and the options alone do not make a run:\n{missing}")


def begin(plan: Plan, run: RunConfig, reading: Reading, train: Train | None = None) -> Session:
    """Check `run`, make its folder and return its session, not yet started; `reading` is told how far it is and may end it.

    Raises:
        EngineError: the run cannot be, in one sentence or a list of them.
    """
    from qlora_tui.engine import preflight
    from qlora_tui.engine.session import Session, train_for_real

    placed = anchored(run)
    checked = preflight.check(placed, stopping=reading.stopping, progress=reading.progress)
    folder = plan.folder or runs.new_run_folder(placed, plan.name or placed.model_name_or_path.removeprefix(BUILTIN))
    try:
        again = plan.folder is not None and (folder / EVENTS).exists()
        return Session(placed, checked, folder=folder, resume=again, train=train or train_for_real)
    except EngineError:
        if plan.folder is None:  # nothing half-made stays of a run that did not begin
            shutil.rmtree(folder, ignore_errors=True)
        raise


def anchored(run: RunConfig) -> RunConfig:
    """Return `run` with local paths made absolute, so that its run.toml means the same from every folder."""

    def fixed(name: str) -> str:
        return str(Path(name).expanduser().resolve()) if name and not name.startswith(BUILTIN) and is_here(name) else name

    from qlora_tui.engine.data import absolute

    data = tuple(map(absolute, run.data))
    return dataclasses.replace(run, model_name_or_path=fixed(run.model_name_or_path), data=data, eval_data=absolute(run.eval_data))


def headless(plan: Plan, streams: Streams, *, as_json: bool, begin: Begin = begin) -> int:
    """Run without a screen: the main thread prints what the journal says and never touches the run."""
    with Signals(too_early=lambda code, why: _stopped_early(plan, code, why)) as signals:
        with on_a_line(streams.talk) as reading:
            session = signals.mind(begin(plan, plan.run, reading))
        with streams.apart(session.folder / LOG):
            signals.say = lambda text: streams.talk.raw(f"\n{text}\n")
            follower = RunLines(session.folder, streams, as_json=as_json)
            session.start()
            follower.until(session)
    return session.exit_code


def warm() -> None:
    """Begin to load the training libraries, on a thread of their own."""
    from qlora_tui.engine import session

    session.warm()


def on_screen(options: argparse.Namespace, plan: Plan, streams: Streams, *, begin: Begin = begin) -> int:
    """Open the wizard or the run screen; whatever becomes of it, the run is seen to its end here."""
    from qlora_tui.tui import opening, preferences

    opening.begin()
    from qlora_tui.tui.app import run_app
    from qlora_tui.tui.terminal import restore_terminal

    preferred = preferences.read(vars(options).get("theme", ""))  # before anything begins: a fault in it is told, and nothing was done
    with Signals(say=lambda text: None, restore=restore_terminal) as signals:

        def start(run: RunConfig, reading: Reading) -> Path:
            session = signals.mind(begin(plan, run, reading))
            session.start()
            return session.folder

        with on_a_line(streams.talk) as reading:
            follow = start(plan.run, reading) if plan.folder else None
        try:
            kind = run_app(
                start=None if follow else start,
                draft=None if follow else plan.run,
                follow=follow,
                mouse=not options.no_mouse,
                ascii_only=options.ascii,
                demo=plan.demo,
                on_abort=lambda: signals.session.end_now(ExitCode.INTERRUPTED, restore_terminal) if signals.session else None,
                on_ready=warm,
                preferences=preferred,
            ).kind
        except Exception as error:  # noqa: BLE001  a broken screen must not take the run with it
            kind = "crashed"
            streams.talk.line(f"the screen failed: {type(error).__name__}: {error}")
        signals.install()
        if signals.session is None:
            return int(ExitCode.FAILED if kind == "crashed" else ExitCode.INTERRUPTED)
        return _see_out(signals, signals.session, streams, kind)


def _see_out(signals: Signals, session: Session, streams: Streams, kind: str) -> int:
    """Go on without a screen until the run has ended, then say how."""
    if kind == "crashed":
        streams.talk.line(f"the screen failed; its log is {session.folder / LOG}")
    with streams.apart(session.folder / LOG):
        signals.say = lambda text: streams.talk.raw(f"\n{text}\n")
        follower = RunLines(session.folder, streams, as_json=False)
        if session.running:
            streams.talk.line(f"run {session.folder.name} goes on here without a screen; Ctrl+C stops and saves it")
            follower.until(session)
        else:
            follower.last_word()
            while not session.wait(1.0):  # until everybody who asked for it was notified
                pass
    return session.exit_code


def detach(plan: Plan, streams: Streams, *, as_json: bool = False) -> int:
    """Start the run in a process of its own session, wait until it has begun, and say how to watch it."""
    from qlora_tui.engine import preflight

    placed = anchored(plan.run)
    with on_a_line(streams.talk) as reading:
        preflight.check(placed, stopping=reading.stopping, progress=reading.progress)
    folder = plan.folder or runs.new_run_folder(placed, plan.name)
    replace_file(folder / runs.RUN_FILE, preset.to_toml(placed))
    tail = Tail(folder / EVENTS)
    while tail.lines():
        pass
    process = spawn(folder)
    try:
        first = _first_event(tail, process) or _killed(folder, process)
    except KeyboardInterrupt:  # whoever waits for a run to begin and takes it back does not want it to begin
        process.terminate()
        if _first_event(tail, process) is None:
            _killed(folder, process)
        streams.talk.line(f"Ctrl+C: run {folder.name} is stopped")
        return int(ExitCode.INTERRUPTED)
    if isinstance(first, Finished):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
        streams.talk.line(f"the run did not begin: {first.reason}")
        return first.exit_code
    if first is None and process.poll() is not None:
        streams.talk.line(f"the run did not begin; its log is {folder / LOG}")
        return process.returncode if process.returncode > 0 else int(ExitCode.FAILED)
    if as_json:
        streams.data.document({"id": folder.name, "path": str(folder.resolve()), "pid": process.pid})
        return int(ExitCode.DONE)
    streams.data.line(folder.name)
    streams.talk.line(f"running in process {process.pid}; watch it with: qlora-tui attach {folder.name}")
    return int(ExitCode.DONE)


def spawn(folder: Path) -> subprocess.Popen[bytes]:
    """Start the run that a folder's run.toml describes, in a process and session of its own; what it prints goes to its log."""
    command = [sys.executable, "-P", "-m", "qlora_tui.tui", CHILD, str(folder.resolve())]
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    with os.fdopen(log, "wb") as said:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)


def _killed(folder: Path, process: subprocess.Popen[bytes]) -> Event | None:
    """Return, and leave in the folder, the last word of a run whose process a signal ended before it could do so itself."""
    number = -(process.poll() or 0)
    if number <= 0 or (folder / EVENTS).exists() or is_running(folder):
        return None
    word = Finished("stopped", 128 + number, f"{signal.Signals(number).name}: stopped before the run began")
    _last_word(folder, word)
    return word


def _first_event(tail: Tail, process: subprocess.Popen[bytes]) -> Event | None:
    """Wait for the first thing that a detached run says; None when it ended, or took very long, without a word."""
    deadline = time.monotonic() + _BEGIN_SECONDS
    while time.monotonic() < deadline:
        ended = process.poll() is not None  # asked before reading, so that a last word is not missed
        if records := tail.records():
            return records[0].event
        if ended:
            return None
        time.sleep(0.1)
    return None
