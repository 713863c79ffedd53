"""The one owner of a run: its thread, its wishes, its journal and its last word.

One plain thread touches model, optimizer, data order and CUDA; nothing else does. It is no daemon thread: if the
main thread ends by mistake, Python waits for the run instead of cutting it mid-save. The main thread may still
end the process at once through `end_now`, which writes the last word and leaves by `os._exit`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import threading
import time
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NoReturn, Protocol

from qlora_tui.engine import notify, report, shelf, trackers
from qlora_tui.engine.data.tokenizer import IMPORTING
from qlora_tui.engine.errors import EngineError, ExitCode, SpaceError, Stopped
from qlora_tui.engine.events import Command, Device, Event, Finished, Outcome, Phase, Started, Stepped
from qlora_tui.engine.journal import FULL, Journal, RunLock, read_records
from qlora_tui.engine.logfile import LogFile
from qlora_tui.engine.machine import Sampler
from qlora_tui.engine.places import replace_file
from qlora_tui.engine.preflight import Checked
from qlora_tui.engine.preset import to_toml
from qlora_tui.engine.runs import LOG, RUN_FILE, claim
from qlora_tui.engine.spec import RunConfig, values_of
from qlora_tui.engine.text import one_line, without_secrets
from qlora_tui.engine.watch.throttling import Throttling
from qlora_tui.engine.watchdog import Watchdog
from qlora_tui.engine.wishes import Asked

_LIBRARIES = "the libraries for training"
_log = logging.getLogger("qlora_tui.session")


class Ended(Protocol):
    """What training returns: how it ended, why in one sentence, and where in the run folder the adapter is."""

    @property
    def outcome(self) -> Outcome:
        """Done, stopped or aborted."""

    @property
    def reason(self) -> str:
        """Why, in one sentence."""

    @property
    def adapter(self) -> str:
        """The adapter's folder, or nothing."""


Train = Callable[..., Generator[Event, None, Ended]]
"""Training as the session sees it: the fields of `train.Job` by name in, events out, one `Ended` back."""


def train_for_real(**job: Any) -> Generator[Event, None, Ended]:
    """Import the training room and run it; the import takes seconds, belongs to the owner thread, and is told as a phase."""
    began = time.monotonic()
    yield Phase("load", "begin", note=_LIBRARIES)
    with IMPORTING:
        from qlora_tui.engine.train import Job, train

    yield Phase("load", "end", seconds=time.monotonic() - began, note=_LIBRARIES)
    return (yield from train(Job(**job)))


def score_for_real(**job: Any) -> Generator[Event, None, Ended]:
    """Run as training does until the base has scored the answers, and end there."""
    return train_for_real(**job, scores_alone=True)


def warm() -> None:
    """Import the training room beside whatever a person is still typing; a failure will be told by the run itself."""
    settle_libraries()

    def load() -> None:
        with contextlib.suppress(Exception), IMPORTING:
            import qlora_tui.engine.train  # noqa: F401  imported for its cost

    threading.Thread(target=load, name="warm", daemon=True).start()


