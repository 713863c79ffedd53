"""A real run over a tiny model, in a process of its own, steered and watched from others; signals and kills in its pause."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pty_screen import Terminal, text_of

from qlora_tui.engine.events import Command, Device, Event, Finding, Finished, Phase, Resumed, Sampled, Saved, Stepped
from qlora_tui.engine.journal import EVENTS, leave_wish, read_records
from qlora_tui.engine.runs import list_runs, read_info

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0
ATTACH = "import sys\nfrom qlora_tui.tui.cli import main\nsys.exit(main(['attach', *sys.argv[1:]]))\n"
ENVIRONMENT = {"PYTHONPATH": str(ROOT / ".pkg"), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def options(tiny_model: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]], tmp_path: Path) -> list[str]:
    settings = {"max_length": 256, "method": "lora", "max_steps": 100_000, "eval_steps": 5000, "save_steps": 5000, "lora_dropout": 0.1}
    settings |= {"lr_scheduler_type": "constant", "warmup_steps": 0}
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return ["--model", str(tiny_model), "--data", str(write_jsonl(chat_rows)), "--runs-dir", str(tmp_path / "runs"), *flags]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], Path]]]:
    """Return a function that starts a run without a screen and returns it once it has taken a step."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
        command = [sys.executable, "-m", "qlora_tui.tui", "--no-ui", *arguments]
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        known = len(steps(list_runs(tmp_path / "runs")[0].path)) if (tmp_path / "runs").exists() else 0
        started.append(subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, **pipes))
        until(lambda: bool(list((tmp_path / "runs").glob("*/events.jsonl"))))
        folder = list_runs(tmp_path / "runs")[0].path
        until(lambda: len(steps(folder)) > known)
        return started[-1], folder

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def events(folder: Path) -> list[Event]:
    return [record.event for record in read_records(folder / EVENTS)]


def of(folder: Path, kind: type[Any]) -> list[Any]:
    return [event for event in events(folder) if isinstance(event, kind)]


def steps(folder: Path) -> list[Stepped]:
    return of(folder, Stepped)


def answered(folder: Path, name: str) -> bool:
    return any(answer.name == name and answer.obeyed for answer in of(folder, Command))


def rested(folder: Path, looks: int = 2) -> bool:
    """Say whether the run has paused, told of it, and the device was looked at some times since."""
    told = events(folder)
    places = [place for place, event in enumerate(told) if isinstance(event, Finding) and event.detector == "pause"]
    return bool(places) and sum(isinstance(event, Device) for event in told[places[-1] :]) >= looks


def pause(folder: Path) -> int:
    """Pause a run, and return after how many steps it rests."""
    leave_wish(folder, "pause")
    until(lambda: rested(folder))
    taken = len(steps(folder))
    until(lambda: rested(folder, 4))
    assert len(steps(folder)) == taken
    return taken


