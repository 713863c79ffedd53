"""A run without a screen, as a process: what it prints, how signals end it, and what no reader can do to it."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.engine.errors import JournalError
from qlora_tui.engine.events import Event, Finished, Stepped
from qlora_tui.engine.journal import EVENTS, RunLock, Tail, is_running, leave_wish, read_records
from qlora_tui.engine.runs import list_runs, read_info

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0
Process = subprocess.Popen[bytes]


class Runner:
    """Starts the driver and follows its journal."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.processes: list[Process] = []

    def start(self, training: str, *arguments: str, **streams: Any) -> Process:
        command = [sys.executable, str(ROOT / "tests" / "headless_driver.py"), training, str(self.runs), *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / ".pkg"), str(ROOT / "tests")])}
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
        process = subprocess.Popen(command, env=environment, **options)
        self.processes.append(process)
        return process

    @property
    def folder(self) -> Path:
        (info,) = list_runs(self.runs)
        return info.path

    def until(self, seen: Callable[[Event], bool]) -> Path:
        """Return the run's folder once an event is in its journal."""
        pace, deadline = threading.Event(), time.monotonic() + PATIENCE
        while not list_runs(self.runs):
            assert time.monotonic() < deadline, "the run never began"
            pace.wait(0.02)
        tail = Tail(self.folder / EVENTS)
        while not any(seen(record.event) for record in tail.records()):
            assert time.monotonic() < deadline, "the event never came"
            pace.wait(0.02)
        return self.folder

    def stepping(self) -> Path:
        return self.until(lambda event: isinstance(event, Stepped))


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    made = Runner(tmp_path / "runs")
    yield made
    for process in made.processes:
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def words(folder: Path) -> list[Finished]:
    return [record.event for record in read_records(folder / EVENTS) if isinstance(record.event, Finished)]


def read_until(stream: Any, needle: bytes) -> bytes:
    """Read a pipe until some bytes have come."""
    text, deadline = b"", time.monotonic() + PATIENCE
    while needle not in text:
        assert time.monotonic() < deadline, text
        if select.select([stream], [], [], 0.1)[0]:
            text += os.read(stream.fileno(), 65536)
    return text


def test_json_is_the_journal_on_stdout_and_nothing_else(runner: Runner) -> None:
    process = runner.start("three_steps", "--json")
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0]["type"] == "started"
    assert [line["type"] for line in lines].count("finished") == 1
    assert lines[-1]["type"] == "finished"
    assert out == (runner.folder / EVENTS).read_bytes()


def test_lines_tell_a_person_how_it_went_and_what_to_do_next(runner: Runner) -> None:
    process = runner.start("three_steps")
    out, _ = process.communicate(timeout=PATIENCE)
    text = out.decode()
    assert "step 3/3" in text
    assert "base 4.6000 -> tuned 2.8000 at step 3. a measurable improvement" in text
    assert str(runner.folder / "adapter") in text
    assert f"qlora-tui attach {runner.folder.name}" in text
    assert "\r" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize(("training", "code"), [("crashing", 1), ("will_not_fit", 3), ("diverged", 4)])
