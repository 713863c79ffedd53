"""A campaign runs each task once, on one card, as long as there is time; it goes on where it was cut off."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import campaign
import pytest

PRINTS = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES']); sys.exit(int(sys.argv[1]))"


def written(folder: Path, **tasks: tuple[float, str]) -> Path:
    path = folder / "tasks.toml"
    told = (f"[{name}]\nseconds = {seconds}\ncommand = {json.dumps(command)}\n" for name, (seconds, command) in tasks.items())
    path.write_text("\n".join(told))
    return path


def ended(out: Path) -> list[tuple[str, int]]:
    return [(line["task"], line["exit"]) for line in map(json.loads, (out / "tasks.jsonl").read_text().splitlines())]


def test_each_task_sees_one_card_and_one_that_ended_well_is_not_run_again(tmp_path: Path) -> None:
    well, badly = (f"{{python}} -c {json.dumps(PRINTS)} {code}" for code in (0, 3))
    tasks, out = written(tmp_path, good=(1, well), bad=(2, badly), other=(0.5, well)), tmp_path / "out"
    words = [str(out), "--cards", "2", "--tasks", str(tasks)]
    assert campaign.main(words) == 1
    assert sorted(ended(out)) == [("bad", 3), ("good", 0), ("other", 0)]
    assert {(out / f"{name}.log").read_text().strip() for name in ("good", "bad", "other")} <= {"0", "1"}
    assert campaign.main(words) == 1
    assert sorted(ended(out)) == [("bad", 3), ("bad", 3), ("good", 0), ("other", 0)]


def test_what_would_not_end_in_time_or_lacks_a_folder_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    well = f"{{python}} -c {json.dumps(PRINTS)} 0"
    tasks, out = written(tmp_path, short=(1, well), long=(500, well), peers=(1, f"{well} {{peers}}")), tmp_path / "out"
    assert campaign.main([str(out), "--seconds", "60", "--tasks", str(tasks)]) == os.EX_TEMPFAIL
    said = capsys.readouterr().out
    assert ended(out) == [("short", 0)]
    assert "left out: long" in said
    assert "left out: peers" in said


def test_every_task_names_a_script_that_is_there() -> None:
    given = {"out": "/out", "python": sys.executable, "peers": "/peers", "demo": "/demo"}
    tasks, without = campaign.read_tasks(Path(campaign.__file__).with_suffix(".toml"), given)
    assert not without
    assert len(tasks) > 20
    for task in tasks:
        after = task.words[1:]
        named = Path(after[1].replace(".", "/") + ".py") if after[0] == "-m" else Path(after[0])
        assert (campaign.ROOT / named).exists() or after[1] == "pytest", task.name
        assert not any("{" in word for word in task.words)