class Session:
    """One attempt at one run; made in the main thread, which then waits in `wait` and never in `join`."""

    def __init__(self, run: RunConfig, checked: Checked, *, folder: Path, resume: bool = False, train: Train = train_for_real) -> None:
        """Take the folder's lock and write down what will run; nothing is trained before `start`.

        Raises:
            JournalError: another process runs in `folder`, or it is not ours.
            SpaceError: `folder` cannot be written.
        """
        self.run, self.folder, self.resume = run, claim(folder), resume
        self._checked, self._train = checked, train
        self._lock = RunLock(folder)
        try:
            replace_file(folder / RUN_FILE, to_toml(run))
            self._journal = Journal(folder)
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                fault = f"the run folder cannot be written: {error.strerror}"
                raise SpaceError(fault, where=str(folder), hint="make room, or choose another folder with --runs-dir") from None
            raise
        self.attempt = self._journal.attempt
        self.wishes = Asked(folder, self.attempt, self._write)
        self.last_word: Finished | None = None
        self._stop_code = ExitCode.INTERRUPTED
        self._throttling, self._step = Throttling(), 0
        self._facts = notify.Facts(folder)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._own, name="owner", daemon=False)
        self.hung: Callable[[str], object] = lambda told: self.end_now(ExitCode.FAILED, told=told)
        self._watchdog = Watchdog(self._write_beside, self._thread, end_after=run.end_if_hung, end=lambda told: self.hung(told))

    def start(self) -> None:
        """Start the owner thread."""
        settle_libraries()
        self._thread.start()

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the end of the run and say whether it came."""
        return self._done.wait(timeout)

    @property
    def running(self) -> bool:
        """Say whether the last word is still to come; after it, `wait` lasts until it was passed on."""
        return self.last_word is None

    @property
    def exit_code(self) -> int:
        """Return what the process should tell the shell."""
        return self.last_word.exit_code if self.last_word else int(ExitCode.FAILED)

    def ask(self, name: str, cause: str, code: ExitCode = ExitCode.INTERRUPTED) -> None:
        """Ask for "stop" or "abort" from a signal handler; only assigns, so it is safe at any instant."""
        self._stop_code = code
        self.wishes.ask(name, cause)

    def end_now(self, code: int, restore: Callable[[], object] = lambda: None, told: str = "") -> NoReturn:
        """End the process within two seconds whatever the owner thread does: last word, terminal, exit.

        The word is written by a thread of its own, since the owner may hold the journal's lock in a stuck disk. With
        `told`, which says why nobody had to ask, the run counts as failed, and notifications are made first.
        """
        lost = "what came after the last checkpoint is not saved"
        word = Finished("failed" if told else "aborted", code, f"{told or 'ended at once'}: {lost}")
        writer = threading.Thread(target=self._journal.write, args=(word,), name="last word", daemon=True)
        writer.start()
        writer.join(1.0)
        try:
            restore()
            if told:
                notify.tell(self.run, self._facts, word)
        finally:
            os._exit(code)

    def _own(self) -> None:
        with LogFile(self.folder / LOG):
            self._following = trackers.Following(self.run, self.folder)
            word = Finished("failed", ExitCode.FAILED, "the run ended without saying why")
            try:
                word = self._through()
            except BaseException as error:  # noqa: BLE001  the one place where anything becomes a last word
                _log.error("the run failed\n%s", "".join(traceback.format_exception(error)))
                word = self._explain(error)
            finally:
                self._end(word)

    def _through(self) -> Finished:
        """Run the attempt from its first event to the last one before `finished`."""
        self._write(self._started())
        sampler = Sampler(self._write_beside)
        sampler.start()
        self._watchdog.start()
        try:
            ended = self._drain()
        finally:
            self._watchdog.stop()
            sampler.stop()
        code = {"done": ExitCode.DONE, "stopped": self._stop_code, "aborted": self._stop_code}.get(ended.outcome, ExitCode.FAILED)
        return Finished(ended.outcome, int(code), one_line(ended.reason), adapter=ended.adapter)

    def _drain(self) -> Ended:
        checked = self._checked
        generator = self._train(
            run=self.run,
            folder=self.folder,
            model_files=checked.model_files,
            model_spec=checked.model_spec,
            dataset=checked.dataset,
            eval_dataset=checked.eval_dataset,
            machine=checked.machine,
            wishes=self.wishes,
            say=self._write,
            resume=self.resume,
        )
        with contextlib.closing(generator):
            while True:
                try:
                    event = next(generator)
                except StopIteration as stop:
                    return _ended(stop.value)
                self._write(event)

    def _explain(self, error: BaseException) -> Finished:
        """Turn whatever ended the run into the last word; the traceback is in the log, the sentence is for people."""
        reason = without_secrets(error) or type(error).__name__
        if isinstance(error, Stopped):
            outcome: Outcome = "aborted" if self.wishes.urgent() == "abort" else "stopped"
            return Finished(outcome, int(self._stop_code), reason)
        if isinstance(error, EngineError):
            by_code: dict[ExitCode, Outcome] = {ExitCode.WILL_NOT_FIT: "will_not_fit", ExitCode.DIVERGED: "diverged"}
            return Finished(by_code.get(error.exit_code, "failed"), int(error.exit_code), reason)
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):  # torch's class, without importing torch
            return Finished("will_not_fit", int(ExitCode.WILL_NOT_FIT), f"out of memory: {reason}")
        if isinstance(error, OSError) and error.errno in FULL:
            told = f"the disk that holds the run is full; make room, then: qlora-tui --resume {self.folder.name}"
            return Finished("failed", int(ExitCode.FAILED), told)
        return Finished("failed", int(ExitCode.FAILED), f"{type(error).__name__}: {reason} (the traceback is in {LOG})")

    def _end(self, word: Finished) -> None:
        """Write the last word and give everything back; a full disk loses the word, never the exit code."""
        try:
            self.wishes.close("the run ended first")
            word = dataclasses.replace(word, report=self._report(word))
            self._journal.write(word)
        except Exception:  # noqa: BLE001  nothing is left to do about it but to say so
            _log.exception("the last word could not be written")
        finally:
            with contextlib.suppress(OSError):
                self._journal.close()
            self.last_word = word
            self._lock.release()
            try:
                notify.tell(self.run, self._facts, word)
                self._following.finish()
            finally:
                self._done.set()

    def _report(self, word: Finished) -> str:
        try:
            return report.write(self.folder, read_records(self._journal.path), word).name
        except Exception:  # noqa: BLE001  a report that fails must not change how the run ended
            _log.exception("the report could not be written")
            return ""

    def _write(self, event: Event) -> None:
        self._journal.write(event)
        self._facts.see(event)
        if isinstance(event, Stepped):
            self._step = event.step
        for finding in self._watchdog.see(event):
            self._journal.write(finding)
        if isinstance(event, Command) and not event.obeyed:
            _log.info("refused: %s: %s", event.name, event.why)

    def _write_beside(self, event: Event) -> None:
        try:
            self._journal.write(event)
            if isinstance(event, Device) and (finding := self._throttling.see(event, self._step)) is not None:
                self._journal.write(finding)
        except (OSError, ValueError):  # the owner thread meets the same full disk and says so
            return

    def _started(self) -> Started:
        return Started(
            run_id=self.folder.name,
            config=values_of(self.run),
            versions=_versions(),
            device=dataclasses.asdict(self._checked.machine),
            resumed_from=shelf.newest_step(self.folder) if self.resume else None,
        )


def settle_libraries() -> None:
    """Settle what the libraries read once, when they are imported.

    Progress bars and advice stay off the screen; what is logged goes to the run's log. Idle OpenMP threads sleep
    instead of spinning: with one other busy process on two cores a step of the demo took 4-9 s instead of 22. CUDA's
    allocator grows its blocks instead of keeping many of odd sizes: 150-350 MiB lie idle and not 200-1,200. What a
    person has set stays.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")


def _ended(value: Ended | None) -> Ended:
    if value is None:
        raise RuntimeError("training returned without a result")
    return value


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("qlora-tui", "torch", "transformers", "peft", "bitsandbytes"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