def test_the_exit_code_tells_how_it_ended(runner: Runner, training: str, code: int) -> None:
    process = runner.start(training)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert b"\x1b" not in out + err
    assert b"hf_aaaa" not in out + err
    assert b"log.txt" in out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_stops_and_is_answered_at_once(runner: Runner, number: int, code: int) -> None:
    process = runner.start("until_asked")
    folder = runner.stepping()
    process.send_signal(number)
    assert b"stopping at the next safe point" in read_until(process.stderr, b"saving")
    process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert [(word.outcome, word.exit_code) for word in words(folder)] == [("stopped", code)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_signal_ends_a_run_that_hangs(runner: Runner, number: int, code: int) -> None:
    process = runner.start("deaf")
    folder = runner.stepping()
    process.send_signal(number)
    read_until(process.stderr, b"saving")
    process.send_signal(number)
    assert process.wait(PATIENCE) == code
    assert [(word.outcome, word.exit_code) for word in words(folder)] == [("aborted", code)]
    assert not is_running(folder)


def test_a_run_that_hangs_is_ended_where_that_was_asked_for(runner: Runner) -> None:
    process = runner.start("deaf", "--hang")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    (word,) = words(runner.folder)
    assert (word.outcome, word.exit_code) == ("failed", 1)
    assert "no sign of life for" in word.reason
    assert "and end_if_hung is 1.0 s: what came after the last checkpoint is not saved" in word.reason
    assert b"no sign of life for" in err
    assert not is_running(runner.folder)


def test_a_hang_up_does_not_end_the_run(runner: Runner) -> None:
    process = runner.start("until_asked")
    folder = runner.stepping()
    process.send_signal(signal.SIGHUP)
    before = read_info(folder).step
    runner.until(lambda event: isinstance(event, Stepped) and event.step > before + 5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 143


def test_a_reader_that_goes_away_does_not_end_the_run(runner: Runner) -> None:
    process = runner.start("until_asked")
    folder = runner.stepping()
    assert process.stdout is not None
    read_until(process.stdout, b"step 1/")
    process.stdout.close()
    before = read_info(folder).step
    runner.until(lambda event: isinstance(event, Stepped) and event.step > before + 50)
    leave_wish(folder, "stop")
    assert process.wait(PATIENCE) == 130
    assert [word.outcome for word in words(folder)] == ["stopped"]
    assert b"Traceback" not in (process.stderr.read() if process.stderr else b"")


def test_a_run_begun_without_stdout_and_stderr_is_seen_through(runner: Runner) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / ".pkg"), str(ROOT / "tests")])}
    command = f'exec "{sys.executable}" "{ROOT}/tests/headless_driver.py" three_steps "{runner.runs}" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], env=environment, timeout=PATIENCE, check=False).returncode == 0
    assert [word.outcome for word in words(runner.folder)] == ["done"]


def test_a_reader_that_is_stuck_does_not_hold_up_training(runner: Runner) -> None:
    process = runner.start("flood", "--json")
    folder = runner.until(lambda event: isinstance(event, Stepped) and event.step == 5000)
    leave_wish(folder, "stop")
    runner.until(lambda event: isinstance(event, Finished))
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert out == (folder / EVENTS).read_bytes()


def test_what_libraries_print_goes_to_the_log(runner: Runner) -> None:
    process = runner.start("chatty", "--json")
    out, err = process.communicate(timeout=PATIENCE)
    assert all(json.loads(line) for line in out.splitlines())
    assert err == b""
    log = (runner.folder / "log.txt").read_text()
    for told in ("from C on 1", "from C on 2", "from Python", "logged \\x1b[2J"):
        assert told in log


def test_a_killed_run_is_known_as_crashed(runner: Runner) -> None:
    process = runner.start("until_asked")
    folder = runner.stepping()
    assert read_info(folder).state == "running"
    process.kill()
    process.wait(PATIENCE)
    info = read_info(folder)
    assert (info.state, info.outcome) == ("crashed", "")
    assert info.step >= 1


@pytest.mark.parametrize("option", ["", "--json"])
def test_a_full_disk_is_told_though_the_journal_cannot_hold_it(runner: Runner, option: str) -> None:
    process = runner.start("full", *option.split())
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    last = [line for line in out.decode().splitlines() if "is full; make room" in line]
    assert len(last) == 1
    if option:
        word = json.loads(out.splitlines()[-1])
        assert (word["type"], word["outcome"], word["exit_code"]) == ("finished", "failed", 1)


def test_a_folder_in_use_by_another_process_is_refused(runner: Runner) -> None:
    process = runner.start("until_asked")
    folder = runner.stepping()
    with pytest.raises(JournalError, match=str(process.pid)):
        RunLock(folder)


def test_a_bar_is_drawn_on_a_terminal_and_stdout_stays_plain(runner: Runner) -> None:
    master, slave = pty.openpty()
    process = runner.start("fetching", stderr=slave)
    os.close(slave)
    assert process.stdout is not None
    out = process.stdout.read()
    assert process.wait(PATIENCE) == 0
    drawn = _read_all(master)
    os.close(master)
    assert b"\r" in drawn
    assert b"100 MiB" in drawn
    assert b"\x1b]0" not in drawn + out
    assert b"\r" not in out
    assert b"fetching the model: a model \\x1b]0;title\\x07" in out


def test_without_a_terminal_progress_is_a_line_now_and_then(runner: Runner) -> None:
    process = runner.start("fetching")
    out, err = process.communicate(timeout=PATIENCE)
    assert out.count(b"MiB of 100 MiB") < 5
    assert b"\r" not in out + err


def _read_all(descriptor: int) -> bytes:
    text = b""
    while select.select([descriptor], [], [], 0.5)[0]:
        try:
            block = os.read(descriptor, 65536)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        text += block
    return text
