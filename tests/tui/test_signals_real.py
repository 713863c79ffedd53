"""Signals to the real program over a tiny model, in every phase, from its first second on."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.engine import shelf
from qlora_tui.engine.events import Finished
from qlora_tui.engine.journal import EVENTS, is_running, read_records
from qlora_tui.engine.runs import list_runs, read_info
from qlora_tui.tui import cli
from qlora_tui.tui.commands import run

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0
BEFORE_A_RUN = """
import argparse, os, signal, sys, threading
from qlora_tui.engine import preflight
from qlora_tui.tui.commands import run
def check(config, **_):
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    threading.Event().wait(60)
preflight.check = check
sys.exit(run.child(argparse.Namespace(folder=sys.argv[1])))
"""


@pytest.fixture
def options(tiny_model: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]], tmp_path: Path) -> list[str]:
    settings = {"max_length": 256, "method": "lora", "max_steps": 100_000, "eval_steps": 5, "save_steps": 3, "lora_dropout": 0.1}
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return ["--model", str(tiny_model), "--data", str(write_jsonl(chat_rows)), "--runs-dir", str(tmp_path / "runs"), *flags]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / ".pkg"), "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, *command], env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def word(folder: Path) -> Finished:
    event = read_records(folder / EVENTS)[-1].event
    assert isinstance(event, Finished)
    return event


def until(process: subprocess.Popen[bytes], seen: Callable[[dict[str, Any]], bool]) -> None:
    """Read events from a run's stdout until one is the one that is waited for."""
    deadline, rest = time.monotonic() + PATIENCE, b""
    assert process.stdout is not None
    while time.monotonic() < deadline:
        if not select.select([process.stdout], [], [], 0.1)[0]:
            continue
        *lines, rest = (rest + os.read(process.stdout.fileno(), 1 << 16)).split(b"\n")
        if any(seen(json.loads(line)) for line in lines):
            return
    raise AssertionError("the event never came")


def begins(phase: str, after: str = "") -> Callable[[dict[str, Any]], bool]:
    """Return a test for the beginning of a phase, if `after` names a type of event: once one of those has come."""
    waiting = [after] if after else []

    def seen(event: dict[str, Any]) -> bool:
        if event["type"] in waiting:
            waiting.clear()
        return not waiting and (event["type"], event.get("name"), event.get("state")) == ("phase", phase, "begin")

    return seen


@pytest.mark.parametrize(
    ("phase", "number"), [*((phase, signal.SIGTERM) for phase in ("load", "data", "eval", "train")), ("eval", signal.SIGINT)]
)
def test_a_signal_before_the_first_step_ends_the_run_with_a_word(
    program: Callable[..., subprocess.Popen[bytes]], options: list[str], tmp_path: Path, phase: str, number: signal.Signals
) -> None:
    process = program("-m", "qlora_tui.tui", "--no-ui", "--json", *options)
    until(process, begins(phase))
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    code = 128 + number
    assert process.returncode == code
    assert b"stopping at the next safe point" in err
    (info,) = list_runs(tmp_path / "runs")
    assert (word(info.path).outcome, word(info.path).exit_code) == ("stopped", code)
    assert not is_running(info.path)


@pytest.mark.parametrize("moment", ["stepped", "eval", "save"])
def test_sigterm_in_training_saves_and_the_run_can_be_resumed(
    program: Callable[..., subprocess.Popen[bytes]], options: list[str], tmp_path: Path, moment: str
) -> None:
    process = program("-m", "qlora_tui.tui", "--no-ui", "--json", *options)
    until(process, (lambda event: event["type"] == "stepped") if moment == "stepped" else begins(moment, after="stepped"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    (info,) = list_runs(tmp_path / "runs")
    assert word(info.path).outcome == "stopped"
    assert f"stopped and saved at step {info.step}" in word(info.path).reason
    newest, damaged = shelf.newest(info.path)
    assert newest is not None
    assert (newest.name, damaged) == (f"step-{info.step:06d}", [])
    assert (info.path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_detached_run_that_is_stopped_in_its_checks_leaves_a_last_word(
    program: Callable[..., subprocess.Popen[bytes]], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "runs" / "20261127-070000-test"
    folder.mkdir(parents=True, mode=0o700)
    (folder / "run.toml").write_text('model_name_or_path = "somewhere"\ndata = ["rows.jsonl"]\n')
    process = program("-c", BEFORE_A_RUN, str(folder), name)
    _, err = process.communicate(timeout=PATIENCE)
    code = 128 + getattr(signal, name)  # one of the two above
    assert process.returncode == code, err
    assert b"stopped before the run began" in err
    assert (word(folder).outcome, word(folder).exit_code) == ("stopped", code)
    assert (read_info(folder).state, is_running(folder)) == ("stopped", False)


def test_a_detached_run_that_is_killed_in_its_first_instant_is_told_by_who_started_it(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before Python has installed a handler nothing but the parent can speak."""
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\nkill -TERM $$\n")
    dying.chmod(0o700)
    monkeypatch.setattr(run.sys, "executable", str(dying))
    assert cli.main(["--detach", *options]) == 143
    assert "the run did not begin: SIGTERM: stopped before the run began" in capsys.readouterr().err
    (info,) = list_runs(tmp_path / "runs")
    assert (info.state, word(info.path).exit_code) == ("stopped", 143)


def test_ctrl_c_while_a_detached_run_begins_takes_it_back(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = run._first_event, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(run, "_first_event", interrupted)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / ".pkg"))
    assert cli.main(["--detach", *options]) == 130
    out, err = capsys.readouterr()
    (info,) = list_runs(tmp_path / "runs")
    assert (out, f"Ctrl+C: run {info.id} is stopped" in err) == ("", True)
    assert (word(info.path).outcome, word(info.path).exit_code, is_running(info.path)) == ("stopped", 143, False)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--until", "noon"], "until: 'noon' is no time of day; say 07:00, or 2026-11-28 07:00"),
        (["--until", "2020-01-01 07:00"], "until: 2020-01-01 07:00 has passed; name a later time"),
        (["--set", "max_temperature=80"], "max_temperature: no sensor of a GPU answers here; leave it out"),
        (["--set", "end_if_hung=5s"], "end_if_hung: 5.0 s is less than a long step can take; say at least 60 s, or 0"),
        (["--model", "nobody/nothing"], "there is no folder nobody/nothing, HF_HUB_OFFLINE is set"),
        (["--data", "nobody/nothing"], "nobody/nothing: there is no such file, HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence_and_exit_2(
    options: list[str], flags: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qlora_tui.engine.machine.temperature", lambda: None)
    assert cli.main(["--no-ui", *options, *flags]) == 2
    out, err = capsys.readouterr()
    assert (out, told in err) == ("", True), err


@pytest.mark.slow
def test_a_run_that_is_to_be_done_soon_ends_measured_and_saved(
    program: Callable[..., subprocess.Popen[bytes]], options: list[str], tmp_path: Path
) -> None:
    """As many steps are picked as fit, and should they take longer after all, the time is up first: it ends by then in any case."""
    soon = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + 80))
    process = program("-m", "qlora_tui.tui", "--no-ui", "--json", *options, "--until", soon)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    (info,) = list_runs(tmp_path / "runs")
    last = word(info.path)
    assert (last.outcome, last.adapter, 0 < info.step < 100_000) == ("done", "adapter", True)
    assert last.reason == f"all {info.total_steps} steps" or f"time was up at step {info.step}" in last.reason
    assert time.time() < time.mktime(time.strptime(soon, "%Y-%m-%d %H:%M"))
