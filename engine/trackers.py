"""Trackers: the figures of a run in TensorBoard, Weights & Biases or Trackio as well, where that was asked for.

They are fed by a process of their own that follows `events.jsonl` as any viewer does. So they cannot delay or change a
run: none of their threads, random numbers, patches or crashes are in its process. Only figures and settings that are
numbers or choices go there: no code, no git, no environment, no paths, no prompts, nothing of the machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import netrc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from qlora_tui.engine.errors import Problem
from qlora_tui.engine.events import Evaluated, Finished, Record, Resumed, RolledBack, Started, Stepped
from qlora_tui.engine.journal import EVENTS, Tail, is_running, size_of
from qlora_tui.engine.logfile import LogFile
from qlora_tui.engine.spec import KEYS, TRACKERS, RunConfig, nearest
from qlora_tui.engine.text import one_line

KEY = "report_to"
FOLDER = "tensorboard"
PROJECT = "qlora-tui"
LOG = "log.txt"
PATIENCE_SECONDS = 15.0
"""How long a run that has ended waits for its trackers; what they still have to send, they send without it."""
_ALONE_SECONDS = 300
_LOOK_SECONDS = 0.5
_QUIET = {
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "DO_NOT_TRACK": "1",
}
"""What keeps these libraries from speaking of themselves."""
_log = logging.getLogger("qlora_tui.trackers")


class Tracker(Protocol):
    """One tracker, in the process that follows; whatever it raises turns it off."""

    def log(self, step: int, t: float, figures: Mapping[str, float]) -> None:
        """Take the figures of a step; `t` is Unix time."""

    def back(self, step: int, t: float) -> None:
        """What came after `step` is void."""

    def close(self, outcome: str, exit_code: int) -> None:
        """Send what is left."""


def unready(run: RunConfig) -> list[Problem]:
    """Return why a tracker could not work: unknown, not installed, or not logged in where nobody could be asked."""
    found = []
    for name in run.report_to:
        if name not in TRACKERS:
            found.append(Problem(KEY, f"no tracker is called {name!r}", nearest(name, TRACKERS) or f"there are {', '.join(TRACKERS)}"))
        elif (spec := importlib.util.find_spec(name)) is None or spec.origin is None:  # a bare folder of that name is no package
            found.append(Problem(KEY, f"{name} is not installed", f"{sys.executable} -m pip install {name}"))
        elif name == "wandb" and not _wandb_known():
            found.append(
                Problem(KEY, "wandb knows no account here, and a run asks nothing", "run wandb login, or export WANDB_MODE=offline")
            )
    return found


class Following:
    """The process that feeds the trackers of one attempt."""

    def __init__(self, run: RunConfig, folder: Path) -> None:
        """Start it, from what the journal will say next on; where it cannot be, the run goes on without."""
        self._process: subprocess.Popen[bytes] | None = None
        if not run.report_to:
            return
        command = [sys.executable, "-P", "-m", "qlora_tui.engine.trackers", str(folder), str(size_of(folder / EVENTS)), *run.report_to]
        environment, nothing = {**os.environ, **_QUIET, "CUDA_VISIBLE_DEVICES": ""}, subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                command, stdin=nothing, stdout=nothing, stderr=nothing, env=environment, start_new_session=True
            )
        except OSError as error:
            _log.warning("no tracker follows: %s", error)

    def finish(self, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until all was sent, `seconds` at most; the process then goes on alone and ends by itself."""
        if self._process is None:
            return
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            _log.warning("the trackers are still sending; they go on without this process")
            return
        if code:
            _log.warning("the process of the trackers ended with code %d", code)


