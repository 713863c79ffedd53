"""Trackers: they get figures and nothing else, in a process of their own, and nothing that they do reaches the run."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_run import PATIENCE, RUN, Ended, checked, crashing, step, three_steps

from qlora_tui.engine import trackers
from qlora_tui.engine.errors import ConfigErrors
from qlora_tui.engine.events import Evaluated, Event, Finished, Record, Resumed, Sampled
from qlora_tui.engine.journal import EVENTS, read_records
from qlora_tui.engine.session import LOG, Session
from qlora_tui.engine.spec import RunConfig, values_of

CANARY = "canary-7f3a91"
PRIVATE = replace(
    RUN,
    model_name_or_path=f"/home/{CANARY}/llama",
    data=(f"/home/{CANARY}/rows.jsonl",),
    sample_prompts=(CANARY,),
    runs_dir=f"/home/{CANARY}",
    eval_data=CANARY,
)
FAKE = """
import json, os, sys
def say(*what):
    with open(os.environ["TRACKED"], "a") as file:
        file.write(json.dumps(what, default=str) + "\\n")
class Settings:
    model_fields = ("console", "silent", "disable_code", "save_code", "disable_git", "x_disable_stats", "x_disable_meta", "host")
    def __init__(self, **given):
        self.given = given
class Run:
    summary = {}
    def define_metric(self, *a, **b): pass
    def log(self, figures, step=None):
        if os.environ.get("TRACKER") == "raises":
            raise RuntimeError("the server \\x1b[2J said no")
        if os.environ.get("TRACKER") == "hangs":
            import time; time.sleep(600)
        say("log", figures, step)
    def finish(self, **how): say("finish", dict(self.summary), how)
