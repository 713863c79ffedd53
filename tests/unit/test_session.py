"""One owner, one last word, and an answer to every wish."""

from __future__ import annotations

import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from fake_run import PATIENCE, RUN, TRAININGS, Ended, checked, crashing, raising, step, three_steps, until_asked

from qlora_tui.engine import preset, shelf, watchdog
from qlora_tui.engine import session as session_room
from qlora_tui.engine.errors import CheckpointError, DataError, Diverged, ExitCode, FenceError, JournalError, SpaceError, Stopped, WontFit
from qlora_tui.engine.events import Command, Device, Event, Finding, Finished, Record, Started, Stepped
from qlora_tui.engine.journal import EVENTS, Tail, is_running, leave_wish, read_records
from qlora_tui.engine.session import LOG, Session
from qlora_tui.engine.spec import from_values


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "20261125-164012-test"
    path.mkdir(parents=True, mode=0o700)
    return path


def run(folder: Path, train: Callable[..., Any], **options: Any) -> Session:
    session = Session(RUN, checked(), folder=folder, train=train, **options)
    session.start()
    return session


def ended(session: Session) -> list[Record]:
    assert session.wait(PATIENCE)
    return read_records(session.folder / EVENTS)


def until(folder: Path, seen: Callable[[Event], bool]) -> None:
    """Follow the journal until an event is there."""
    tail, pace = Tail(folder / EVENTS), threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if any(seen(record.event) for record in tail.records()):
            return
        pace.wait(0.01)
    raise AssertionError("the event never came")


def test_started_is_first_and_finished_is_last_and_alone(folder: Path) -> None:
    records = ended(run(folder, three_steps))
    assert isinstance(records[0].event, Started)
    assert records[0].event.run_id == folder.name
    assert records[0].event.config["lora_r"] == RUN.lora_r
    words = [record.event for record in records if isinstance(record.event, Finished)]
    assert words == [records[-1].event]
    assert (words[0].outcome, words[0].exit_code, words[0].adapter, words[0].report) == ("done", 0, "adapter", "report.md")


