"""What a resume may change, what that does, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_tui.engine.errors import ConfigErrors
from qlora_tui.engine.resume import resumable
from qlora_tui.engine.spec import RunConfig


def test_a_resume_may_go_further_and_says_what_that_does() -> None:
    saved = RunConfig(model_name_or_path="m", data=("d",), max_steps=10)
    run, effects = resumable(saved, {"max_steps": 20, "lora_r": 16})
    assert run == replace(saved, max_steps=20)
    assert effects == ["max_steps: 10 -> 20; the run ends there, and the learning rate goes on as in a run of that length"]


def test_a_resume_refuses_what_would_make_it_another_run() -> None:
    saved = RunConfig(model_name_or_path="m", data=("d",))
    with pytest.raises(ConfigErrors) as caught:
        resumable(saved, {"lora_r": 32, "seed": 1, "max_steps": 5})
    assert [problem.where for problem in caught.value.problems] == ["lora_r", "seed"]


def test_a_change_that_is_refused_names_files_as_they_were_typed() -> None:
    with pytest.raises(ConfigErrors, match=r"data: it was a\.jsonl, b\.jsonl when the run began"):
        resumable(RunConfig(model_name_or_path="m", data=("a.jsonl", "b.jsonl")), {"data": ("c.jsonl",)})
