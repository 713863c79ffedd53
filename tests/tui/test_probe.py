"""The test run: real steps of the product's own run in another process, of which only the speed is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_tui.engine import machine, measured, planner
from qlora_tui.engine.errors import EngineError, Stopped
from qlora_tui.engine.models import from_folder
from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui import cli
from qlora_tui.tui.probe import WARM_STEPS, probe

ROWS = 8


@pytest.fixture
def run(tiny_model: Path, write_jsonl, chat_rows, tmp_path: Path, home) -> RunConfig:
    data = write_jsonl(chat_rows)
    return RunConfig(
        model_name_or_path=str(tiny_model),
        data=(str(data),),
        max_length=128,
        lora_r=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        runs_dir=str(tmp_path / "runs"),
    )


def test_it_measures_real_steps_and_keeps_nothing_but_the_speed(run: RunConfig, tmp_path: Path):
    told: list[tuple[str, int, int]] = []
    found = probe(run, ROWS, say=lambda *phase: told.append(phase))
    assert found.rows == ROWS - 2 * WARM_STEPS
    assert found.tokens > 0
    assert found.seconds > 0
    assert found.shortest[0] <= found.longest[0] <= run.max_length
    assert {"data", "load", "train"} <= {phase for phase, _, _ in told}
    assert not (tmp_path / "runs").exists()
    here = machine.look()
    chosen = planner.choose(from_folder(Path(run.model_name_or_path)), run, here).run
    key = planner.step_key(from_folder(Path(run.model_name_or_path)), chosen)
    assert measured.steps(here.name, key), "the next estimate has nothing to rest on"


def test_it_can_be_ended(run: RunConfig, tmp_path: Path):
    with pytest.raises(Stopped):
        probe(run, ROWS, stopping=lambda: True)
    assert not (tmp_path / "runs").exists()


def test_what_is_wrong_with_the_run_is_told(run: RunConfig, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("")
    import dataclasses

    with pytest.raises(EngineError, match="the test run could not be made: "):
        probe(dataclasses.replace(run, data=(str(tmp_path / "empty.jsonl"),)), ROWS)


@pytest.mark.parametrize(
    ("more", "said"),
    [(["--card", "RTX 4090", "--data", "x.jsonl"], "a card that is not here cannot be measured"), ([], "the test run needs rows")],
)
def test_a_test_run_that_cannot_be_is_refused(more: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, home):
    rows = tmp_path / "x.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n")
    arguments = [str(rows) if word == "x.jsonl" else word for word in more]
    assert cli.main(["budget", "--model", "Qwen/Qwen3-8B", "--probe", "5", *arguments]) == 2
    assert said in capsys.readouterr().err
