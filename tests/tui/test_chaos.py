"""The screen cannot change the result, however it is treated: keys, sizes, wishes and rubbish at random, and the same bits.

What people may change, the learning rate, is read from the journal, and a run without a screen that is told of the same changes
must leave the same bits. A half and a double before one step are no change at all.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pty_screen import Terminal
from safetensors.torch import load_file

from qlora_tui.engine.events import Command, Event, Finding, Finished, Stepped
from qlora_tui.engine.journal import COMMANDS, EVENTS, Tail, leave_wish, read_records
from qlora_tui.engine.resume import rate_changes
from qlora_tui.engine.runs import list_runs

ROOT = Path(__file__).parents[2]
FIRST = {"pause", "resume", "sample"}
"""Wishes that every run hears; what else it hears is left to chance."""
REAL_HOME = os.environ.get("QLORA_TUI_HOME")
"""Read while tests are collected, before each of them gets a home of its own."""
PROGRAM = "import sys\nfrom qlora_tui.tui.cli import main\nsys.exit(main(sys.argv[1:]))\n"
FUSED = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import plain_kernels, pytest
plain_kernels.stand_in(pytest.MonkeyPatch())
{PROGRAM}"""
"""The same with fused layers on a processor."""
# Without s, d and enter: q asks how to leave, and asking again is the answer that leaves nothing. l and L come in pairs, below.
KEYS = [bytes([code]) for code in range(32, 127) if chr(code) not in "sdlL"]
KEYS += [b"\x1b[A", b"\x1b[B", b"\x1b[C", b"\x1b[D", b"\x1b[5~", b"\x1b[6~", b"\x1b[H", b"\t", b"\x1b[Z", b"\x7f", b"\x1bOP", b"\x1bOQ"]
KEYS += [b"\x0c", b"\x1b[<64;10;10M", b"\x1b[<65;40;12M", b"\x1b[<35;20;20M", b"\x1b[200~xyz \x1b[201~", "é🙂".encode()]
RUBBISH = [
    b"\n",
    b"{}\n",
    b"[1, 2]\n",
    b"\xff\xfe\x00\n",
    b'{"id": 1, "t": "x", "name": "stop"}\n',
    b'{"id": "a", "t": 0, "name": "stop", "attempt": 1e999}\n',
    b'{"id": "a", "t": 0, "name": "save", "args": 3}\n',
    b"[" * 50_000 + b"\n",
    b'{"id": "torn',
]
STEERING = [b"p", b"p", b"a", b"lL", b"Ll", b"k"]
WISHES: list[tuple[str, dict[str, Any]]] = [
    ("save", {}),
    ("pause", {}),
    ("resume", {}),
    ("resume", {}),
    ("sample", {}),
    ("sample", {"prompt": "say [/] \x1b[2J"}),
    ("sample", {"prompt": 7}),
    ("set", {"factor": 0.5}),
    ("set", {"key": "learning_rate", "factor": 0.8}),
    ("set", {"key": "learning_rate", "factor": 1.2}),
    ("set", {"key": "learning_rate", "factor": "NaN"}),
    ("set", {"key": "learning_rate", "factor": 1e9}),
    ("dance", {}),
    ("", {}),
]


def chaos(terminal: Terminal, folder: Path, over: Callable[[], bool], dice: random.Random, patience: float, pace: float) -> None:
    """Treat the screen of a run badly until `over`; between two blows `pace` seconds, or keys pile up that it still has to take."""
    deadline = time.monotonic() + patience
    for name in ("pause", "resume", "sample"):
        leave_wish(folder, name)
    while not over():
        assert time.monotonic() < deadline, terminal.seen[-2000:]
        match dice.randrange(11):
            case 0:
                size = struct.pack("HHHH", dice.randint(1, 60), dice.randint(1, 200), 0, 0)
                fcntl.ioctl(terminal.master, termios.TIOCSWINSZ, size)
                terminal.process.send_signal(signal.SIGWINCH)
            case 1:
                leave_wish(folder, *dice.choice(WISHES))
            case 2:
                leave_wish(folder, dice.choice(["stop", "abort"]), attempt=7)  # meant for another attempt
            case 3:
                with (folder / COMMANDS).open("ab") as file:
                    file.write(dice.choice(RUBBISH))
            case 4:
                terminal.type(dice.choice(STEERING))
            case _:
                terminal.type(b"".join(dice.choices(KEYS, k=dice.randint(1, 12))))
        terminal.read_some(pace)


