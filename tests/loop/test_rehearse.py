"""The rehearsal: it measures the worst batch, leaves no trace, and turns what does not fit into leaner choices or a refusal."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_driver import CPU, Asked, Ran, drive
from safetensors.torch import load_file

from qlora_tui.engine import measured, planner, rehearse, report
from qlora_tui.engine.batches import longest
from qlora_tui.engine.data import load as load_data
from qlora_tui.engine.data import load_tokenizer, prepare
from qlora_tui.engine.errors import WontFit
from qlora_tui.engine.events import Evaluated, Event, Finding, Phase, Planned, Record, Stepped
from qlora_tui.engine.fast import eightbit
from qlora_tui.engine.journal import Journal, read_records
from qlora_tui.engine.load import Loaded, load, trainable
from qlora_tui.engine.meter import Meter
from qlora_tui.engine.models import from_folder
from qlora_tui.engine.spec import RunConfig, rows_per_step
from qlora_tui.engine.train import choices, step
from qlora_tui.engine.train.optim import build_optimizer, flatten

Make = Callable[..., RunConfig]
Bits = dict[str, torch.Tensor]


def adapter(ran: Ran) -> Bits:
    return load_file(ran.folder / "adapter" / "adapter_model.safetensors")


def same_bits(left: Bits, right: Bits) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def probes(ran: Ran) -> list[Phase]:
    return [event for event in ran.of(Phase) if event.name == "probe"]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("values", [{"gradient_checkpointing": "1", "method": "qlora", "lora_r": 64}, {"loraplus_lr_ratio": 16.0}], ids=str)
def test_a_run_with_a_rehearsal_is_the_run_without(run_of: Make, tmp_path: Path, optim: str, values: dict[str, Any]) -> None:
    run = run_of(optim=optim, lora_dropout=0.1, eval_steps=3, weight_decay=0.1, **values)
    plain = drive(run, tmp_path / "plain")
    rehearsed = drive(run, tmp_path / "rehearsed", rehearse=True)
    assert rehearsed.error is None
    assert [event.state for event in probes(rehearsed)] == ["begin", "progress", "progress", "progress", "end"]
    assert probes(plain) == []
    assert rehearsed.losses == plain.losses
    assert same_bits(adapter(rehearsed), adapter(plain))
    assert [event.loss for event in rehearsed.of(Evaluated)] == [event.loss for event in plain.of(Evaluated)]
    states = [load_file(ran.folder / "checkpoints/step-000006/optimizer.safetensors") for ran in (rehearsed, plain)]
    assert same_bits(*states)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_a_resume_rehearses_and_goes_on_to_the_same_bits(run_of: Make, tmp_path: Path, optim: str) -> None:
    run = run_of(optim=optim, lora_dropout=0.1)
    whole = drive(run, tmp_path / "whole")
    drive(run, tmp_path / "part", Asked({3: "stop"}), rehearse=True)
    rest = drive(run, tmp_path / "part", resume=True, rehearse=True)
    assert probes(rest)[-1].state == "end"
    assert same_bits(adapter(rest), adapter(whole))


def test_the_rehearsal_comes_before_the_base_is_measured_and_can_be_switched_off(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(max_steps=1), tmp_path / "on", rehearse=True)
    names = [event.name for event in ran.of(Phase) if event.state == "begin"]
    assert names[:6] == ["data", "plan", "load", "probe", "save", "eval"]  # saved on trial, and nothing to keep
    assert probes(drive(run_of(max_steps=1, rehearsal=False), tmp_path / "off", rehearse=True)) == []


def test_measured_stands_beside_predicted_for_every_phase(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(max_steps=2), tmp_path / "run", rehearse=True)
    ends = {event.name: event for event in ran.of(Phase) if event.state == "end" and event.peak_bytes}
    assert set(ends) == {"load", "probe", "eval", "train", "save"}
    predicted = {phase["name"]: phase["bytes"] for phase in ran.of(Planned)[0].budget["phases"]}
    assert {name: ends[name].predicted_bytes for name in ("load", "train", "eval", "save")} == predicted
    assert ends["probe"].predicted_bytes == predicted["train"]


def test_what_was_measured_is_remembered(run_of: Make, tmp_path: Path) -> None:
    run = run_of(max_steps=6)
    for number in range(2):
        drive(run, tmp_path / str(number), rehearse=True)
    correction = measured.correction(CPU.name, measured.versions())
    assert correction is not None
    assert correction.runs == 2
    (points,) = measured.all_steps(CPU.name).values()
    assert {point.rows for point in points} == {2}
    assert all(0 < point.seconds_per_token < 60 for point in points)


@pytest.fixture
def loaded(run_of: Make) -> Loaded:
    """Rank 64, so that some adapter tensors have the 4,096 elements from which bitsandbytes keeps their state in 8 bits."""
    run = run_of(method="qlora", gradient_checkpointing="1", lora_dropout=0.1, lora_r=64)
    return load(run, Path(run.model_name_or_path), CPU)


@pytest.fixture
def rows(run_of: Make) -> Any:
    run = run_of()
    return prepare(run, load_data(run), load_tokenizer(Path(run.model_name_or_path)))


def cast_of(loaded: Loaded, rows: Any, optim: str, **changes: Any) -> rehearse.Cast:
    run = dataclasses.replace(RunConfig(), optim=optim)
    flat = flatten(run, trainable(loaded.model), loaded.device)
    gradient = step.Gradient(loaded, flat, step.Halving("training", 2, loaded.device, WontFit), 0, step.Thrash(loaded.device))
    usual: dict[str, Any] = {
        "train_rows": rows.train,
        "eval_rows": rows.holdout,
        "add": gradient.add,
        "clear": gradient.clear,
        "rows_at_once": 2,
        "repeats": 2,
        "chunk": 0,
        "excursion": contextlib.nullcontext,
        "beside": contextlib.nullcontext,
        "warm": 1,
        "poll": lambda: None,
    }
    return rehearse.Cast(loaded=loaded, optimizer=build_optimizer(run, flat, loaded.device), **{**usual, **changes})


def through(cast: rehearse.Cast) -> tuple[list[Phase], rehearse.Rehearsed]:
    work, events = rehearse.rehearse(cast, Meter(cast.loaded.device, CPU)), []
    try:
        while True:
            events.append(next(work))
    except StopIteration as end:
        return events, end.value


def test_the_longest_rows_go_through_and_a_step_is_really_taken(loaded: Loaded, rows: Any) -> None:
    seen: list[tuple[tuple[int, ...], int]] = []
    cast = cast_of(loaded, rows, "adamw_torch")
    real, stepped, moved = cast.add, cast.optimizer.step, []

    def add(part: Any, supervised: int) -> object:
        seen.append((tuple(row.row for row in part), supervised))
        return real(part, supervised)

    before = [parameter.clone() for parameter in trainable(loaded.model).values()]

    def step_once(*_: Any) -> None:
        stepped()
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, trainable(loaded.model).values(), strict=True)))

    cast.optimizer.step = step_once  # type: ignore[method-assign]
    _, found = through(dataclasses.replace(cast, add=add))
    expected = tuple(row.row for row in longest(rows.train, 2))
    assert {part for part, _ in seen} == {expected}
    assert len(seen) == 3
    assert moved == [True, True]
    assert found.peaks["train"] > 0
    assert found.peaks["eval"] > 0
    assert found.tokens == sum(len(row.input_ids) for row in longest(rows.train, 2))
    assert set(found.seconds) == {"train", "optimizer", "eval"}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_everything_is_put_back_even_when_memory_runs_out(loaded: Loaded, rows: Any, optim: str, fails_at: int) -> None:
    cast = cast_of(loaded, rows, optim)
    real, calls = cast.add, []

    def add(part: Any, supervised: int) -> object:
        calls.append(1)
        done = real(part, supervised)
        if len(calls) == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return done

    before = {name: parameter.clone() for name, parameter in trainable(loaded.model).items()}
    python, numbers = random.getstate(), torch.get_rng_state()
    with pytest.raises(torch.OutOfMemoryError):
        through(dataclasses.replace(cast, add=add))
    assert same_bits(before, {name: parameter.detach() for name, parameter in trainable(loaded.model).items()})
    assert all(parameter.grad is None for parameter in trainable(loaded.model).values())
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), numbers)
    for state in cast.optimizer.state.values():
        assert int(state["step"]) == 0
        assert not any(part.any() for name, part in state.items() if isinstance(part, torch.Tensor) and not name.startswith("qmap"))


def test_the_state_is_emptied_in_place_and_the_quantization_maps_stay(loaded: Loaded, rows: Any) -> None:
    cast = cast_of(loaded, rows, "adamw_8bit")
    optimizer = cast.optimizer
    cast.add(rows.train[:2], 1)
    optimizer.step()
    wide = [state for state in optimizer.state.values() if "qmap1" in state]
    held = [(state["state1"], state["qmap1"].clone()) for state in wide]
    assert held
    assert all(codes.any() for codes, _ in held)
    rehearse.reset_optimizer(optimizer)
    for state, (codes, qmap) in zip(wide, held, strict=True):
        assert state["state1"] is codes
        assert torch.equal(state["qmap1"], qmap)
        assert qmap.any()
        assert state["step"] == 0
        assert not any(state[name].any() for name in ("state1", "state2", "absmax1", "absmax2"))


def test_state_that_was_only_half_made_is_dropped() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}
    rehearse.reset_optimizer(optimizer)
    assert parameter not in optimizer.state
    optimizer.state[parameter] = {"step": 1, "state1": torch.ones(3, dtype=torch.uint8), "state2": torch.ones(3, dtype=torch.uint8)}
    rehearse.reset_optimizer(optimizer)
    assert parameter not in optimizer.state


@pytest.fixture
def few_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that fills a card takes a processor minutes."""
    monkeypatch.setattr(rehearse, "_WIDE", (64, 64, 128))


