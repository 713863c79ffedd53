"""The loop's promises: one trajectory for every split, exact resume, no non-finite step, wishes between steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import write_model, write_tokenizer
from loop_driver import Asked, Ran, drive
from safetensors.torch import load_file

from qlora_tui.engine.errors import CheckpointError, ConfigErrors, Diverged, ModelError
from qlora_tui.engine.events import Evaluated, Event, Finding, Phase, Planned, Prepared, Resumed, Saved, Stepped
from qlora_tui.engine.load import Loaded
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train import loop
from qlora_tui.engine.train.fence import Fence

Make = Callable[..., RunConfig]


def adapter(ran: Ran) -> dict[str, torch.Tensor]:
    return load_file(ran.folder / "adapter" / "adapter_model.safetensors")


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_says_everything_in_order_and_learns(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(max_steps=12, eval_steps=6, save_steps=5), tmp_path / "run")
    assert ran.error is None
    assert ran.result is not None
    assert ran.result.outcome == "done"
    order = [event.type for event in ran.events if not (isinstance(event, Phase) and event.state == "progress")]
    assert order.index("prepared") < order.index("planned") < order.index("evaluated") < order.index("stepped") < order.index("saved")
    (prepared,), (planned,) = ran.of(Prepared), ran.of(Planned)
    assert (prepared.train_rows, prepared.holdout_rows, prepared.total_steps) == (36, 4, 12)
    assert planned.choices["optim"] == "adamw_torch"
    assert [event.step for event in ran.of(Evaluated)] == [0, 6, 12]
    last = ran.of(Evaluated)[-1]
    assert last.base_loss == ran.of(Evaluated)[0].loss
    assert last.drop > 0.5
    assert "measurable improvement" in last.verdict
    assert [event.step for event in ran.of(Saved) if event.kind == "checkpoint"] == [5, 6, 10, 12]  # 6: the best measurement so far
    assert sum(step.tokens for step in ran.of(Stepped)) > 0


@pytest.mark.parametrize(("micro", "accumulate"), [(2, 2), (1, 4)])
def test_any_split_of_a_step_is_one_trajectory(run_of: Make, tmp_path: Path, micro: int, accumulate: int) -> None:
    usual = {"max_steps": 20, "learning_rate": 2e-3}
    whole = drive(run_of(per_device_train_batch_size=4, gradient_accumulation_steps=1, **usual), tmp_path / "whole")
    split = drive(run_of(per_device_train_batch_size=micro, gradient_accumulation_steps=accumulate, **usual), tmp_path / "split")
    assert [step.rows for step in whole.of(Stepped)] == [step.rows for step in split.of(Stepped)]
    assert len(set(whole.losses)) == 20
    assert max(abs(a - b) for a, b in zip(whole.losses, split.losses, strict=True)) < 2e-6
    assert abs(sum(a - b for a, b in zip(whole.losses, split.losses, strict=True))) / 20 < 1e-6


def test_a_step_has_the_gradient_of_one_whole_batch(run_of: Make, tmp_path: Path) -> None:
    """The first loss equals what transformers itself computes for the rows of that step, weighed by tokens."""
    from transformers import AutoModelForCausalLM

    run = run_of(max_steps=1)
    ran = drive(run, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(run.model_name_or_path, dtype=torch.float32)
    from qlora_tui.engine.data import load as load_data
    from qlora_tui.engine.data import load_tokenizer, prepare

    rows = {row.row: row for row in prepare(run, load_data(run), load_tokenizer(Path(run.model_name_or_path))).train}
    nll, tokens = 0.0, 0
    for number in ran.of(Stepped)[0].rows:
        ids = torch.tensor(list(rows[number].input_ids))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        kept = torch.tensor(list(rows[number].trained), dtype=torch.bool)[1:]
        nll += float(torch.nn.functional.cross_entropy(logits[:-1][kept], ids[1:][kept], reduction="sum"))
        tokens += int(kept.sum())
    assert ran.losses[0] == pytest.approx(nll / tokens, abs=2e-6)
    assert ran.of(Stepped)[0].supervised_tokens == tokens


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_same_seed_same_bits_and_another_seed_another_adapter(run_of: Make, tmp_path: Path, method: str) -> None:
    first, second, other = (drive(run_of(method=method, seed=seed), tmp_path / str(index)) for index, seed in enumerate((1, 1, 2)))
    assert same_bits(adapter(first), adapter(second))
    assert not same_bits(adapter(first), adapter(other))


@pytest.mark.parametrize("cut", [1, 4, 9, 10, 11])
def test_stop_and_resume_is_the_uninterrupted_run(run_of: Make, tmp_path: Path, cut: int) -> None:
    """36 rows, 4 a step: step 9 ends the first epoch, so the cuts lie before, at and after its edge; dropout uses the RNG."""
    run = run_of(max_steps=13, lora_dropout=0.1, eval_steps=5)
    whole = drive(run, tmp_path / "whole")
    part = drive(run, tmp_path / "part", Asked({cut: "stop"}))
    assert part.result is not None
    assert part.result.outcome == "stopped"
    rest = drive(run, tmp_path / "part", resume=True)
    assert rest.of(Resumed)[0].to_step == cut
    assert part.losses + rest.losses == whole.losses
    assert same_bits(adapter(rest), adapter(whole))
    assert rest.of(Evaluated)[-1].loss == whole.of(Evaluated)[-1].loss


def test_measuring_more_often_trains_the_same_adapter(run_of: Make, tmp_path: Path) -> None:
    seldom = drive(run_of(lora_dropout=0.2, eval_steps=100, save_steps=100), tmp_path / "seldom")
    often = drive(run_of(lora_dropout=0.2, eval_steps=1, save_steps=1), tmp_path / "often")
    assert len(often.of(Evaluated)) > len(seldom.of(Evaluated))
    assert same_bits(adapter(seldom), adapter(often))


def test_checkpointing_gives_the_same_losses(run_of: Make, tmp_path: Path) -> None:
    kept = drive(run_of(lora_dropout=0.1), tmp_path / "kept")
    recomputed = drive(run_of(lora_dropout=0.1, gradient_checkpointing="true"), tmp_path / "recomputed")
    assert recomputed.error is None
    assert recomputed.losses == pytest.approx(kept.losses, abs=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_bases_learn(run_of: Make, tmp_path: Path, kind: str) -> None:
    ran = drive(run_of(method="qlora", bnb_4bit_quant_type=kind, max_steps=12), tmp_path / "run")
    assert ran.error is None
    assert ran.losses[-1] < ran.losses[0] - 0.3


def test_the_eight_bit_optimizer_on_a_cpu(run_of: Make, tmp_path: Path) -> None:
    run = run_of(optim="adamw_8bit", max_steps=6)
    whole = drive(run, tmp_path / "whole")
    assert whole.error is None
    assert whole.losses[-1] < whole.losses[0]
    drive(run, tmp_path / "part", Asked({3: "stop"}))
    rest = drive(run, tmp_path / "part", resume=True)
    assert same_bits(adapter(rest), adapter(whole))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_warms_up_and_falls(run_of: Make, tmp_path: Path, schedule: str) -> None:
    ran = drive(run_of(lr_scheduler_type=schedule, warmup_steps=2, max_steps=6, learning_rate=1e-3), tmp_path / "run")
    rates = [step.lr for step in ran.of(Stepped)]
    assert rates[:2] == pytest.approx([5e-4, 1e-3])
    assert rates[2] == pytest.approx(1e-3)
    falls = {"cosine": 1e-3 * 0.5 * (1 + math.cos(math.pi * 3 / 4)), "linear": 2.5e-4, "constant": 1e-3}
    assert rates[-1] == pytest.approx(falls[schedule])


def test_a_non_finite_step_is_never_applied_and_three_end_the_run(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.gradient_norm
    seen: list[int] = []

    def poisoned(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        seen.append(1)
        return torch.tensor(math.nan) if len(seen) > 3 else real(parameters)

    monkeypatch.setattr(loop, "gradient_norm", poisoned)
    ran = drive(run_of(max_steps=10, save_steps=3), tmp_path / "run")
    assert isinstance(ran.error, Diverged)
    assert [step.skipped for step in ran.of(Stepped)] == [False] * 3 + [True] * 3
    assert [finding.severity for finding in ran.of(Finding) if finding.detector == "non_finite"] == ["warn", "warn", "stop"]
    good = load_file(ran.folder / "checkpoints/step-000003/adapter_model.safetensors")
    diagnostic = load_file(ran.folder / "checkpoints/diagnostic-000006/adapter_model.safetensors")
    assert same_bits(good, diagnostic)


def test_the_first_batch_of_a_step_is_made_before_anybody_waits_for_the_one_before(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, batch, norm, check = list[str](), Loaded.batch, loop.gradient_norm, Fence.before_step

    def telling(word: str, real: Callable[..., object]) -> Callable[..., object]:
        return lambda *given: (said.append(word), real(*given))[1]

    monkeypatch.setattr(Loaded, "batch", telling("batch", batch))
    monkeypatch.setattr(loop, "gradient_norm", telling("norm", norm))
    monkeypatch.setattr(Fence, "before_step", telling("update", check))
    ran = drive(run_of(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, eval_steps=100), tmp_path / "run")
    assert ran.error is None
    assert said[said.index("norm") - 2 :][:12] == [
        "batch",
        "batch",
        "norm",
        "batch",
        "update",
        *["batch", "norm", "batch", "update"],
        *["batch", "norm", "update"],
    ]


def test_a_poisoned_gradient_does_not_reach_the_weights(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.Loop._backward

    def poisoned(self: loop.Loop, rows: list[object], supervised: int) -> tuple[torch.Tensor, float]:
        found = real(self, rows, supervised)  # type: ignore[arg-type]
        if self.step == 2:
            self.fence.trained[0].grad[0, 0] = math.nan  # type: ignore[index]
        return found

    monkeypatch.setattr(loop.Loop, "_backward", poisoned)
    ran = drive(run_of(max_steps=5), tmp_path / "run")
    assert [step.skipped for step in ran.of(Stepped)] == [False, False, True, False, False]
    assert all(torch.isfinite(part).all() for part in adapter(ran).values())


def test_abort_keeps_the_last_checkpoint_and_saves_no_more(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(max_steps=10, save_steps=2), tmp_path / "run", Asked({5: "abort"}))
    assert ran.result is not None
    assert ran.result.outcome == "aborted"
    assert [event.step for event in ran.of(Saved)] == [2, 4]
    assert not (ran.folder / "adapter").exists()


def test_a_wish_to_save_is_obeyed_between_steps(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(max_steps=6, save_steps=100, eval_steps=100), tmp_path / "run", Asked({3: "save"}))
    assert [event.step for event in ran.of(Saved) if event.kind == "checkpoint"] == [3, 6]


def test_what_was_done_to_the_data_is_told(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(val_set_size=100, max_steps=1), tmp_path / "run")
    (prepared,) = ran.of(Prepared)
    assert [note for note in prepared.notes if "so that one is left to train" in note]


def test_tokens_beyond_the_model_are_refused_before_it_is_loaded(run_of: Make, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_model(folder, vocab_size=256, bos_token_id=0, eos_token_id=0)  # the four special tokens have ids from 256 on
    write_tokenizer(folder)
    ran = drive(run_of(model_name_or_path=str(folder)), tmp_path / "run")
    assert isinstance(ran.error, ModelError)
    assert "they do not belong together" in str(ran.error)
    assert not [event for event in ran.of(Phase) if event.name == "load"]


def test_a_stop_before_the_first_step_says_so(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(), tmp_path / "run", Asked({0: "stop"}))
    assert ran.result is not None
    assert ran.result.outcome == "stopped"
    assert "nothing to save" in ran.result.reason
    assert not (ran.folder / "adapter").exists()


@pytest.mark.parametrize("after", ["adapter", "measured"])
def test_a_stop_of_the_last_measurement_is_said_and_what_makes_up_for_it(run_of: Make, tmp_path: Path, after: str) -> None:
    asked = Asked()

    def stop(event: Event) -> None:
        found = (
            (isinstance(event, Saved) and event.kind == "adapter") if after == "adapter" else isinstance(event, Evaluated) and event.step
        )
        if found:
            asked.at_step[0] = "stop"

    ran = drive(run_of(max_steps=4, eval_steps=100), tmp_path / "run", asked, on_event=stop)
    assert ran.result is not None
    assert (ran.result.outcome, ran.result.adapter, (tmp_path / "run" / "adapter").is_dir()) == ("done", "adapter", True)
    assert [event.step for event in ran.of(Evaluated)] == ([0] if after == "adapter" else [0, 4])
    told = "; its last measurement was stopped: qlora-tui eval run makes up for it" if after == "adapter" else ""
    assert ran.result.reason == f"all 4 steps{told}"


def test_time_is_up_after_one_step_at_least_and_that_is_done(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(max_steps=1000, max_time=0.000001), tmp_path / "run")
    assert ran.result is not None
    assert (ran.result.outcome, ran.result.reason) == ("done", "time was up at step 1 of 1000")
    assert [event.step for event in ran.of(Saved)] == [1, 1]
    rest = drive(run_of(max_steps=1000, max_time=0.000001), tmp_path / "run", resume=True)
    assert [step.step for step in rest.of(Stepped)] == [2]


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(run_of: Make, tmp_path: Path, damage: str, name: str) -> None:
    run = run_of(max_steps=4, save_steps=2, eval_steps=100)
    drive(run, tmp_path / "run", Asked({4: "stop"}))
    file = tmp_path / "run/checkpoints/step-000004" / name
    content = bytearray(file.read_bytes())
    match damage:
        case "missing":
            file.unlink()
        case "cut":
            file.write_bytes(content[:-1])
        case _:
            content[-1] ^= 1
            file.write_bytes(content)
    rest = drive(run, tmp_path / "run", resume=True)
    assert rest.of(Resumed)[0].to_step == 2
    assert name in rest.of(Finding)[0].message


def test_a_run_with_no_sound_checkpoint_is_refused(run_of: Make, tmp_path: Path) -> None:
    run = run_of(max_steps=4, save_steps=4, eval_steps=100)
    drive(run, tmp_path / "run")
    (tmp_path / "run/checkpoints/step-000004/manifest.json").unlink()
    assert isinstance(drive(run, tmp_path / "run", resume=True).error, CheckpointError)


def test_a_checkpoint_of_another_rank_is_refused(run_of: Make, tmp_path: Path) -> None:
    drive(run_of(max_steps=2), tmp_path / "run")
    ran = drive(run_of(max_steps=4, lora_r=4), tmp_path / "run", resume=True)
    assert isinstance(ran.error, ConfigErrors)
    assert "lora_r: it was 16 when the run began" in str(ran.error)


def test_eval_rows_are_written_one_a_line(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(), tmp_path / "run")
    last = ran.of(Evaluated)[-1]
    rows = [json.loads(line) for line in (ran.folder / last.path).read_text().splitlines()]
    assert len(rows) == last.rows
    assert sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows) == pytest.approx(last.loss)


def test_the_adapter_loads_with_plain_peft_and_gives_the_tuned_loss(run_of: Make, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = run_of(max_steps=10)
    ran = drive(run, tmp_path / "run")
    from qlora_tui.engine.data import load as load_data
    from qlora_tui.engine.data import load_tokenizer, prepare

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(run.model_name_or_path, dtype=torch.float32), ran.folder / "adapter"
    )
    rows = prepare(run, load_data(run), load_tokenizer(Path(run.model_name_or_path))).holdout
    nll, tokens = 0.0, 0
    for row in rows:
        ids, kept = torch.tensor(list(row.input_ids)), torch.tensor(list(row.trained), dtype=torch.bool)[1:]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        nll += float(torch.nn.functional.cross_entropy(logits[kept], ids[1:][kept], reduction="sum"))
        tokens += int(kept.sum())
    assert nll / tokens == pytest.approx(ran.of(Evaluated)[-1].loss, abs=1e-4)
    assert (ran.folder / "adapter/tokenizer.json").exists()
