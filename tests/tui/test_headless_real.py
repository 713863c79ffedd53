"""The program as a person types it, over a tiny real model: detached, attached, and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.engine import preset
from qlora_tui.engine.journal import is_running
from qlora_tui.engine.runs import list_runs
from qlora_tui.tui import cli
from qlora_tui.tui.commands import run

ROOT = Path(__file__).parents[2]
PATIENCE = 180


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / ".pkg"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "qlora_tui.tui", *arguments]
        return subprocess.run(
            command, check=False, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE
        )

    return run


def test_a_run_is_detached_watched_to_its_end_and_taken_further(
    program: Callable[..., subprocess.CompletedProcess[str]],
    tiny_model: Path,
    chat_rows: list[dict[str, Any]],
    write_jsonl: Callable[..., Path],
    tmp_path: Path,
) -> None:
    data = str(write_jsonl(chat_rows))
    settings = ("--set", "max_length=256", "--set", "method=lora", "--set", "save_steps=2", "--max-steps", "4")
    begun = program("--detach", "--model", str(tiny_model), "--data", data, *settings)
    assert begun.returncode == 0, begun.stderr
    name = begun.stdout.strip()
    watched = program("attach", name, "--json")
    assert watched.returncode == 0, watched.stderr
    events = [json.loads(line) for line in watched.stdout.splitlines()]
    assert [event["type"] for event in events].count("finished") == 1
    assert (events[-1]["type"], events[-1]["outcome"]) == ("finished", "done"), events[-1]
    (info,) = list_runs(tmp_path / "runs")
    assert (info.id, info.state, info.step) == (name, "done", 4)
    assert not is_running(info.path)
    assert (info.path / "adapter" / "adapter_config.json").is_file()

    assert program("--no-ui", "--resume", "last").returncode == 2  # all its steps are taken
    assert "is at step 4 already" in program("--no-ui", "--resume", "last", "--max-steps", "4").stderr
    assert "is done" in program("--no-ui", "--resume", "last", "--set", "save_steps=1").stderr
    refused = program("--no-ui", "--resume", "last", "--set", "lora_r=4")
    assert (refused.returncode, "lora_r: it was 16" in refused.stderr) == (2, True)
    same = ("--data", "data.jsonl", "--model", str(tiny_model))  # named again, from here, is no change
    further = program("--no-ui", "--json", "--resume", "last", "--max-steps", "6", *same)
    assert further.returncode == 0, further.stderr
    events = [json.loads(line) for line in further.stdout.splitlines()]
    assert {event["attempt"] for event in events} == {2}
    assert [event["to_step"] for event in events if event["type"] == "resumed"] == [4]
    assert [event["step"] for event in events if event["type"] == "stepped"] == [5, 6]
    assert "max_steps: 4 -> 6" in further.stderr


def test_a_detached_run_that_cannot_begin_says_so_and_is_no_crash(
    tiny_model: Path,
    chat_rows: list[dict[str, Any]],
    write_jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_jsonl(chat_rows)
    real = preset.to_toml
    monkeypatch.setenv("PYTHONPATH", str(ROOT / ".pkg"))
    monkeypatch.chdir(tmp_path)
    # what passed here fails in the process that was started: its data went away in between
    monkeypatch.setattr(run.preset, "to_toml", lambda config: [data.unlink(missing_ok=True), real(config)][1])
    assert cli.main(["--detach", "--model", str(tiny_model), "--data", str(data), "--set", "max_length=256"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"the run did not begin: {data}: no such file" in err
    (info,) = list_runs(tmp_path / "runs")
    assert (info.state, info.outcome) == ("failed", "failed")
