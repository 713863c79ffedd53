"""What base and tuned answer to held-out prompts after a run: the run's own rows, the real adapter, kept one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_driver import drive
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_tui.engine import data, preflight
from qlora_tui.engine.data import Tokenizer, load_tokenizer
from qlora_tui.engine.errors import CheckpointError, DataError, Stopped
from qlora_tui.engine.evaluate import read_rows
from qlora_tui.engine.judge import ANSWERS, Answered, read_pairs
from qlora_tui.engine.machine import look
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train import answers
from qlora_tui.engine.train.answers import Asking, answer

Make = Callable[..., RunConfig]
LEARNS = {"max_steps": 12, "learning_rate": 0.02, "val_set_size": 6}


def asking(run: RunConfig, folder: Path, **more: Any) -> Asking:
    files, spec = preflight.find_model(run)
    usual: dict[str, Any] = {"positions": spec.max_position_embeddings, "machine": look(), "rows": 4, "tokens": 8}
    return Asking(run=run, folder=folder, files=files, dataset=data.load(run), eval_dataset=data.load_eval(run), **(usual | more))


@pytest.fixture
def trained(run_of: Make, tmp_path: Path) -> tuple[RunConfig, Path]:
    run = run_of(**LEARNS)
    return run, drive(run, tmp_path / "run").folder


def by_peft(folder: Path, tokenizer: Tokenizer, prompt: str, most: int) -> tuple[str, str]:
    """Answer as a bare script with PEFT does: base, tuned."""
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, folder / "adapter")
    ids = torch.tensor([tokenizer.encode(tokenizer.render([{"role": "user", "content": prompt}], answer_next=True))[0]])
    found = []
    for off in (True, False):
        made = ids
        for _ in range(most):
            if off:
                with tuned.disable_adapter(), torch.no_grad():
                    logits = tuned(input_ids=made).logits
            else:
                with torch.no_grad():
                    logits = tuned(input_ids=made).logits
            token = int(logits[0, -1].argmax())
            if token in tokenizer.stop_ids():
                break
            made = torch.cat((made, torch.tensor([[token]])), dim=1)
        found.append(tokenizer.decode(made[0, ids.shape[1] :].tolist()))
    return found[0], found[1]


def test_both_answer_as_a_bare_script_has_them_answer(trained: tuple[RunConfig, Path]) -> None:
    run, folder = trained
    made = list(answer(asking(run, folder)))
    tokenizer = load_tokenizer(Path(run.model_name_or_path))
    assert len(made) == 4
    for found in made:
        assert (found.base, found.tuned) == by_peft(folder, tokenizer, found.prompt, 8)
    assert any(found.base != found.tuned for found in made)
    assert {found.row for found in made} <= {loss.row for loss in read_rows(folder / "eval" / "base.jsonl")}
    assert all(found.prompt == f"say {found.row - 1}" and found.wanted.startswith("abc ") for found in made)
    assert read_pairs(folder).answers == made
    assert read_pairs(folder).sheet == replace(read_pairs(folder).sheet, rows=4, tokens=8, seed=run.seed, base="lora float32", held=6)  # type: ignore[type-var]


def test_it_goes_on_where_it_was_ended_and_makes_nothing_twice(trained: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = trained
    whole = list(answer(asking(run, folder)))
    lines = (folder / ANSWERS).read_text().splitlines(keepends=True)
    (folder / ANSWERS).write_text("".join(lines[:3]) + lines[3][:20])
    assert list(answer(asking(run, folder))) == whole[2:]
    assert read_pairs(folder).answers == whole
    monkeypatch.setattr(answers, "load", lambda *_: pytest.fail("loaded again"))
    assert list(answer(asking(run, folder))) == []
    assert list(answer(asking(run, folder, rows=2))) == []
    assert read_pairs(folder).answers == whole[:2]


def test_a_wish_to_stop_ends_it_between_two_tokens_and_keeps_what_is_whole(trained: tuple[RunConfig, Path]) -> None:
    run, folder = trained

    def stopping() -> None:
        if len(read_pairs(folder).answers) == 2:
            raise Stopped("stopped")

    with pytest.raises(Stopped):
        list(answer(asking(run, folder, stopping=stopping)))
    assert len(read_pairs(folder).answers) == 2


@pytest.mark.parametrize("values", [{"init_lora_weights": "pissa"}, {"use_dora": True}, {"use_rslora": True}, {"method": "qlora"}])
def test_every_kind_of_adapter_is_read_back(run_of: Make, tmp_path: Path, values: dict[str, Any]) -> None:
    """PEFT reads the same adapter by its own ways, and answers the same; a base in four bits is another one than its plain base."""
    run = run_of(**LEARNS, **values)
    folder = drive(run, tmp_path / "run").folder
    made = list(answer(asking(run, folder, rows=3)))
    assert any(found.base != found.tuned for found in made)
    if run.method == "lora":
        tokenizer = load_tokenizer(Path(run.model_name_or_path))
        assert [(found.base, found.tuned) for found in made] == [by_peft(folder, tokenizer, found.prompt, 8) for found in made]


def test_rows_that_are_not_the_runs_are_refused(trained: tuple[RunConfig, Path]) -> None:
    run, folder = trained
    rows = Path(run.data[0]).read_text().splitlines(keepends=True)
    Path(run.data[0]).write_text("".join(rows[5:]))
    with pytest.raises(DataError, match="the held-out rows are not those of the run"):
        list(answer(asking(run, folder)))
    assert not (folder / ANSWERS).exists()


def test_without_a_hold_out_or_an_adapter_it_is_refused(run_of: Make, tmp_path: Path, trained: tuple[RunConfig, Path]) -> None:
    run = run_of(max_steps=1, val_set_size=0)
    folder = drive(run, tmp_path / "none").folder
    with pytest.raises(DataError, match="held no rows out"):
        list(answer(asking(run, folder)))
    run, folder = trained
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="left no adapter"):
        list(answer(asking(run, folder)))


def test_an_adapter_of_another_rank_is_refused(trained: tuple[RunConfig, Path]) -> None:
    run, folder = trained
    with pytest.raises(CheckpointError, match="another rank"):
        list(answer(asking(replace(run, lora_r=4), folder)))


def test_an_answer_that_ends_by_itself_is_not_cut_off(trained: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = trained
    monkeypatch.setattr(answers, "greedy", lambda loaded, ids, most, stops, look: [97] * (most - 1))
    assert {found.cut for found in answer(asking(run, folder, rows=1))} == {(False, False)}
    monkeypatch.setattr(answers, "greedy", lambda loaded, ids, most, stops, look: [97] * most)
    assert {found.cut for found in answer(asking(run, folder, rows=2))} == {(True, True)}


def test_a_chat_shows_all_that_came_before_the_answer(run_of: Make, tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    turns = [("system", "be brief"), ("user", "first"), ("assistant", "one"), ("user", "second"), ("assistant", "two")]
    rows = [{"messages": [{"role": role, "content": f"{text} {number}"} for role, text in turns]} for number in range(30)]
    chats = str(write_jsonl(rows, "chats.jsonl"))
    made: dict[bool, Answered] = {}
    for mask in (False, True):
        run = run_of(max_steps=1, val_set_size=4, data=(chats,), mask_history=mask)
        folder = drive(run, tmp_path / f"run-{mask}").folder
        (made[mask],) = answer(asking(run, folder, rows=1, tokens=2))
    number = made[False].row - 1
    assert made[False].prompt == f"system: be brief {number}\n\nuser: first {number}"
    assert made[False].wanted == f"one {number}"
    number = made[True].row - 1
    assert made[True].prompt.startswith(f"system: be brief {number}\n\nuser: first {number}\n\nassistant: one {number}")
    assert made[True].wanted == f"two {number}"


def test_a_text_that_is_all_answer_is_gone_on_with(run_of: Make, tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    text = str(write_jsonl([{"text": f"a text about {number} things and nothing else"} for number in range(30)], "texts.jsonl"))
    run = run_of(max_steps=1, val_set_size=4, data=(text,))
    folder = drive(run, tmp_path / "run").folder
    for found in answer(asking(run, folder, tokens=2)):
        assert (found.prompt + found.wanted).startswith("a text about")
        assert found.wanted.strip().endswith("else")