@pytest.mark.usefixtures("few_operations")
def test_the_pieces_are_measured_and_leave_no_trace(loaded: Loaded, run_of: Make) -> None:
    numbers = torch.get_rng_state()
    speed = rehearse.pieces(loaded, from_folder(Path(run_of().model_name_or_path)), run_of(), CPU)
    assert speed is not None
    assert min(dataclasses.astuple(speed)[:4]) > 0
    assert (speed.fp8_share, speed.int8_share) == (0, 0)  # this machine has no such products
    assert all(parameter.grad is None for parameter in trainable(loaded.model).values())
    assert torch.equal(torch.get_rng_state(), numbers)


@pytest.mark.usefixtures("few_operations")
def test_where_not_even_the_pieces_fit_nothing_is_measured(loaded: Loaded, run_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rehearse, "_bandwidth", full)
    assert rehearse.pieces(loaded, from_folder(Path(run_of().model_name_or_path)), run_of(), CPU) is None


@pytest.mark.usefixtures("few_operations")
def test_products_in_8_bits_are_timed_where_a_card_makes_them_and_in_its_own_type(
    loaded: Loaded, run_of: Make, narrow_on_cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = set[torch.dtype]()
    real = eightbit.narrow_product

    def product(rows: eightbit.Rows, turned: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        types.add(dtype)
        return real(rows, turned, dtype)

    spec, card = from_folder(Path(run_of().model_name_or_path)), dataclasses.replace(CPU, kind="cuda", bf16=True)
    monkeypatch.setattr(eightbit, "narrow_product", product)
    speed = rehearse.pieces(loaded, spec, run_of(dtype="float32"), card)
    assert speed is not None
    assert dataclasses.asdict(speed)[f"{narrow_on_cpu}_share"] > 0
    assert types == {torch.bfloat16}  # a run in 32 bits says nothing about the card in 16

    def refused(*given: Any) -> Any:
        raise RuntimeError("no such product")

    monkeypatch.setattr(eightbit, "narrow_product", refused)
    speed = rehearse.pieces(loaded, spec, run_of(), card)
    assert speed is not None
    assert dataclasses.asdict(speed)[f"{narrow_on_cpu}_share"] > 1000  # so that no planner takes it


def fail_while(monkeypatch: pytest.MonkeyPatch, too_large: Callable[[step.Gradient], bool]) -> list[int]:
    """Make the gradient run out of memory as long as `too_large` says so; returns the rows at once of each attempt."""
    attempts: list[int] = []
    real = step.Gradient.add

    def add(self: step.Gradient, rows: Any, supervised: int, first: Any = None) -> Any:
        attempts.append(self.halving.rows)
        if too_large(self):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, rows, supervised, first)

    monkeypatch.setattr(step.Gradient, "add", add)
    return attempts


ONE_ROW = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": "true"}
OPEN = {"per_device_train_batch_size": 0, "gradient_accumulation_steps": 4, "gradient_checkpointing": "auto"}


def test_what_does_not_fit_becomes_leaner_where_that_was_left_open(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card: recomputing is tried first, then fewer rows at once; on a CPU the planner itself keeps the rows."""
    run, real = run_of(**OPEN), planner.choose
    leaner = [dict.fromkeys(["gradient_checkpointing"], "true"), ONE_ROW]

    def with_a_ladder(model: Any, asked: RunConfig, machine: Any, **more: Any) -> planner.Plan:
        plan = real(model, asked, machine, **more)
        return dataclasses.replace(plan, fallbacks=tuple(dataclasses.replace(plan.run, **values) for values in leaner))

    monkeypatch.setattr(planner, "choose", with_a_ladder)
    attempts = fail_while(monkeypatch, lambda gradient: gradient.halving.rows > 1)
    ran = drive(run, tmp_path / "run", rehearse=True)
    assert ran.error is None
    assert attempts[:3] == [4, 4, 1]
    plans = [(plan.choices["per_device_train_batch_size"], plan.choices["gradient_checkpointing"]) for plan in ran.of(Planned)]
    assert plans == [(4, "false"), (4, "true"), (1, "true")]
    assert ran.of(Planned)[-1].choices["gradient_accumulation_steps"] == 4
    findings = [finding for finding in ran.of(Finding) if finding.detector == "memory"]
    assert "gradient_checkpointing false -> true" in findings[0].message
    assert "per_device_train_batch_size 4 -> 1, gradient_accumulation_steps 1 -> 4" in findings[1].message
    assert [event.state for event in probes(ran)].count("end") == 3
    monkeypatch.undo()
    alone = drive(dataclasses.replace(run, **ONE_ROW), tmp_path / "alone")
    assert ran.losses == alone.losses


def test_a_value_fixed_by_hand_is_not_changed_but_refused_with_fixes(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_while(monkeypatch, lambda gradient: True)
    ran = drive(run_of(gradient_checkpointing="false", per_device_train_batch_size=4), tmp_path / "run", rehearse=True)
    assert isinstance(ran.error, WontFit)
    assert "rehearsal" in str(ran.error)
    assert "--set per_device_train_batch_size=" in str(ran.error)
    assert len(ran.of(Planned)) == 1
    assert ran.of(Stepped) == []
    assert ran.of(Evaluated) == []


def test_more_than_is_free_is_refused_even_if_it_could_be_had(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices.Choices, "hopeless", False)  # as where the estimate was too low
    tiny = dataclasses.replace(CPU, total_bytes=50 << 20)
    ran = drive(run_of(**OPEN), tmp_path / "run", rehearse=True, machine=tiny)
    assert isinstance(ran.error, WontFit)
    assert "are free" in str(ran.error)


def test_a_stop_during_the_rehearsal_is_obeyed(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(), tmp_path / "run", Asked({0: "stop"}), rehearse=True)
    assert ran.result is not None
    assert ran.result.outcome == "stopped"


def journalled(run: RunConfig, folder: Path, asked: Asked | None = None, **more: Any) -> Ran:
    """Drive a run and write what it said into its journal, as the session does; a resume reads it there."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder)
    ran = drive(run, folder, asked, **more)
    for event in ran.events:
        journal.write(event)
    journal.close()
    return ran


def test_a_resume_keeps_the_first_choices_whatever_is_chosen_now(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(**OPEN)
    whole = drive(run, tmp_path / "whole")
    journalled(run, tmp_path / "part", Asked({3: "stop"}))
    real = planner.choose

    def otherwise(model: Any, asked: RunConfig, machine: Any, **more: Any) -> planner.Plan:
        if not asked.per_device_train_batch_size:
            asked = dataclasses.replace(asked, per_device_train_batch_size=1)
        return real(model, asked, machine, **more)

    monkeypatch.setattr(planner, "choose", otherwise)
    other = drive(run, tmp_path / "other")
    rest = journalled(run, tmp_path / "part", resume=True)
    assert other.losses != whole.losses
    assert rest.of(Planned)[0].choices == whole.of(Planned)[0].choices
    assert same_bits(adapter(rest), adapter(whole))
    assert [record.event.choices for record in read_records(tmp_path / "part/events.jsonl") if isinstance(record.event, Planned)] == [
        whole.of(Planned)[0].choices
    ] * 2


def told(**chosen: Any) -> list[Record]:
    return [Record(1, 1, time.time(), Planned({}, chosen))]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, (2, 2)),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}, (0, 4)),
        ({"per_device_train_batch_size": "2", "gradient_accumulation_steps": 2}, (0, 4)),
        ({"optim": "adamw_torch"}, (0, 4)),
    ],
    ids=["kept", "another number of rows a step", "damaged", "an older journal"],
)
def test_rows_at_once_are_kept_only_if_a_step_keeps_its_rows(run_of: Make, chosen: dict[str, Any], expected: tuple[int, int]) -> None:
    run = run_of(**OPEN)
    kept = choices.as_before(run, told(**chosen))
    assert (kept.per_device_train_batch_size, kept.gradient_accumulation_steps) == expected
    assert rows_per_step(kept) == rows_per_step(run)


