"""What `qlora-tui data --json` says of a run is what that run says itself, and trains on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loop_driver import drive

from qlora_tui.engine.events import Prepared
from qlora_tui.engine.spec import RunConfig
from qlora_tui.tui import cli

ELSEWHERE = {"type", "format", "why", "total_steps"}


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_length": 60, "filter_duplicates": "near"}, {"max_length": 48, "too_long": "cut", "val_set_size": 5.0}],
)
def test_the_report_equals_the_event_of_the_run(
    tiny_model: Path,
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    rows = [{"prompt": f"say {number}", "completion": "abc " * (1 + number % 9) + str(number % 30)} for number in range(60)]
    path = write_jsonl([*rows, {"prompt": "say <|im_end|>", "completion": "no"}, {"prompt": "say", "completion": ""}])
    run = RunConfig(model_name_or_path=str(tiny_model), data=(str(path),), max_steps=1, skip_bad_rows=True, method="lora", **changes)
    ran = drive(run, tmp_path / "run")
    assert ran.error is None
    (told,) = ran.of(Prepared)
    monkeypatch.setenv("QLORA_TUI_HOME", str(tmp_path / "another home, without the run's prepared rows"))
    options = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    assert cli.main(["data", str(path), "--model", str(tiny_model), "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)["prepared"]
    assert found == {name: json.loads(json.dumps(getattr(told, name))) for name in found}
    assert {*found} | ELSEWHERE == {*Prepared.__dataclass_fields__}
    lost = [json.loads(line) for line in (tmp_path / "run" / "dropped.jsonl").read_text().splitlines()]
    assert len(lost) == sum(told.refused.values()) + sum(told.dropped.values())
    assert {61, 62} <= {row["row"] for row in lost}
