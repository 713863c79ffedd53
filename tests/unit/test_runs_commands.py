"""`runs compare` and `runs delete`: what is the same and what is not, and that nothing goes which must not."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from corpus import ATTACKS
from fake_run import RUN, step

from qlora_tui.engine import removal
from qlora_tui.engine.events import Device, Evaluated, Event, Finished, Started
from qlora_tui.engine.journal import EVENTS, Journal, RunLock
from qlora_tui.engine.preset import to_toml
from qlora_tui.engine.spec import RunConfig, values_of
from qlora_tui.tui.cli import main

HARMLESS = {"\n", "\u200d"}  # emoji are joined by the second
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "runs"
    path.mkdir()
    return path


def make(runs: Path, name: str, run: RunConfig = RUN, *, losses: tuple[float, ...] = (3.0, 2.0, 1.0), held: float = 2.5) -> Path:
    folder = runs / name
    folder.mkdir()
    (folder / "run.toml").write_text(to_toml(run))
    journal = Journal(folder)
    events: list[Event] = [Started(name, values_of(run), {}, {}), Evaluated(0, 4.0, 24, 0.1)]
    events += [step(number, len(losses), loss=loss) for number, loss in enumerate(losses, 1)]
    events += [Device(), Evaluated(len(losses), held, 24, 0.1, "", 4.0, 1.5, (1.2, 1.8), 0.9, "better"), Finished("done", 0, "done")]
    for event in events:
        journal.write(event)
    journal.close()
    for number in (1, 2):
        checkpoint = folder / "checkpoints" / f"step-{number:06}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "adapter.safetensors").write_bytes(b"x" * 3000)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 500)
    return folder


def test_runs_are_compared_by_settings_results_and_curves(runs: Path, capsys: Capture) -> None:
    make(runs, "a-run")
    make(runs, "b-run", replace(RUN, lora_r=64, learning_rate=1e-4), losses=(3.0, 2.5, 2.2), held=3.1)
    assert main(["runs", "compare", "a-run", "b-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["key"]: row["values"] for row in found["differences"]} == {"lora_r": [16, 64], "learning_rate": [2e-4, 1e-4]}
    first, second = found["runs"]
    assert (first["id"], first["held_out_loss"], first["base_loss"], first["drop"]) == ("a-run", 2.5, 4.0, 1.5)
    assert (second["held_out_loss"], second["step"], second["tokens_per_second"]) == (3.1, 3, 200.0)
    assert first["peak_bytes"] == 2**30
    assert found["note"] == ""
    assert main(["runs", "compare", "a-run", "b-run"]) == 0
    text = capsys.readouterr().out
    assert "A  a-run  done" in text
    assert [line.split() for line in text.splitlines() if line.startswith("lora_r")] == [["lora_r", "16", "64"]]
    plot = text[text.index("loss by step") :]
    assert "A" in plot
    assert "B" in plot.splitlines()[3] + plot.splitlines()[5] + plot.splitlines()[9]
    assert "\x1b" not in text


def test_held_out_losses_of_other_rows_are_not_compared(runs: Path, capsys: Capture) -> None:
    make(runs, "a")
    make(runs, "b", replace(RUN, seed=7))
    assert main(["runs", "compare", "a", "b"]) == 0
    assert "not of the same rows and tokens (seed)" in capsys.readouterr().out


def test_a_run_that_never_began_is_compared_by_its_settings(runs: Path, capsys: Capture) -> None:
    make(runs, "a")
    (runs / "b").mkdir()
    (runs / "b" / "run.toml").write_text(to_toml(replace(RUN, max_steps=7)))
    assert main(["runs", "compare", "a", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differences"] == [{"key": "max_steps", "values": [0, 7]}]
    assert found["runs"][1]["loss"] is None


def test_one_run_twice_is_no_comparison(runs: Path, capsys: Capture) -> None:
    make(runs, "a")
    assert main(["runs", "compare", "a", str(runs / "a")]) == 2
    assert "only one run is named, a: a comparison takes two to 6" in capsys.readouterr().err
    assert main(["runs", "compare", "last", "last"]) == 2
    assert "only one run is named, a:" in capsys.readouterr().err


def test_too_many_runs_are_no_comparison_either(runs: Path, capsys: Capture) -> None:
    for name in "abcdefg":
        make(runs, name)
    assert main(["runs", "compare", *"abcdefg"]) == 2
    assert "7 runs are too many: a comparison takes two to 6" in capsys.readouterr().err


def test_a_run_is_deleted_whole_and_named(runs: Path, capsys: Capture) -> None:
    folder, other = make(runs, "a"), make(runs, "b")
    assert main(["runs", "delete", "a", "--yes", "--json"]) == 0
    gone = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in gone] == ["a"]
    assert gone[0]["bytes"] > 6500
    assert not folder.exists()
    assert list(runs.iterdir()) == [other]


def test_checkpoints_go_and_the_adapter_stays(runs: Path) -> None:
    folder = make(runs, "a")
    assert main(["runs", "delete", "a", "--only-checkpoints", "--yes"]) == 0
    assert not (folder / "checkpoints").exists()
    assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size == 500
    assert (folder / EVENTS).exists()


def test_a_running_run_is_never_deleted_nor_the_one_named_before_it(runs: Path, capsys: Capture) -> None:
    first, second = make(runs, "a"), make(runs, "b")
    lock = RunLock(second)
    try:
        assert main(["runs", "delete", "a", "b", "--yes"]) == 2
    finally:
        lock.release()
    assert "already running" in capsys.readouterr().err
    assert first.exists()
    assert second.exists()


def test_without_a_terminal_nothing_is_deleted_unasked(runs: Path, capsys: Capture) -> None:
    folder = make(runs, "a")
    assert main(["runs", "delete", "a"]) == 2
    assert "say --yes" in capsys.readouterr().err
    assert main(["runs", "delete", "last", "--yes"]) == 2
    assert folder.exists()


@pytest.mark.parametrize(("answer", "code"), [(b"y\n", 0), (b"n\n", 130), (b"\n", 130)])
def test_on_a_terminal_it_asks(runs: Path, answer: bytes, code: int) -> None:
    folder = make(runs, "a")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qlora_tui.tui", "runs", "delete", "a"]
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    told = b""
    while b"[y/N]" not in told:
        told += os.read(ours, 4096)
    assert str(folder).encode() in told
    os.write(ours, answer)
    assert process.wait(60) == code
    os.close(ours)
    assert folder.exists() == (code != 0)


def a_project_with_a_config(runs: Path) -> Path:
    (runs / "run.toml").write_text(to_toml(RUN))
    (runs / "thesis.txt").write_text("years of work")
    return runs


def a_link(runs: Path) -> Path:
    folder = make(runs, "real")
    (runs / "link").symlink_to(folder)
    return runs / "link"


def another_log(runs: Path) -> Path:
    (runs / "other").mkdir()
    (runs / "other" / EVENTS).write_text('{"event": "somebody else\'s"}\n')
    return runs / "other"


def checkpoints_elsewhere(runs: Path) -> Path:
    folder = make(runs, "a")
    (folder / "checkpoints").rename(runs / "disk")
    (folder / "checkpoints").symlink_to(runs / "disk")
    return folder


@pytest.mark.parametrize("trap", [a_project_with_a_config, a_link, another_log])
def test_what_is_no_run_is_never_deleted(runs: Path, trap: Any, capsys: Capture) -> None:
    path = trap(runs)
    before = sorted(runs.rglob("*"))
    assert main(["runs", "delete", str(path), "--yes"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(runs.rglob("*")) == before


def test_a_link_inside_is_not_followed(runs: Path) -> None:
    folder = checkpoints_elsewhere(runs)
    assert main(["runs", "delete", str(folder), "--only-checkpoints", "--yes"]) == 2
    (folder / "checkpoints").unlink()
    (folder / "notes").symlink_to(runs / "disk")
    assert main(["runs", "delete", str(folder), "--yes"]) == 0
    assert not folder.exists()
    assert len(list((runs / "disk").rglob("*.safetensors"))) == 2


def test_a_kill_in_the_middle_leaves_no_half_run_and_is_cleared_by_the_next(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    make(runs, "a")
    make(runs, "b")

    def killed(path: Any, ignore_errors: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as held:
        held.setattr(removal.shutil, "rmtree", killed)
        assert main(["runs", "delete", "a", "--yes"]) == 130
    capsys.readouterr()
    assert main(["runs", "--json"]) == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)] == ["b"]
    assert len(list(runs.iterdir())) == 2
    assert main(["runs", "delete", "b", "--yes"]) == 0
    assert list(runs.iterdir()) == []


def test_another_deletion_that_clears_the_same_away_is_no_failure(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    folder, honest = make(runs, "a"), shutil.rmtree

    def twice(path: Any, **more: Any) -> None:
        honest(path)
        honest(path, **more)

    monkeypatch.setattr(removal.shutil, "rmtree", twice)
    assert main(["runs", "delete", "a", "--yes"]) == 0
    assert not folder.exists()


def test_a_checkpoint_that_goes_while_a_run_is_weighed_is_no_crash(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    folder, honest = make(runs, "a"), os.lstat
    lock = RunLock(folder)

    def gone(path: Any) -> os.stat_result:
        if str(path).endswith("adapter.safetensors"):
            raise FileNotFoundError(path)
        return honest(path)

    monkeypatch.setattr(removal.os, "lstat", gone)
    try:
        assert main(["runs", "delete", "a", "--yes"]) == 2
    finally:
        lock.release()
    assert "already running" in capsys.readouterr().err


def test_foreign_names_and_settings_never_steer_the_terminal(runs: Path, capsys: Capture) -> None:
    for number, attack in enumerate(ATTACKS.values()):
        name = attack.replace("/", "").replace("\x00", "").encode("utf-8", "ignore").decode()[:40]
        make(runs, f"{number}{name}", replace(RUN, sample_prompts=(attack,), data=(attack,)))
    names = sorted(path.name for path in runs.iterdir())
    for first, second in zip(names[::2], names[1::2], strict=False):
        assert main(["runs", "compare", first, second]) == 0
        assert main(["runs", "delete", first]) == 2
        out, err = capsys.readouterr()
        assert {char for char in out + err if not char.isprintable()} <= HARMLESS
    assert main(["runs", "delete", *names, "--yes"]) == 0
    out, _ = capsys.readouterr()
    assert {char for char in out if not char.isprintable()} <= HARMLESS
    assert list(runs.iterdir()) == []