def test_a_run_leaves_its_config_log_and_report_private_and_its_lock_free(folder: Path) -> None:
    ended(run(folder, three_steps))
    assert from_values(preset.read_file(folder / "run.toml")) == RUN
    assert not is_running(folder)
    assert {path.name for path in folder.iterdir()} == {"run.toml", EVENTS, LOG, "report.md", "report.html", "lock"}
    for name in ("run.toml", EVENTS, LOG, "report.md", "report.html"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name


def test_a_crash_inside_is_told_in_a_sentence_and_logged_without_secrets(folder: Path) -> None:
    session = run(folder, crashing)
    word = ended(session)[-1].event
    assert isinstance(word, Finished)
    assert (word.outcome, session.exit_code) == ("failed", ExitCode.FAILED)
    log = (folder / LOG).read_text()
    assert "Traceback" in log
    assert "crashing" in log
    for text in (word.reason, log, (folder / EVENTS).read_text(), (folder / "report.md").read_text(), (folder / "report.html").read_text()):
        assert "broken" in text
        assert "hf_aaaa" not in text
        assert "\x1b" not in text


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [
        (WontFit("too large"), "will_not_fit", 3),
        (MemoryError(), "will_not_fit", 3),
        (Diverged("not finite"), "diverged", 4),
        (FenceError("before an optimizer step: the model is not in training mode"), "failed", 1),
        (DataError("no usable row"), "failed", 2),
        (CheckpointError("damaged"), "failed", 2),
        (Stopped("while fetching"), "stopped", 130),
        (OSError(28, "No space left on device"), "failed", 1),
        (KeyboardInterrupt(), "failed", 1),
        (SystemExit(0), "failed", 1),
        (GeneratorExit(), "failed", 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_every_error_becomes_one_last_word(folder: Path, error: BaseException, outcome: str, code: int) -> None:
    session = run(folder, raising(error))
    records = ended(session)
    words = [record.event for record in records if isinstance(record.event, Finished)]
    assert len(words) == 1
    assert (words[0].outcome, words[0].exit_code, session.exit_code) == (outcome, code, code)
    assert words[0].reason


def test_a_silent_run_is_told_with_where_it_stands_and_again_when_it_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_OTHER_SECONDS", 0.1)
    go_on = threading.Event()

    def silent_for_a_while(**_job: Any) -> Generator[Event, None, Ended]:
        yield step(1)
        go_on.wait(PATIENCE)
        yield step(2)
        return Ended("done", "all steps done")

    session = run(folder, silent_for_a_while)
    until(folder, lambda event: isinstance(event, Finding) and event.severity == "warn" and "no sign of life" in event.message)
    go_on.set()
    told = [record.event for record in ended(session) if isinstance(record.event, Finding)]
    assert [finding.detector for finding in told] == ["watchdog", "watchdog"]
    assert "the run goes on after" in told[1].message
    assert "in silent_for_a_while" in (folder / LOG).read_text()


def test_training_that_returns_nothing_is_a_failure_and_not_a_success(folder: Path) -> None:
    def silent(**_job: Any) -> Generator[Event, None, Any]:
        yield step(1)

    assert ended(run(folder, silent))[-1].event.outcome == "failed"  # type: ignore[union-attr]


def test_the_generator_is_closed_when_the_journal_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = threading.Event()

    def train(**_job: Any) -> Generator[Event, None, Ended]:
        try:
            yield step(1)
            yield step(2)
        finally:
            closed.set()
        return Ended("done", "")

    session = Session(RUN, checked(), folder=folder, train=train)
    write = session._journal.write

    def full(event: Event) -> Record | None:
        if isinstance(event, Stepped) and event.step == 2:
            raise OSError(28, "No space left on device")
        return write(event)

    monkeypatch.setattr(session._journal, "write", full)
    session.start()
    assert session.wait(PATIENCE)
    assert closed.is_set()
    assert session.exit_code == ExitCode.FAILED
    assert session.last_word is not None
    assert "is full; make room, then: qlora-tui --resume" in session.last_word.reason


def test_a_last_word_that_cannot_be_written_still_ends_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(RUN, checked(), folder=folder, train=three_steps)

    def full(_event: Event) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session._journal, "write", full)
    session.start()
    assert session.wait(PATIENCE)
    assert session.exit_code == ExitCode.FAILED
    assert not is_running(folder)


def test_a_stop_left_by_a_viewer_is_obeyed_and_answered(folder: Path) -> None:
    session = run(folder, until_asked)
    until(folder, lambda event: isinstance(event, Stepped))
    wish = leave_wish(folder, "stop")
    records = ended(session)
    answers = [record.event for record in records if isinstance(record.event, Command)]
    assert [(answer.id, answer.name, answer.obeyed) for answer in answers] == [(wish, "stop", True)]
    assert (session.last_word is not None, session.exit_code) == (True, 130)
    assert records[-1].event.outcome == "stopped"  # type: ignore[union-attr]


def test_every_wish_gets_its_answer(folder: Path) -> None:
    session = run(folder, until_asked)
    until(folder, lambda event: isinstance(event, Stepped))
    leave_wish(folder, "dance")
    leave_wish(folder, "save")
    leave_wish(folder, "save", attempt=9)
    until(folder, lambda event: isinstance(event, Command) and event.name == "save" and event.obeyed)
    leave_wish(folder, "stop")
    leave_wish(folder, "abort")
    records = ended(session)
    answers = {(event.name, event.obeyed) for record in records if isinstance(event := record.event, Command)}
    assert answers >= {("dance", False), ("save", True), ("save", False), ("stop", True)}
    assert records[-1].event.outcome in ("stopped", "aborted")  # type: ignore[union-attr]


def test_a_wish_that_comes_too_late_is_refused_and_not_forgotten(folder: Path) -> None:
    def late(wishes: Any, folder: Path, **_job: Any) -> Generator[Event, None, Ended]:
        yield step(1)
        leave_wish(folder, "save")
        return Ended("done", "all steps done")

    answers = [record.event for record in ended(run(folder, late)) if isinstance(record.event, Command)]
    assert [(answer.name, answer.obeyed, answer.why) for answer in answers] == [("save", False, "the run ended first")]


def test_an_abort_outranks_a_stop_and_not_the_other_way_round(folder: Path) -> None:
    session = Session(RUN, checked(), folder=folder, train=until_asked)
    session.ask("abort", "Ctrl+C")
    assert session.wishes.urgent() == "abort"
    leave_wish(folder, "stop")
    assert session.wishes.urgent() == "abort"
    session.start()
    assert ended(session)[-1].event.outcome == "aborted"  # type: ignore[union-attr]


def test_a_stop_wish_of_an_earlier_attempt_is_never_obeyed_again(folder: Path) -> None:
    leave_wish(folder, "stop")
    assert ended(run(folder, three_steps))[-1].event.outcome == "done"  # type: ignore[union-attr]


def test_a_resume_is_a_further_attempt_in_the_same_file(folder: Path) -> None:
    ended(run(folder, three_steps))
    checkpoint = folder / "checkpoints" / "step-000003"
    checkpoint.mkdir(parents=True)
    for name in shelf.PARTS:
        (checkpoint / name).write_text("{}")
    shelf.write_manifest(checkpoint, 3, {})
    records = ended(run(folder, three_steps, resume=True))
    starts = [record for record in records if isinstance(record.event, Started)]
    assert [record.attempt for record in starts] == [1, 2]
    assert starts[1].event.resumed_from == 3  # type: ignore[union-attr]
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    assert [record.attempt for record in records if isinstance(record.event, Finished)] == [1, 2]


def test_the_device_is_looked_at_while_the_run_lasts(folder: Path) -> None:
    def patient(wishes: Any, **job: Any) -> Generator[Event, None, Ended]:
        until(folder, lambda event: isinstance(event, Device))
        yield step(1)
        return Ended("done", "all steps done")

    records = ended(run(folder, patient))
    assert any(isinstance(record.event, Device) for record in records)
    assert isinstance(records[-1].event, Finished)


def test_a_folder_that_another_process_runs_in_is_refused(folder: Path) -> None:
    session = run(folder, until_asked)
    with pytest.raises(JournalError, match="already running"):
        Session(RUN, checked(), folder=folder)
    session.ask("stop", "Ctrl+C")
    assert session.wait(PATIENCE)


def test_a_folder_that_cannot_be_written_is_one_sentence_and_its_lock_is_free(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session_room, "replace_file", full)
    with pytest.raises(SpaceError, match="cannot be written: No space left"):
        Session(RUN, checked(), folder=folder, train=three_steps)
    assert not is_running(folder)


def test_a_folder_that_is_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(JournalError, match="link"):
        Session(RUN, checked(), folder=link)
    (folder / EVENTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JournalError, match="link"):
        Session(RUN, checked(), folder=folder)


def test_the_session_alone_loads_no_torch() -> None:
    code = "import sys, qlora_tui.engine.session\nassert not {'torch', 'transformers', 'textual', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_fake_trainings_are_named() -> None:
    assert {"three_steps", "until_asked", "deaf", "crashing"} <= set(TRAININGS)


def test_a_tokenizer_can_be_read_while_the_libraries_are_imported(tiny_model: Path) -> None:
    code = (
        "import sys, threading\n"
        "from pathlib import Path\n"
        "from qlora_tui.engine import session\n"
        "from qlora_tui.engine.data import load_tokenizer\n"
        "faults = []\n"
        "threading.excepthook = lambda told: faults.append(told.exc_value)\n"
        "session.warm()\n"
        "readers = [threading.Thread(target=load_tokenizer, args=(Path(sys.argv[1]),)) for _ in range(3)]\n"
        "[reader.start() for reader in readers]\n"
        "import qlora_tui.engine.data.tokenizer as room\n"
        "with room.IMPORTING:\n"
        "    import qlora_tui.engine.train\n"
        "[reader.join() for reader in readers]\n"
        "assert not faults, faults\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_model)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