def test_the_last_choice_counts_and_a_fixed_value_stays(run_of: Make) -> None:
    run = run_of(gradient_checkpointing="auto", optim="adamw_8bit")
    past = told(gradient_checkpointing="2", optim="adamw_torch") + told(gradient_checkpointing="1", method="qlora")
    kept = choices.as_before(run, past)
    assert (kept.gradient_checkpointing, kept.optim, kept.method) == ("1", "adamw_8bit", "lora")
    assert choices.as_before(run, []) == run


def test_times_are_grouped_by_length_without_the_first_steps() -> None:
    timed = [(100, 2, 900.0), (100, 2, 900.0), *[(200, 2, 1.0)] * 4, *[(2000, 2, 20.0)] * 4]
    found = choices.points(timed)
    assert (found[0], found[-1]) == ((100, 0.005), (1000, 0.01))
    assert choices.points(timed[:2]) == []


def test_events_tell_of_a_second_plan() -> None:
    event: Event = Planned({}, {}, why="it fits", seconds_per_token=0.5)
    assert (event.why, event.seconds_per_token) == ("it fits", 0.5)


def test_the_report_sets_measured_beside_predicted(tmp_path: Path) -> None:
    ends = [Phase("load", "end", peak_bytes=2 << 30, predicted_bytes=1 << 30), Phase("probe", "end", peak_bytes=3 << 30)]
    ends += [Phase("eval", "end", peak_bytes=peak << 30, predicted_bytes=4 << 30) for peak in (1, 4, 2)]
    told = report.render(report.see([Record(1, number, 1.0, event) for number, event in enumerate(ends)]), tmp_path)
    rows = [line for line in told.splitlines() if line.startswith("| ") and "GiB" in line]
    assert rows == [
        "| load | 1.0 GiB | 2.0 GiB | +100.0% |",
        "| rehearsal |  | 3.0 GiB |  |",
        "| measure held-out rows | 4.0 GiB | 4.0 GiB | +0.0% |",
    ]


def test_a_hopeless_run_is_refused_before_anything_is_loaded(run_of: Make, tmp_path: Path) -> None:
    small = dataclasses.replace(CPU, total_bytes=256 << 20)
    ran = drive(run_of(), tmp_path / "run", machine=small)
    assert isinstance(ran.error, WontFit)
    assert "this run needs about" in str(ran.error)
    assert ran.of(Planned)
    assert not [phase for phase in ran.of(Phase) if phase.name == "load"]
