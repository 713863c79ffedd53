"""The triage in a run: what the base knows is found and left out, once, the same every time, and without a trace where it is off."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_model, write_tokenizer
from loop_driver import Asked, Ran, drive
from safetensors.torch import load_file

from qlora_tui.engine import evaluate, machine, report
from qlora_tui.engine.errors import DataError, Stopped
from qlora_tui.engine.events import Finding, Phase, Planned, Prepared, Record, Resumed
from qlora_tui.engine.spec import RunConfig, from_values
from qlora_tui.engine.train import triage
from qlora_tui.engine.train.triage import SCORES, Triage
from qlora_tui.tui import scoring
from qlora_tui.tui.cli import main
from qlora_tui.tui.printer import _prepared

PROMPTS = [f"say {word}" for word in ("red", "blue", "green", "gold", "grey", "pink")]
TEACH = ["the cat sat on the mat and saw a bird", "all work and no play makes a dull day", "one two three four five six seven eight"]
Make = Callable[..., RunConfig]


def chatml(prompt: str, answer: str = "") -> str:
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}"


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A tiny base that has learned a few sentences by heart, and what it answers to the prompts, greedily."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("taught")
    write_model(folder)
    write_tokenizer(folder)
    tokenizer, model = PreTrainedTokenizerFast.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    lines = [chatml(prompt, f"{TEACH[place % len(TEACH)]}<|im_end|>") for place, prompt in enumerate(PROMPTS)]
    batch = tokenizer(lines, return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(chatml(prompt), return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**ids, max_new_tokens=60, do_sample=False, eos_token_id=258, pad_token_id=259)
        answers.append(tokenizer.decode(out[0][ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return folder, answers


@pytest.fixture
def run_of(taught: tuple[Path, list[str]], write_jsonl: Callable[..., Path]) -> Make:
    """Forty rows of letters by chance with six planted answers of the base among them, and one short one."""
    folder, answers = taught
    chance = random.Random(7)
    rows = [{"prompt": f"tell {n}", "completion": "".join(chance.choices("qzxjkvw QZXJ", k=30))} for n in range(40)]
    for place, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        rows[5 * place + 1] = {"prompt": prompt, "completion": answer}
    rows[39] = {"prompt": PROMPTS[0], "completion": answers[0][:9]}
    path = write_jsonl(rows)

    def make(**values: Any) -> RunConfig:
        usual = {"model_name_or_path": str(folder), "data": (str(path),), "method": "lora", "max_length": 256, "val_set_size": 4.0}
        shape = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 1.0,
            "gradient_checkpointing": "false",
        }
        return from_values({**usual, **shape, "perplexity_filter": 3.0, **values})

    return make


PLANTED = {5 * place + 2 for place in range(len(PROMPTS))}


def adapter(ran: Ran) -> dict[str, torch.Tensor]:
    return load_file(ran.folder / "adapter" / "adapter_model.safetensors")


def same_bits(left: Ran, right: Ran) -> bool:
    one, other = adapter(left), adapter(right)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def lost(ran: Ran) -> list[dict[str, Any]]:
    path = ran.folder / "dropped.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def held_out(ran: Ran) -> set[int]:
    return {loss.row for loss in evaluate.read_rows(ran.folder / "eval" / "base.jsonl")}


def never(*_: Any) -> Any:
    raise AssertionError("scored again")


def test_what_the_base_says_itself_is_found_and_left_out(run_of: Make, tmp_path: Path) -> None:
    off = drive(run_of(perplexity_filter=0.0), tmp_path / "off")
    ran = drive(run_of(), tmp_path / "run")
    assert (off.error, ran.error) == (None, None)
    assert held_out(ran) == held_out(off)
    gone = {row["row"] for row in lost(ran)}
    assert gone == PLANTED - held_out(ran)
    assert all(1 <= row["perplexity"] < 3 for row in lost(ran))
    before, after = ran.of(Prepared)
    assert before == off.of(Prepared)[0]
    assert after.train_rows == before.train_rows - len(gone)
    assert after.tokens == before.tokens - sum(row["tokens"] for row in lost(ran))
    assert after.holdout_rows == before.holdout_rows
    assert after.total_steps == -(-after.train_rows // 4) == len(ran.losses)
    assert ran.of(Planned)[-1].choices["save_steps"] >= 1
    assert not gone & {row for step in ran.events if step.type == "stepped" for row in step.rows}
    scored = evaluate.read_rows(ran.folder / SCORES)
    assert 40 not in {loss.row for loss in scored}  # a short answer
    assert len(scored) == before.train_rows - (40 not in held_out(ran))
    told = [event for event in ran.of(Phase) if event.name == "data" and event.state == "progress"]
    assert (told[-1].done, told[-1].total) == (len(scored), len(scored))


def test_report_and_printer_say_what_was_left_out(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(), tmp_path / "run")
    records = [Record(place + 1, float(place), 1, event) for place, event in enumerate(ran.events)]
    text = report.render(report.see(records), ran.folder)
    lines = "\n".join(_prepared(ran.of(Prepared)[-1]))
    for words in (text, lines):
        assert "the base knows the answer: perplexity under 3" in words
        assert "100 and more" in words
    assert f"{len(lost(ran))} rows left out" in lines


def test_no_more_goes_than_is_confirmed(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(perplexity_drop_most=0.06), tmp_path / "run")
    (first, *_), rows = ran.of(Prepared), lost(ran)
    assert len(rows) == int(0.06 * first.train_rows) == 2
    scores = {loss.row: loss.mean for loss in evaluate.read_rows(ran.folder / SCORES)}
    assert {row["row"] for row in rows} == set(sorted(scores, key=scores.__getitem__)[:2])
    assert [note for note in ran.of(Prepared)[-1].notes if "those nearest to it stay" in note]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_second_run_takes_the_scores_from_the_cache(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    first = drive(run_of(method=method), tmp_path / "first")
    monkeypatch.setattr(Triage, "_score", never)
    again = drive(run_of(method=method), tmp_path / "again")
    assert again.error is None
    assert lost(again) == lost(first) != []
    assert again.losses == first.losses
    assert same_bits(first, again)
    assert drive(run_of(method=method, perplexity_filter=2.0), tmp_path / "other threshold").error is None


@pytest.mark.parametrize("changes", [{"method": "qlora"}, {"per_device_train_batch_size": 4}, {"attn_implementation": "eager"}])
def test_another_base_is_scored_anew(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    drive(run_of(), tmp_path / "first")
    monkeypatch.setattr(Triage, "_score", never)
    assert "scored again" in str(drive(run_of(**changes), tmp_path / "other").error)


def test_a_resume_reads_the_list_and_trains_what_the_whole_run_trains(
    run_of: Make, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(lora_dropout=0.1)
    whole, part = drive(run, tmp_path / "whole"), drive(run, tmp_path / "part", Asked({3: "stop"}))
    left_out = lost(part)
    shutil.rmtree(home / "cache")
    monkeypatch.setattr(Triage, "_score", never)
    rest = drive(run, tmp_path / "part", resume=True)
    assert rest.error is None
    assert rest.of(Resumed)[0].to_step == 3
    assert lost(rest) == left_out != []
    assert part.losses + rest.losses == whole.losses
    assert same_bits(rest, whole)


def test_scoring_leaves_no_trace_and_off_says_nothing(run_of: Make, tmp_path: Path) -> None:
    off = drive(run_of(perplexity_filter=0.0, lora_dropout=0.2), tmp_path / "off")
    on = drive(run_of(perplexity_filter=1.0000001, lora_dropout=0.2), tmp_path / "on")
    assert on.losses == off.losses
    assert same_bits(off, on)
    assert (len(off.of(Prepared)), len(on.of(Prepared))) == (1, 2)
    assert not (off.folder / SCORES).exists()
    assert [event.choices for event in on.of(Planned)] == [event.choices for event in off.of(Planned)]


def test_a_wish_to_stop_is_heard_while_rows_are_scored(run_of: Make, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, attempt = Asked(), Triage._attempt

    def late(self: Triage, *args: Any) -> Any:
        asked.at_step[0] = "stop"
        return attempt(self, *args)

    monkeypatch.setattr(Triage, "_attempt", late)
    ran = drive(run_of(), tmp_path / "run", asked)
    assert ran.result is not None
    assert ran.result.outcome == "stopped"
    assert not (ran.folder / SCORES).exists()
    assert not list((home / "cache" / "rows").glob(".building*"))


def test_memory_that_runs_out_halves_the_rows_at_once(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = drive(run_of(), tmp_path / "usual")
    shutil.rmtree(tmp_path / "home" / "cache")
    measure, sizes = evaluate.measure, []

    def tight(loaded: Any, rows: Any, batch: int, poll: Any, *, chunk: int = 0, **more: Any) -> Any:
        sizes.append(batch)
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return measure(loaded, rows, batch, poll, chunk=chunk, **more)

    monkeypatch.setattr(triage.evaluate, "measure", tight)
    ran = drive(run_of(), tmp_path / "run")
    assert ran.error is None
    assert sizes[:2] == [2, 1]
    assert next(finding.detector for finding in ran.of(Finding)) == "memory"
    assert [row["row"] for row in lost(ran)] == [row["row"] for row in lost(usual)]


def test_a_damaged_list_is_made_again(run_of: Make, tmp_path: Path) -> None:
    run = run_of()
    part = drive(run, tmp_path / "run", Asked({2: "stop"}))
    before = (part.folder / SCORES).read_text()
    (part.folder / SCORES).write_text(before[: len(before) // 2])
    rest = drive(run, tmp_path / "run", resume=True)
    assert rest.error is None
    assert (rest.folder / SCORES).read_text() == before


def test_a_base_that_knows_everything_leaves_nothing_to_train_on(
    run_of: Make, taught: tuple[Path, list[str]], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(PROMPTS, taught[1], strict=True)]
    usual = {"data": (str(write_jsonl(rows, "known.jsonl")),), "val_set_size": 0.0}
    ran = drive(run_of(perplexity_drop_most=1.0, **usual), tmp_path / "run")
    assert isinstance(ran.error, DataError)
    assert "the base knows every answer" in str(ran.error)
    one = drive(run_of(perplexity_drop_most=0.9, **usual), tmp_path / "one is left")
    assert one.error is None
    assert one.of(Prepared)[-1].train_rows == 1


def test_answers_that_are_all_short_are_told_and_not_scored(
    run_of: Make, write_jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Triage, "_score", never)
    data = write_jsonl([{"prompt": f"say {n}", "completion": "yes"} for n in range(12)], "short.jsonl")
    ran = drive(run_of(data=(str(data),)), tmp_path / "run")
    assert ran.error is None
    assert [note for note in ran.of(Prepared)[-1].notes if "fewer than 16 tokens" in note]


def test_scores_seen_before_the_run_are_those_of_the_run_which_does_not_score_again(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of()
    told: list[str] = []
    scored = scoring.score(run, say=lambda doing, done, total: told.append(doing))
    assert told[0] == "loading the libraries"
    assert "scoring the answers" in told
    monkeypatch.setattr(Triage, "_score", never)
    ran = drive(run, tmp_path / "run", machine=machine.look())
    assert ran.error is None
    after = ran.of(Prepared)[-1]
    assert scored.prepared == after
    assert scored.rows == ran.of(Prepared)[0].train_rows
    assert scored.gone(run) == len(lost(ran)) > 0
    assert [row for _, row in scored.found[: len(lost(ran))]] == [
        row["row"] for row in sorted(lost(ran), key=lambda row: row["perplexity"])
    ]
    named = ["data", run.data[0], "--model", run.model_name_or_path, "--perplexity"]
    for name in ("method", "max_length", "val_set_size", "per_device_train_batch_size", "perplexity_filter", "gradient_accumulation_steps"):
        named += ["--set", f"{name}={getattr(run, name)}"]
    named += ["--set", "gradient_checkpointing=false"]
    assert main([*named, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["prepared"]["train_rows"] == after.train_rows == document["perplexity"]["rows"] - document["perplexity"]["left_out"]
    assert document["prepared"]["tokens"] == after.tokens
    assert document["perplexity"]["applied"] is True
    assert document["perplexity"]["lowest"][0]["row"] in PLANTED
    assert document["perplexity"]["lowest"][0]["text"] in {*TEACH}
    assert sum(each["rows"] for each in document["perplexity"]["histogram"]) == document["perplexity"]["scored"]


def test_scoring_that_is_stopped_leaves_nothing(run_of: Make, home: Path) -> None:
    with pytest.raises(Stopped):
        scoring.score(run_of(), stopping=lambda: True)
    assert not list((home / "cache").glob("rows/*"))


def test_without_a_model_nobody_can_score(write_jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl([{"prompt": f"say {n}", "completion": "yes"} for n in range(12)], "short.jsonl")
    assert main(["data", str(data), "--perplexity"]) == 2
    assert "the base scores the answers, and no model is named" in capsys.readouterr().err
