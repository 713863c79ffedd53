"""The queue: what is checked when, in which order it runs, and what every kind of end leaves of it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import queue_driver
from fake_run import PATIENCE, RUN

from qlora_tui.engine import machine, queue
from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.events import Finished, Started, Stepped
from qlora_tui.engine.journal import EVENTS, is_running, leave_wish, read_records
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.queue import Entry
from qlora_tui.tui.cli import main
from qlora_tui.tui.commands import run as command

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "spawn", queue_driver.spawn)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / ".pkg"), str(ROOT / "tests")]))
    monkeypatch.setattr(machine, "look", lambda: Machine("a test", "cpu", 64 * 2**30, cores=2))


@pytest.fixture
def driver() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the queue as a process of its own."""
    made: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        command_line = [sys.executable, queue_driver.__file__, *words]
        made.append(subprocess.Popen(command_line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return made[-1]

    yield start
    for process in made:
        if process.poll() is None:
            process.kill()
        process.communicate()


def put(tmp_path: Path, *names: str) -> list[Entry]:
    return [queue.add(replace(RUN, revision=name, runs_dir=str(tmp_path / "runs")), name) for name in names]


def states() -> list[tuple[int, str, str]]:
    return [(entry.id, entry.state, entry.outcome) for entry in queue.entries()]


def seen(done: Callable[[], Any]) -> Any:
    """Look until there is something to see."""
    deadline, pace = time.monotonic() + PATIENCE, threading.Event()
    while not (found := done()):
        assert time.monotonic() < deadline
        pace.wait(0.02)
    return found


def stepping(number: int) -> Path:
    """Wait until a run of the queue takes steps, and return its folder."""

    def look() -> Path | None:
        entry = next(entry for entry in queue.entries() if entry.id == number)
        folder = Path(entry.folder)
        return folder if entry.folder and any(isinstance(one.event, Stepped) for one in read_records(folder / EVENTS)) else None

    return seen(look)


def attempts(folder: Path) -> list[str]:
    return [one.event.outcome for one in read_records(folder / EVENTS) if isinstance(one.event, Finished)]


def test_runs_go_one_after_another_each_in_its_own_folder_and_an_error_holds_up_nobody(tmp_path: Path, capsys: Capture) -> None:
    put(tmp_path, "three_steps", "crashing", "refused", "dies", "will_not_fit", "three_steps")
    assert main(["queue", "run"]) == 1
    out, err = capsys.readouterr()
    ended = ["done", "failed", "failed", "failed", "will_not_fit", "done"]
    assert states() == [(number, "ended", outcome) for number, outcome in enumerate(ended, 1)]
    folders = [Path(entry.folder) for entry in queue.entries()]
    assert len(set(folders)) == 6
    assert all(folder.parent == tmp_path / "runs" for folder in folders)
    assert [entry.exit_code for entry in queue.entries()] == [0, 1, 1, 1, 3, 0]
    assert out.count("all 3 steps done") == 2
    assert "queue: run 4, dies" in err
    assert "ended with code -9 and no last word" in err
    assert [line.split()[:2] for line in out.splitlines()[-6:]][1] == ["2", "failed"]
    starts = [next(one.t for one in read_records(folder / EVENTS) if isinstance(one.event, Started)) for folder in folders[:2]]
    last = read_records(folders[0] / EVENTS)[-1].t
    assert last <= starts[1]


def test_on_an_error_it_can_stop_too(tmp_path: Path, capsys: Capture) -> None:
    put(tmp_path, "diverged", "three_steps")
    assert main(["queue", "run", "--stop-on-error", "--json"]) == 4
    assert [row["id"] for row in json.loads(capsys.readouterr().out)] == [1]
    assert states() == [(1, "ended", "diverged"), (2, "waiting", "")]


def test_an_empty_queue_is_no_error(capsys: Capture) -> None:
    assert main(["queue", "run"]) == 0
    assert main(["queue"]) == 0
    assert main(["queue", "list", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == []
    assert "nothing waits" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_saved_and_leaves_the_rest_and_the_next_time_it_goes_on(
    tmp_path: Path, driver: Callable[..., subprocess.Popen[bytes]], number: int, code: int, capsys: Capture
) -> None:
    put(tmp_path, "resumed", "three_steps")
    process = driver("queue", "run")
    folder = stepping(1)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    assert b"it stays queued, and so does the rest" in err
    assert b"2 still queued" in err
    assert states() == [(1, "waiting", "stopped"), (2, "waiting", "")]
    assert main(["queue", "list"]) == 0
    assert "stopped, goes on" in capsys.readouterr().out
    assert main(["queue", "run"]) == 0
    assert states() == [(1, "ended", "done"), (2, "ended", "done")]
    assert attempts(folder) == ["stopped", "done"]


def test_a_second_ctrl_c_ends_a_run_that_hangs(tmp_path: Path, driver: Callable[..., subprocess.Popen[bytes]]) -> None:
    put(tmp_path, "deaf", "three_steps")
    process = driver("queue", "run")
    folder = stepping(1)
    process.send_signal(signal.SIGINT)
    seen(lambda: b"stopping at the next safe point" in (folder / "log.txt").read_bytes())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert attempts(folder) == ["aborted"]
    assert states()[1] == (2, "waiting", "")


def test_a_stop_from_a_viewer_ends_that_run_alone(tmp_path: Path, driver: Callable[..., subprocess.Popen[bytes]]) -> None:
    put(tmp_path, "until_asked", "three_steps")
    process = driver("queue", "run")
    leave_wish(stepping(1), "stop")
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert states() == [(1, "ended", "stopped"), (2, "ended", "done")]


def test_a_killed_runner_loses_nothing_and_the_next_one_takes_its_run_over(
    tmp_path: Path, driver: Callable[..., subprocess.Popen[bytes]], capsys: Capture
) -> None:
    put(tmp_path, "until_asked", "three_steps")
    first = driver("queue", "run")
    folder = stepping(1)
    first.kill()
    first.wait()
    assert is_running(folder)
    assert queue.runner_pid() is None
    second = driver("queue", "run")
    seen(lambda: queue.runner_pid() == second.pid)
    seen(lambda: b"queue: run 1" in second.stderr.peek() if second.stderr else False)
    second.send_signal(signal.SIGINT)
    second.communicate(timeout=PATIENCE)
    assert second.returncode == 130
    assert attempts(folder) == ["stopped"]
    assert states() == [(1, "waiting", "stopped"), (2, "waiting", "")]


def test_a_run_that_was_cut_off_with_its_runner_goes_on_in_its_folder(
    tmp_path: Path, driver: Callable[..., subprocess.Popen[bytes]]
) -> None:
    put(tmp_path, "resumed")
    first = driver("queue", "run")
    folder = stepping(1)
    first.kill()
    first.wait()
    os.kill(json.loads((folder / "lock").read_text())["pid"], signal.SIGKILL)
    seen(lambda: not is_running(folder))
    assert main(["queue", "run"]) == 0
    assert attempts(folder) == ["done"]
    assert states() == [(1, "ended", "done")]


def test_a_run_that_ended_after_its_runner_was_killed_is_not_run_again(tmp_path: Path) -> None:
    put(tmp_path, "three_steps")
    entry = queue.take()
    assert entry is not None
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    queue.note(entry, folder=str(folder))
    (folder / "run.toml").touch()
    assert main(["queue", "run"]) == 0
    queue.note(queue.entries()[0], state="running")
    assert main(["queue", "run"]) == 0
    assert attempts(folder) == ["done"]


def test_there_is_one_runner_at_a_time_and_it_takes_what_is_added_meanwhile(
    tmp_path: Path, driver: Callable[..., subprocess.Popen[bytes]], capsys: Capture
) -> None:
    put(tmp_path, "until_asked")
    process = driver("queue", "run")
    folder = stepping(1)
    assert main(["queue", "run"]) == 2
    assert f"process {process.pid} works through the queue already" in capsys.readouterr().err
    assert main(["queue", "remove", "1"]) == 2
    put(tmp_path, "three_steps")
    leave_wish(folder, "stop")
    process.communicate(timeout=PATIENCE)
    assert states() == [(1, "ended", "stopped"), (2, "ended", "done")]


def test_whoever_asks_who_runs_does_not_keep_a_runner_from_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking takes the lock for a moment; a runner that starts in it waits for its end."""
    path = queue._runner_file()
    path.parent.mkdir(parents=True)
    path.touch()
    with path.open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        monkeypatch.setattr(queue.time, "sleep", lambda seconds: fcntl.flock(asking, fcntl.LOCK_UN))
        with queue.runner():
            assert queue.runner_pid() == os.getpid()
    assert queue.runner_pid() is None


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # that is what detached means
def test_it_runs_detached_and_is_stopped_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    put(tmp_path, "resumed", "three_steps")
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} {queue_driver.__file__} "$@"\n')
    wrapper.chmod(0o700)
    with monkeypatch.context() as held:
        held.setattr("qlora_tui.tui.commands.queue.sys.executable", str(wrapper))
        assert main(["queue", "run", "--detach", "--json"]) == 0
    pid = json.loads(capsys.readouterr().out)["pid"]
    assert queue.runner_pid() == pid
    stepping(1)
    assert main(["queue", "stop"]) == 0
    seen(lambda: queue.runner_pid() is None)
    assert states() == [(1, "waiting", "stopped"), (2, "waiting", "")]
    os.waitpid(pid, 0)


def test_runs_are_taken_out_and_their_folders_stay(tmp_path: Path, capsys: Capture) -> None:
    put(tmp_path, "three_steps", "three_steps", "three_steps")
    assert main(["queue", "remove", "2", "9"]) == 2
    assert len(states()) == 3
    assert main(["queue", "remove", "2"]) == 0
    assert main(["queue", "run"]) == 0
    assert main(["queue", "remove", "--ended"]) == 0
    assert states() == []
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert put(tmp_path, "three_steps")[0].id == 4  # a number never means another run


def test_a_file_that_cannot_be_read_is_told_and_kept(home: Path) -> None:
    path = home / "state" / "queue.json"
    path.parent.mkdir(parents=True)
    for text in ("{", '{"v": 2, "next": 1, "entries": []}', '{"v": 1, "next": 1, "entries": [{"id": 1}]}', "[]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"queue\.json"):
            queue.entries()
        assert path.read_text() == text


def test_everything_is_checked_when_a_run_is_added(
    tmp_path: Path, tiny_model: Path, chat_rows: list[dict[str, Any]], write_jsonl: Callable[..., Path], capsys: Capture
) -> None:
    rows = str(write_jsonl(chat_rows))
    good = ["queue", "add", "--model", str(tiny_model), "--data", "data.jsonl", "--set", "max_length=256", "--max-steps", "3"]
    assert main([*good, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) | {"added": 0} == {
        "id": 1,
        "state": "waiting",
        "name": str(tiny_model),
        "run": None,
        "path": None,
        "outcome": "",
        "exit_code": None,
        "added": 0,
    }
    [entry] = queue.entries()
    assert entry.run.data == (rows,)
    assert entry.run.runs_dir == str(tmp_path / "runs")
    assert entry.run.max_steps == 3
    assert not (tmp_path / "runs").exists()
    bad = {
        "no such file": ["--data", "nothing.jsonl"],
        "'many' is not a whole number": ["--set", "lora_r=many"],
        "is out of range": ["--set", "lora_r=5000"],
        "no tracker is called": ["--set", "report_to=comet"],
        "there is no program": ["--set", "notify=command:no-such-program"],
    }
    for told, words in bad.items():
        assert main([*good, *words]) == 2
        assert told in capsys.readouterr().err
    assert main([*good, "--set", "memory_limit_gib=0.1"]) == 3
    assert len(queue.entries()) == 1


def test_what_fills_the_card_now_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, chat_rows: list[dict[str, Any]], write_jsonl: Callable[..., Path]
) -> None:
    full = Machine("a test", "cpu", 64 * 2**30, 63 * 2**30 + 2**29, cores=2)
    monkeypatch.setattr(machine, "look", lambda: full)
    run = ["--model", str(tiny_model), "--data", str(write_jsonl(chat_rows)), "--set", "max_length=256"]
    assert main(["--no-ui", "--dry-run", *run]) == 3
    assert main(["queue", "add", *run]) == 0


def test_the_worst_end_is_the_exit_code() -> None:
    assert queue.worst([0, 130, 2, 3, 4]) == 4
    assert queue.worst([4, 1]) == 1
    assert queue.worst([4, 99]) == 99