def checkpoints(folder: Path) -> list[int]:
    return [saved.step for saved in of(folder, Saved) if saved.kind == "checkpoint"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_a_pause_exits_right_and_saves_nothing_twice(
    start: Callable[..., tuple[subprocess.Popen[bytes], Path]], options: list[str], number: signal.Signals, code: int
) -> None:
    process, folder = start(*options)
    taken = pause(folder)
    assert checkpoints(folder) == [taken]
    process.send_signal(number)
    assert process.wait(PATIENCE) == code
    assert checkpoints(folder) == [taken]
    (word,) = of(folder, Finished)
    assert (word.outcome, word.reason) == ("stopped", f"stopped and saved at step {taken} of 100000")
    assert (folder / "adapter" / "adapter_model.safetensors").exists()


def test_a_run_killed_in_its_pause_is_resumed_from_it(
    start: Callable[..., tuple[subprocess.Popen[bytes], Path]], options: list[str]
) -> None:
    process, folder = start(*options)
    taken = pause(folder)
    process.kill()
    process.wait()
    terminal = Terminal(ATTACH, str(folder), **ENVIRONMENT)
    try:
        terminal.read_until(b"crashed", anew=False)
        until(lambda: terminal.read_some(0.2) or f"qlora-tui --resume {folder.name[:20]}" in text_of(terminal.seen))
    finally:
        terminal.close()
    process, _ = start("--resume", str(folder))
    assert of(folder, Resumed)[-1].to_step == taken
    assert read_info(folder).step > taken
    leave_wish(folder, "stop")
    assert process.wait(PATIENCE) == 130


def test_two_viewers_of_another_process_steer_it_and_a_third_only_looks(
    start: Callable[..., tuple[subprocess.Popen[bytes], Path]], options: list[str]
) -> None:
    process, folder = start(*options)
    one, two = (Terminal(ATTACH, str(folder), size=(100, 30), **ENVIRONMENT) for _ in range(2))
    third = Terminal(ATTACH, str(folder), "--readonly", size=(100, 30), **ENVIRONMENT)
    viewers = (one, two, third)

    def all_read() -> None:
        for viewer in viewers:
            viewer.read_some(0.1)

    try:
        for viewer in viewers:
            viewer.read_until(b"training", anew=False)
        third.type(b"pal")
        one.type(b"p")
        until(lambda: all_read() or rested(folder))
        for viewer in viewers:
            until(lambda viewer=viewer: all_read() or "paused" in text_of(viewer.seen, (100, 30)))
        assert "p goes on" in text_of(one.seen, (100, 30))
        assert "p goes on" not in text_of(third.seen, (100, 30))
        taken = len(steps(folder))
        two.type(b"p")
        until(lambda: all_read() or len(steps(folder)) > taken)
        one.type(b"l")
        two.type(b"a")
        until(lambda: all_read() or (answered(folder, "set") and bool(of(folder, Sampled))))
        until(lambda: all_read() or steps(folder)[-1].lr == steps(folder)[taken - 1].lr / 2)
        ids = [answer.id for answer in of(folder, Command)]
        assert [answer.name for answer in of(folder, Command) if answer.obeyed] == ["pause", "resume", *_either_way(folder)]
        assert len(set(ids)) == len(ids) == 4
    finally:
        for viewer in viewers:
            viewer.close()
    leave_wish(folder, "abort")
    assert process.wait(PATIENCE) == 130


def _either_way(folder: Path) -> list[str]:
    """Return the last two answers in the order in which they came: two viewers are not timed against each other."""
    found = [answer.name for answer in of(folder, Command)][2:]
    assert sorted(found) == ["sample", "set"]
    return found


def test_a_process_that_stands_still_is_told_with_how_long(
    start: Callable[..., tuple[subprocess.Popen[bytes], Path]], options: list[str]
) -> None:
    process, folder = start(*options)
    terminal = Terminal(ATTACH, str(folder), **ENVIRONMENT)
    try:
        terminal.read_until(b"training", anew=False)
        process.send_signal(signal.SIGSTOP)
        until(lambda: terminal.read_some(0.2) or "no word for" in text_of(terminal.seen))
        process.send_signal(signal.SIGCONT)
        until(lambda: terminal.read_some(0.2) or "● training" in text_of(terminal.seen))
    finally:
        process.send_signal(signal.SIGCONT)
        terminal.close()
    leave_wish(folder, "abort")
    assert process.wait(PATIENCE) == 130


def test_a_pause_is_no_phase_in_which_a_run_hangs() -> None:
    """Also while it saves and after it saved: the watchdog has no patience to lose there."""
    import threading

    from qlora_tui.engine.watchdog import Watchdog

    now, said = [0.0], []
    dog = Watchdog(said.append, threading.main_thread(), end_after=60.0, end=said.append, clock=lambda: now[0])

    def pass_by(seconds: float) -> None:
        for _ in range(int(seconds / 5)):
            now[0] += 5.0
            dog.look()

    dog.see(Phase("train", "begin"))
    dog.see(Phase("pause", "begin", note="as asked"))
    dog.see(Phase("save", "begin"))
    dog.see(Phase("save", "end"))
    pass_by(3 * 24 * 3600.0)
    assert said == []
    dog.see(Phase("pause", "end"))
    pass_by(1000.0)
    assert len(said) >= 1