def init(project, name="", id="", dir="", config=None, resume="", settings=None, embed=True, auto_log_gpu=None, auto_log_cpu=None):
    how = settings.given if settings else [embed, auto_log_gpu, auto_log_cpu]
    print("\\x1b[1mlook at\\x1b[0m https://example.com")
    say("init", project, name, config, resume, how, os.environ.get("WANDB_ERROR_REPORTING"))
    return Run()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "20261125-164012-test"
    path.mkdir(parents=True, mode=0o700)
    return path


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages called wandb and trackio that write down what they are told."""
    place = tmp_path / "fakes"
    place.mkdir()
    for name in ("wandb", "trackio"):
        (place / f"{name}.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place), *sys.path]))
    monkeypatch.setenv("TRACKED", str(tmp_path / "tracked.jsonl"))
    return tmp_path / "tracked.jsonl"


def ended(folder: Path, train: Any, *names: str, run: RunConfig = RUN, resume: bool = False) -> Session:
    session = Session(replace(run, report_to=names), checked(), folder=folder, train=train, resume=resume)
    session.start()
    assert session.wait(PATIENCE)
    return session


def told(path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def again(**_job: Any) -> Generator[Event, None, Ended]:
    yield Resumed(1)
    for number in (2, 3):
        yield step(number, loss=1.0)
    return Ended("done", "all steps done")


def test_off_unless_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.subprocess, "Popen", lambda *a, **b: pytest.fail("nobody asked"))
    assert ended(folder, three_steps).exit_code == 0


def test_what_is_missing_is_told_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = trackers.unready(replace(RUN, report_to=("wandb", "tensorbord")))
    assert [str(problem) for problem in found] == [
        f"report_to: wandb is not installed; {sys.executable} -m pip install wandb",
        "report_to: no tracker is called 'tensorbord'; did you mean tensorboard?",
    ]


def test_wandb_without_an_account_is_refused_since_it_would_ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None, origin="here"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    run = replace(RUN, report_to=("wandb",))
    assert "no account" in trackers.unready(run)[0].message
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert trackers.unready(run) == []
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.my.lab:8080/")
    assert len(trackers.unready(run)) == 1
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert trackers.unready(run) == []


def test_only_figures_and_choices_are_shared() -> None:
    found = trackers.shared(values_of(replace(PRIVATE, notify=(f"command:{CANARY}",))))
    assert CANARY not in json.dumps(found)
    assert (found["lora_r"], found["lr_scheduler_type"], found["model"], found["learning_rate"]) == (16, "cosine", "llama", 2e-4)
    assert trackers.shared(values_of(replace(RUN, model_name_or_path="Qwen/Qwen3-8B")))["model"] == "Qwen/Qwen3-8B"


def test_figures_are_finite_and_text_is_none() -> None:
    assert "train/loss" not in trackers.figures_of(Record(1, 1, 1.0, step(1, loss=math.nan)))
    assert trackers.figures_of(Record(1, 1, 1.0, step(1)))["perf/tokens_per_second"] == 200.0
    assert trackers.figures_of(Record(1, 1, 1.0, Evaluated(3, 2.0, 24, 0.1))) == {"eval/loss": 2.0}
    assert trackers.figures_of(Record(1, 1, 1.0, Evaluated(3, 2.0, 24, 0.1, manner=True))) == {}, "the same point a second time"
    assert trackers.figures_of(Record(1, 1, 1.0, Sampled(1, CANARY, CANARY))) == {}


@pytest.mark.skipif(not there("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_reads_the_figures_back_also_after_a_resume(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert ended(folder, three_steps, "tensorboard").exit_code == 0
    assert ended(folder, again, "tensorboard", resume=True).exit_code == 0
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    losses = [(event.step, round(event.value, 3)) for event in found.Scalars("train/loss")]
    assert losses == [(1, 3.99), (2, 1.0), (3, 1.0)]
    assert "warning" not in (folder / LOG).read_text().lower()


def test_wandb_and_trackio_are_told_figures_alone_with_all_else_off(folder: Path, fakes: Path) -> None:
    assert ended(folder, three_steps, "wandb", "trackio", run=PRIVATE).exit_code == 0
    first, second = [row for row in told(fakes) if row[0] == "init"]
    assert first[5] == {
        "console": "off",
        "silent": True,
        "disable_code": True,
        "save_code": False,
        "disable_git": True,
        "x_disable_stats": True,
        "x_disable_meta": True,
        "host": "",
    }
    assert first[6] == "false"
    assert second[5] == [False, False, False]
    assert (first[2], second[2], first[4]) == (folder.name, folder.name, "allow")
    assert CANARY not in fakes.read_text()
    assert "\\x1b[1mlook at\\x1b[0m https://example.com" in (folder / LOG).read_text()
    steps = [row[1]["train/loss"] for row in told(fakes) if row[0] == "log" and "train/loss" in row[1]]
    assert sorted(steps) == [3.97, 3.97, 3.98, 3.98, 3.99, 3.99]
    assert ["finish", {"outcome": "done"}, {"exit_code": 0}] in told(fakes)


def test_a_crash_of_the_run_is_told(folder: Path, fakes: Path) -> None:
    ended(folder, crashing, "wandb")
    assert told(fakes)[-1] == ["finish", {"outcome": "failed"}, {"exit_code": 1}]


def test_a_tracker_that_raises_is_off_and_the_others_and_the_run_go_on(folder: Path, fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKER", "raises")
    names = ("wandb", "tensorboard") if there("tensorboard") else ("wandb",)
    assert ended(folder, three_steps, *names).exit_code == 0
    log = (folder / LOG).read_text()
    assert log.count("wandb is off from here on: RuntimeError: the server") == 1
    assert "\x1b" not in log
    assert not there("tensorboard") or list((folder / "tensorboard").iterdir())
    assert [record.event.outcome for record in read_records(folder / EVENTS) if isinstance(record.event, Finished)] == ["done"]


def test_a_tracker_that_hangs_is_left(folder: Path, fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKER", "hangs")
    monkeypatch.setattr(trackers.Following.finish, "__defaults__", (1.0,))
    session = Session(replace(RUN, report_to=("wandb",)), checked(), folder=folder, train=three_steps)
    session.start()
    assert session.wait(PATIENCE)
    assert session.exit_code == 0
    assert "they go on without this process" in (folder / LOG).read_text()
    process = session._following._process
    assert process is not None
    process.kill()
    process.wait()


def test_a_process_that_cannot_be_started_is_a_line_in_the_log(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError("no more processes")

    with monkeypatch.context() as held:
        held.setattr(trackers.subprocess, "Popen", refused)
        assert ended(folder, three_steps, "tensorboard").exit_code == 0
    assert "no tracker follows: no more processes" in (folder / LOG).read_text()


def test_the_trackers_of_a_killed_run_end_by_themselves(folder: Path, fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended(folder, three_steps)
    path = folder / EVENTS
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))  # as a kill leaves it: no last word, a free lock
    monkeypatch.syspath_prepend(str(fakes.parent / "fakes"))
    monkeypatch.setattr(trackers.signal, "alarm", lambda seconds: None)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    trackers.follow(folder, 0, ["wandb"])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert told(fakes)[-1] == ["finish", {"outcome": "crashed"}, {"exit_code": 1}]


def test_a_check_before_a_run_says_so_too(tmp_path: Path) -> None:
    from qlora_tui.engine import preflight

    with pytest.raises(ConfigErrors, match="no tracker is called 'comet'"):
        preflight.check(replace(RUN, report_to=("comet",), runs_dir=str(tmp_path)))