def quiet(options: list[str], runs: Path, environment: dict[str, str], program: str = PROGRAM) -> Path:
    """Run without a screen and undisturbed, and return the run's folder."""
    command = [sys.executable, "-c", program, *options, "--no-ui", "--runs-dir", str(runs)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
    return list_runs(runs)[0].path


def disturbed(
    options: list[str], runs: Path, environment: dict[str, str], seed: int, patience: float, pace: float, program: str = PROGRAM
) -> Path:
    """Run the program on a terminal, treat it badly to its end, and return the run's folder."""
    terminal = Terminal(program, *options, "--runs-dir", str(runs), size=(100, 30), **environment)
    try:
        deadline = time.monotonic() + patience
        while not list(runs.glob("*/events.jsonl")):
            assert time.monotonic() < deadline, terminal.seen[-2000:]
            terminal.type(b"\r")  # through the wizard
            terminal.read_some(0.5)
        folder = list_runs(runs)[0].path
        tail = Tail(folder / EVENTS)
        chaos(terminal, folder, lambda: any(isinstance(one.event, Finished) for one in tail.records()), random.Random(seed), patience, pace)
        while terminal.process.poll() is None:
            assert time.monotonic() < deadline + patience, terminal.seen[-2000:]
            for key in (b"\x1b", b"q"):  # apart: together they are one key, alt+q
                terminal.type(key)
                terminal.read_some(0.2)
        assert terminal.process.returncode == 0
        return folder
    finally:
        terminal.close()


def events(folder: Path) -> list[Event]:
    return [record.event for record in read_records(folder / EVENTS)]


def changes(folder: Path) -> list[str]:
    """Return what the learning rate was changed by, without what cancelled itself out before it met a step."""
    made = rate_changes(read_records(folder / EVENTS))
    factors = {step: math.prod(change.factor for change in made if change.step == step) for step in {change.step for change in made}}
    found = [change.text for change in made if factors[change.step] != 1.0]
    return ["--set", f"learning_rate_changes=[{', '.join(json.dumps(text) for text in found)}]"] if found else []


def compare(plain: Path, screen: Path, steps: int) -> None:
    """Hold two runs to the same bits: every step, the adapter, the optimizer and the random numbers."""
    one, two = ([step for step in events(folder) if isinstance(step, Stepped)] for folder in (plain, screen))
    assert [step.step for step in two] == list(range(1, steps + 1))
    assert [(step.loss, step.grad_norm, step.lr, step.rows) for step in one] == [
        (step.loss, step.grad_norm, step.lr, step.rows) for step in two
    ]
    last = f"checkpoints/step-{steps:06d}"
    for name in ("adapter/adapter_model.safetensors", f"{last}/optimizer.safetensors", f"{last}/random.safetensors"):
        left, right = load_file(plain / name), load_file(screen / name)
        assert left.keys() == right.keys()
        assert [key for key in left if not left[key].equal(right[key])] == []
    answers = [event for event in events(screen) if isinstance(event, Command)]
    assert any(answer.obeyed for answer in answers)
    obeyed, steering = {answer.name for answer in answers if answer.obeyed}, {"save", "pause", "resume", "sample", "set"}
    assert FIRST <= obeyed <= steering
    assert any("attempt 7" in answer.why for answer in answers)
    assert [event.message for event in events(screen) if isinstance(event, Finding) and event.detector == "fence"] == []
    word = events(screen)[-1]
    assert isinstance(word, Finished)
    assert (word.outcome, word.exit_code) == ("done", 0)


USUAL, NARROW = {"lora_dropout": 0.1}, {"method": "lora-8bit", "packing": "on", "dtype": "bfloat16"}


@pytest.mark.parametrize(("program", "more"), [(PROGRAM, USUAL), (FUSED, NARROW)], ids=["usual", "fused, 8-bit base, end to end"])
@pytest.mark.parametrize(("steps", "seed"), [(12, 1), *(pytest.param(200, seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_a_tiny_model_under_chaos(
    tiny_model: Path,
    write_jsonl: Callable[..., Path],
    chat_rows: list[dict[str, Any]],
    tmp_path: Path,
    home: Path,
    steps: int,
    seed: int,
    program: str,
    more: dict[str, Any],
) -> None:
    settings = {"max_length": 256, "max_steps": steps, "eval_steps": 20, "save_steps": 50, "learning_rate": 1e-3, **more}
    settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "watch_stop": ""}
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    options = ["--model", str(tiny_model), "--data", str(write_jsonl(chat_rows)), *flags]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / ".pkg")}
    screen = disturbed(options, tmp_path / "screen", environment, seed, 900, 0.05, program)
    compare(quiet([*options, *changes(screen)], tmp_path / "plain", environment, program), screen, steps)


@pytest.mark.slow
@pytest.mark.demo
def test_the_demo_under_chaos(tmp_path: Path) -> None:
    """All 30 steps of the demo on its real model, from the cache of whoever runs the tests."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / ".pkg")}
    environment["QLORA_TUI_HOME"] = REAL_HOME or str(tmp_path / "home")
    options = ["demo", "--set", "watch_stop="]  # other rates than planned may well make the loss jump
    screen = disturbed(options, tmp_path / "screen", environment, 4, 3000, 1.0)
    compare(quiet([*options, *changes(screen)], tmp_path / "plain", environment), screen, 30)