def shared(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that trackers are told: numbers, switches and choices, the layers, and the model's name without its path."""
    found: dict[str, Any] = {}
    for name, key in KEYS.items():
        told = key.kind in ("integer", "number", "flag", "duration", "layers") or bool(key.choices) or name == "lora_target_modules"
        if name in config and told:
            found[name] = list(config[name]) if isinstance(config[name], tuple) else config[name]
    model = str(config.get("model_name_or_path", ""))
    return found | {"model": model.rstrip("/").rsplit("/", 1)[-1] if model.startswith(("/", ".", "~")) else model}


def figures_of(record: Record) -> dict[str, float]:
    """Return the figures of an event under the names that trackers' users know; what is not finite is left out."""
    match record.event:
        case Stepped() as step:
            found: dict[str, float | None] = {
                "train/loss": step.loss,
                "train/grad_norm": step.grad_norm,
                "train/learning_rate": step.lr,
                "train/epoch": step.epoch,
                "perf/tokens_per_second": step.tokens / step.seconds if step.seconds > 0 else None,
                "perf/memory_peak_gib": step.memory_peak_bytes / 2**30,
            }
        case Evaluated(manner=False) as measured:  # a verdict said anew has no new figures
            found = {"eval/loss": measured.loss, "eval/base_loss": measured.base_loss, "eval/drop": measured.drop}
        case _:
            found = {}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


class TensorBoard:
    """Event files in the run's folder; needs neither torch nor TensorFlow."""

    def __init__(self, folder: Path, run_id: str, config: Mapping[str, Any]) -> None:
        """Open a new file beside those of earlier attempts."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._session, self._summary = Event, SessionLog, Summary
        self._writer = EventFileWriter(str(folder / FOLDER))

    def log(self, step: int, t: float, figures: Mapping[str, float]) -> None:
        """Write one event."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._writer.add_event(self._event(wall_time=t, step=step, summary=self._summary(value=values)))

    def back(self, step: int, t: float) -> None:
        """Say that the session begins anew after `step`: TensorBoard then forgets later ones."""
        start = self._session(status=self._session.START)
        self._writer.add_event(self._event(wall_time=t, step=step + 1, session_log=start))

    def close(self, outcome: str, exit_code: int) -> None:
        """Flush."""
        self._writer.close()


class Wandb:
    """Weights & Biases, with all that it gathers by itself turned off; `WANDB_MODE=offline` keeps it in the run's folder."""

    def __init__(self, folder: Path, run_id: str, config: Mapping[str, Any]) -> None:
        """Begin a run there, or go on with the one of an earlier attempt."""
        import wandb

        wished = {
            "console": "off",
            "silent": True,
            "disable_code": True,
            "save_code": False,
            "disable_git": True,
            "disable_job_creation": True,
        }
        wished |= dict.fromkeys(("x_disable_stats", "x_disable_meta", "x_disable_machine_info", "label_disable"), True)
        wished |= {"x_save_requirements": False, "host": "", "program": "qlora-tui"}
        known = set(wandb.Settings.model_fields)
        settings = wandb.Settings(**{name: value for name, value in wished.items() if name in known})
        safe_id = re.sub(r"[^A-Za-z0-9_.-]", "-", run_id)
        project = os.environ.get("WANDB_PROJECT") or PROJECT
        self._run = wandb.init(
            project=project, name=run_id, id=safe_id, dir=str(folder), config=dict(config), resume="allow", settings=settings
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, t: float, figures: Mapping[str, float]) -> None:
        """Log them by our own count of steps, since wandb's cannot go back."""
        self._run.log({**figures, "step": step})

    def back(self, step: int, t: float) -> None:
        """Do nothing: the same steps come again, and theirs is the later value."""

    def close(self, outcome: str, exit_code: int) -> None:
        """Say how it ended and wait until all was sent."""
        self._run.summary["outcome"] = outcome
        self._run.finish(exit_code=exit_code)


class Trackio:
    """Trackio's local database, or the space that TRACKIO_SPACE_ID names."""

    def __init__(self, folder: Path, run_id: str, config: Mapping[str, Any]) -> None:
        """Begin a run there, or go on with the one of an earlier attempt."""
        import inspect

        import trackio

        wished = {"name": run_id, "config": dict(config), "resume": "allow", "embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        known = inspect.signature(trackio.init).parameters
        self._run = trackio.init(
            os.environ.get("TRACKIO_PROJECT") or PROJECT, **{name: value for name, value in wished.items() if name in known}
        )

    def log(self, step: int, t: float, figures: Mapping[str, float]) -> None:
        """Log them."""
        self._run.log(dict(figures), step=step)

    def back(self, step: int, t: float) -> None:
        """Do nothing, as for wandb."""

    def close(self, outcome: str, exit_code: int) -> None:
        """Wait until all was written."""
        self._run.finish()


_MADE: Mapping[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


class Feed:
    """What is read from the journal, passed on to every tracker that still works."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        """Make no tracker yet: a run that ends before its first step leaves no trace in them."""
        self._folder, self._waiting = folder, list(names)
        self._live: dict[str, Tracker] = {}
        self._config: Mapping[str, Any] = {}
        self._step = 0

    def take(self, record: Record) -> None:
        """Pass on one record."""
        event = record.event
        if isinstance(event, Started):
            self._config = event.config
        elif isinstance(event, (Resumed, RolledBack)):
            self._open()
            self._each(lambda tracker: tracker.back(event.to_step, record.t))
        elif figures := figures_of(record):
            self._open()
            self._step = event.step if isinstance(event, (Stepped, Evaluated)) else self._step
            self._each(lambda tracker: tracker.log(self._step, record.t, figures))

    def close(self, word: Finished | None) -> None:
        """Tell them the end; without a last word the run crashed."""
        outcome, code = (word.outcome, word.exit_code) if word else ("crashed", 1)
        self._each(lambda tracker: tracker.close(outcome, code))

    def _open(self) -> None:
        names, self._waiting = self._waiting, []
        for name in names:
            with self._or_off(name):
                self._live[name] = _MADE[name](self._folder, self._folder.name, shared(self._config))

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name in list(self._live):
            with self._or_off(name):
                do(self._live[name])

    @contextlib.contextmanager
    def _or_off(self, name: str) -> Any:
        try:
            yield
        except Exception as error:  # noqa: BLE001  whatever a tracker raises, the others and the run go on
            self._live.pop(name, None)
            _log.warning("%s is off from here on: %s: %s", name, type(error).__name__, one_line(error))


def follow(folder: Path, offset: int, names: list[str]) -> None:
    """Feed the trackers from the journal of `folder`, from `offset` on, until the attempt has ended or its process is gone."""
    tail, feed = Tail(folder / EVENTS, offset), Feed(folder, names)
    word: Finished | None = None
    while word is None:
        running = is_running(folder)  # asked before reading, so that a last word is not missed
        records = tail.records()
        for record in records:
            feed.take(record)
            word = record.event if isinstance(record.event, Finished) else word
        if not records and not running:
            break
        if word is None:
            time.sleep(_LOOK_SECONDS)
    signal.alarm(_ALONE_SECONDS)  # a server that never answers must not keep this process for ever
    feed.close(word)


def _wandb_known() -> bool:
    """Say whether wandb can work without asking: a key, a login, or no server at all."""
    if os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return True
    host = re.sub(r"^https?://|[:/].*$", "", os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class _Said(io.TextIOBase):
    """What the trackers print, as safe lines of the log: some of it would steer a terminal that shows the log."""

    def write(self, text: str) -> int:
        if text.strip():
            _log.info("%s", one_line(text))
        return len(text)


def main(arguments: list[str]) -> None:
    """Follow a run; the side of the process that `Following` starts."""
    folder = Path(arguments[0])
    said = _Said()
    with LogFile(folder / LOG), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            follow(folder, int(arguments[1]), arguments[2:])
        except Exception:
            _log.exception("the trackers ended")
            raise


if __name__ == "__main__":
    main(sys.argv[1:])
