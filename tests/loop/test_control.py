"""Pause, samples and the learning rate while a run goes: obeyed between steps, and not one bit of the run changes by what should not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState
from loop_driver import Asked, Ran, drive
from safetensors.torch import load_file

from qlora_tui.engine.errors import CheckpointError
from qlora_tui.engine.events import Command, Evaluated, Event, Finding, Phase, Record, Sampled, Saved, Stepped, Wish
from qlora_tui.engine.journal import EVENTS, Journal, read_records
from qlora_tui.engine.meter import RandomState
from qlora_tui.engine.resume import rate_changes
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train import job, parking, samples
from qlora_tui.engine.train.limits import Limits

Make = Callable[..., RunConfig]
STEPS = 6
SETTINGS: dict[str, Any] = {"max_steps": STEPS, "lora_dropout": 0.1, "eval_steps": 2, "save_steps": 3}


def wish(name: str, number: int = 0, **args: Any) -> Wish:
    return Wish(f"{name} {number}", 0.0, 1, name, args)


def rate(factor: object, number: int = 0) -> Wish:
    return wish("set", number, key="learning_rate", factor=factor)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return everything a run leaves: the adapter, and optimizer and random numbers of its last checkpoint."""
    last = folder / f"checkpoints/step-{STEPS:06d}"
    found = {"adapter": folder / "adapter/adapter_model.safetensors", "optimizer": last / "optimizer.safetensors"}
    found["random"] = last / "random.safetensors"
    return {f"{part}.{name}": tensor for part, path in found.items() for name, tensor in load_file(path).items()}


def same_bits(one: Ran, two: Ran) -> bool:
    left, right = tensors(one.folder), tensors(two.folder)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def names(events: list[Event], phase: str) -> list[str]:
    return [event.state for event in events if isinstance(event, Phase) and event.name == phase]


def answers(ran: Ran) -> list[tuple[str, bool, str]]:
    return [(event.name, event.obeyed, event.why) for event in ran.of(Command)]


def waiting(monkeypatch: pytest.MonkeyPatch, asked: Asked, *then: Callable[[], object] | Wish | None) -> list[float]:
    """Let one of `then` happen at each look of a pause, in turn; the last wish goes on. Return the seconds waited."""
    waited: list[float] = []
    rest = itertools.chain(then, [None] * 3)

    def wait(seconds: float) -> None:
        waited.append(seconds)
        found = next(rest)  # a pause that nobody ends fails here
        if isinstance(found, Wish):
            asked.wishes.setdefault(0, []).append(found)
        elif found is not None:
            found()

    monkeypatch.setattr(job, "Limits", partial(Limits, wait=wait))
    return waited


@pytest.fixture
def parked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free the memory of this CPU as if it were a card's: every block that can be is copied away, shrunk to nothing and brought back."""
    monkeypatch.setattr(parking, "PARKED_FROM", ("cpu",))


@pytest.fixture
def quiet(run_of: Make, tmp_path: Path) -> Ran:
    """The same run, left alone."""
    return drive(run_of(**SETTINGS), tmp_path / "quiet")


def paused(run_of: Make, folder: Path, monkeypatch: pytest.MonkeyPatch, *steps: int, **more: Any) -> Ran:
    asked = Asked(wishes={step: [wish("pause", step)] for step in steps})
    waiting(monkeypatch, asked, *[part for step in steps for part in (None, wish("resume", step), None)])
    return drive(run_of(**SETTINGS, **more), folder, asked)


# pause


@pytest.mark.parametrize("steps", [(1,), (2,), (5,), (2, 4), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("where", ["kept", "ram", "disk"])
def test_a_paused_run_goes_on_to_the_bit(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: Ran, steps: tuple[int, ...], where: str
) -> None:
    """Two micro-batches a step, dropout, measurements and checkpoints on the way."""
    if where != "kept":
        monkeypatch.setattr(parking, "PARKED_FROM", ("cpu",))
    if where == "disk":
        monkeypatch.setattr(parking, "ram_bytes", lambda: (1, 1))
    ran = paused(run_of, tmp_path / "run", monkeypatch, *steps)
    assert ran.error is None
    assert names(ran.events, "pause") == ["begin", "end"] * len(steps)
    assert [name for name, obeyed, _ in answers(ran) if obeyed] == ["pause", "resume"] * len(steps)
    assert ran.losses == quiet.losses
    assert same_bits(ran, quiet)
    freed = [finding.numbers["freed_bytes"] > 0 for finding in ran.of(Finding) if finding.detector == "pause"]
    assert freed == [where != "kept"] * len(steps)
    assert not (ran.folder / parking.FOLDER).exists()


@pytest.mark.parametrize("values", [{"method": "qlora"}, {"use_dora": True, "lora_dropout": 0.0}, {"init_lora_weights": "pissa"}])
@pytest.mark.usefixtures("parked")
def test_every_kind_of_base_and_adapter_can_be_parked(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    settings = SETTINGS | values
    whole = drive(run_of(**settings), tmp_path / "quiet")
    asked = Asked(wishes={2: [wish("pause")]})
    waiting(monkeypatch, asked, wish("resume"))
    ran = drive(run_of(**settings), tmp_path / "run", asked)
    assert (whole.error, ran.error) == (None, None)
    assert same_bits(ran, whole)


@pytest.mark.usefixtures("parked")
def test_a_pause_frees_every_block_of_the_run_and_saves_before_it_does(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def look() -> None:
        parts = [*seen[0].loaded.model.parameters(), seen[0].loaded.head.weight_VH, *parking._tensors(seen[0].optimizer.state)]
        parts.append(seen[0].gradient.flat._gradients)
        storages = [part.untyped_storage() for part in parts]
        seen.append([storage.nbytes() for storage in storages if storage.resizable()])

    asked = Asked(wishes={1: [wish("pause")]})
    waiting(monkeypatch, asked, look, wish("resume"))
    real = job._loop
    monkeypatch.setattr(job, "_loop", lambda *args: seen.append(real(*args)) or seen[0])
    ran = drive(run_of(**SETTINGS), tmp_path / "run", asked)
    assert ran.error is None
    assert len(seen[1]) > 10
    assert set(seen[1]) == {0}
    order = [event.type if not isinstance(event, Phase) else f"{event.name} {event.state}" for event in ran.events]
    assert order.index("pause begin") < order.index("saved") < order.index("pause end")
    assert [event.step for event in ran.of(Saved) if event.kind == "checkpoint"] == [1, 2, 3, 4, 6]  # 2 and 4 are the best measured so far


@pytest.mark.usefixtures("parked")
@pytest.mark.parametrize(("name", "outcome"), [("stop", "stopped"), ("abort", "aborted")])
@pytest.mark.parametrize("disk", [False, True])
def test_a_pause_ends_with_the_run_and_saves_nothing_twice(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: Ran, name: str, outcome: str, disk: bool
) -> None:
    """As SIGTERM does: the run exits from the pause, without its tensors on the device, and resumes to the same bits."""
    if disk:
        monkeypatch.setattr(parking, "ram_bytes", lambda: (1, 1))
    asked = Asked(wishes={3: [wish("pause")]})
    waiting(monkeypatch, asked, None, lambda: asked.at_step.update({0: name}))
    ran = drive(run_of(**SETTINGS), tmp_path / "run", asked)
    assert ran.error is None
    assert ran.result is not None
    assert ran.result.outcome == outcome
    assert [event.step for event in ran.of(Saved) if event.kind == "checkpoint"] == [2, 3]
    assert (ran.folder / "adapter").exists() is (name == "stop")
    assert not (ran.folder / parking.FOLDER).exists()
    rest = drive(run_of(**SETTINGS), tmp_path / "run", resume=True)
    assert ran.losses + rest.losses == quiet.losses
    assert same_bits(rest, quiet)


@pytest.mark.usefixtures("parked")
def test_a_stop_in_a_pause_leaves_the_adapter_of_its_step(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = drive(run_of(**SETTINGS), tmp_path / "plain", Asked({3: "stop"}))
    asked = Asked(wishes={3: [wish("pause")]})
    waiting(monkeypatch, asked, lambda: asked.at_step.update({0: "stop"}))
    ran = drive(run_of(**SETTINGS), tmp_path / "run", asked)
    one, two = (load_file(run.folder / "adapter/adapter_model.safetensors") for run in (plain, ran))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.usefixtures("parked")
def test_what_is_saved_reads_nothing_of_a_quantized_base(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card has no bytes behind a block that a pause freed: whoever asks each 4-bit layer for its constants fails there."""
    read: list[bool] = []
    monkeypatch.setattr(QuantState, "as_dict", lambda *_, **__: read.append(True))
    asked = Asked(wishes={3: [wish("pause")]})
    waiting(monkeypatch, asked, wish("save"), lambda: asked.at_step.update({0: "stop"}))
    ran = drive(run_of(**SETTINGS, method="qlora"), tmp_path / "run", asked)
    assert ran.error is None
    assert (ran.folder / "adapter").exists()
    assert not read


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.usefixtures("parked")
def test_a_block_that_does_not_come_back_shows(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: Ran, kept: bool
) -> None:
    """The mutant: one block of the optimizer's state is zeros after a pause. Without this the tests above show nothing."""
    real = parking.Parked.back

    def back(self: parking.Parked) -> bool:
        found = real(self)
        moments = [tensor for tensor in self._small if not tensor.requires_grad and tensor.numel() > 1]
        moments[0].zero_() if not kept else None
        return found

    monkeypatch.setattr(parking.Parked, "back", back)
    ran = paused(run_of, tmp_path / "run", monkeypatch, 2)
    assert ran.error is None
    assert same_bits(ran, quiet) is kept


@pytest.mark.usefixtures("parked")
def test_memory_that_others_took_is_waited_for_and_said_once(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: Ran
) -> None:
    lacking = [5 << 30]
    monkeypatch.setattr(parking.Parked, "lacking", lambda _: lacking[0])
    asked = Asked(wishes={2: [wish("pause")]})
    waiting(monkeypatch, asked, wish("resume"), None, None, wish("resume", 2), lambda: lacking.__setitem__(0, 0), None)
    ran = drive(run_of(**SETTINGS), tmp_path / "run", asked)
    (told,) = [finding for finding in ran.of(Finding) if "still paused" in finding.message]
    assert (told.severity, told.step) == ("warn", 2)
    assert "5.0 GiB lack" in told.message
    assert answers(ran)[-1] == ("resume", False, "it goes on as soon as the device has room")
    assert same_bits(ran, quiet)


@pytest.mark.usefixtures("parked")
def test_a_device_that_refuses_the_memory_is_asked_again(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: Ran) -> None:
    """Between the look and the taking somebody else may be quicker: what was got is given back."""
    real, refused = parking.Parked._room, []

    def room(self: parking.Parked) -> bool:
        if len(refused) == 2:
            return real(self)
        refused.append(1)
        first, *_ = self._storages.values()
        first.resize_(8)
        with monkeypatch.context() as patch:
            patch.setattr(parking, "out_of_memory", lambda error: True)
            self._storages[-1], self._sizes[-1] = _Full(), 8  # type: ignore[assignment]
            found = real(self)
            del self._storages[-1]
        assert {storage.nbytes() for storage in self._storages.values()} == {0}
        return found

    monkeypatch.setattr(parking.Parked, "_room", room)
    asked = Asked(wishes={2: [wish("pause")]})
    waiting(monkeypatch, asked, wish("resume"), None, None, None)
    ran = drive(run_of(**SETTINGS), tmp_path / "run", asked)
    assert (ran.error, len(refused)) == (None, 2)
    assert same_bits(ran, quiet)


class _Full:
    """A block that cannot be had."""

    def resize_(self, size: int) -> None:
        if size:
            raise RuntimeError("out of memory")

    def nbytes(self) -> int:
        return 0


@pytest.mark.usefixtures("parked")
def test_without_room_in_ram_or_on_the_disk_the_run_pauses_where_it_is(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: Ran
) -> None:
    monkeypatch.setattr(parking, "ram_bytes", lambda: (1, 1))
    monkeypatch.setattr(parking, "free_bytes", lambda _: 0)
    ran = paused(run_of, tmp_path / "run", monkeypatch, 2)
    (told,) = [finding for finding in ran.of(Finding) if finding.detector == "pause"]
    assert told.severity == "warn"
    assert "the device's memory is not free: neither RAM" in told.message
    assert same_bits(ran, quiet)


@pytest.mark.usefixtures("parked")
def test_what_the_disk_gives_back_changed_ends_the_run_and_not_the_adapter(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: Ran
) -> None:
    def flip() -> None:
        file = sorted((tmp_path / "run" / parking.FOLDER).iterdir())[0]
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(parking, "ram_bytes", lambda: (1, 1))
    asked = Asked(wishes={3: [wish("pause")]})
    waiting(monkeypatch, asked, flip, wish("resume"))
    ran = drive(run_of(**SETTINGS), tmp_path / "run", asked)
    assert isinstance(ran.error, CheckpointError)
    assert "not what was written" in str(ran.error)
    rest = drive(run_of(**SETTINGS), tmp_path / "run", resume=True)
    assert same_bits(rest, quiet)
    assert not (ran.folder / parking.FOLDER).exists()


@pytest.mark.usefixtures("parked")
def test_a_disk_that_writes_rubbish_is_not_trusted_with_the_run(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: Ran
) -> None:
    """Files are read back before anything is dropped, so the run just stays where it is."""
    real = parking.save_file

    def rubbish(tensors: dict[str, torch.Tensor], path: Path) -> None:
        real({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, path)

    monkeypatch.setattr(parking, "ram_bytes", lambda: (1, 1))
    monkeypatch.setattr(parking, "save_file", rubbish)
    ran = paused(run_of, tmp_path / "run", monkeypatch, 2)
    (told,) = [finding for finding in ran.of(Finding) if finding.detector == "pause"]
    assert "could not be written: what was paused is not what was written" in told.message
    assert same_bits(ran, quiet)
    assert not (ran.folder / parking.FOLDER).exists()


@pytest.mark.usefixtures("parked")
def test_a_save_that_failed_is_made_up_for_in_the_pause(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: Ran) -> None:
    from qlora_tui.engine import shelf
    from qlora_tui.engine.errors import SpaceError

    real, full = shelf.make_room, [False]

    def make_room(*args: Any) -> int:
        if full[0]:
            raise SpaceError("the disk is full")
        return real(*args)

    monkeypatch.setattr(shelf, "make_room", make_room)
    asked = Asked(wishes={1: [wish("pause")]})
    waiting(monkeypatch, asked, lambda: full.__setitem__(0, False), wish("save"), wish("save", 2), wish("resume"))
    ran = drive(run_of(**SETTINGS), tmp_path / "run", asked, on_step=lambda step: full.__setitem__(0, step.step == 1))
    assert ran.error is None
    assert next(event.step for event in ran.of(Saved)) == 1
    assert [why for name, _, why in answers(ran) if name == "save"] == ["", "it was saved already"]
    saved = load_file(ran.folder / "checkpoints/step-000001/adapter_model.safetensors")
    assert any(bool(part.any()) for name, part in saved.items() if "lora_B" in name)
    assert same_bits(ran, quiet)


def test_time_goes_on_in_a_pause_and_ends_it_measured(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("qlora_tui.engine.train.loop.time.monotonic", lambda: now[0])
    asked = Asked(wishes={2: [wish("pause")]})
    waiting(monkeypatch, asked, None, lambda: now.__setitem__(0, 100.0), None)
    ran = drive(run_of(max_time=90, **SETTINGS), tmp_path / "run", asked)
    assert ran.result is not None
    assert (ran.result.outcome, len(ran.of(Stepped))) == ("done", 2)
    assert ran.of(Evaluated)[-1].base_loss is not None


@pytest.mark.usefixtures("parked")
def test_time_that_is_up_while_others_hold_the_memory_ends_the_run_saved(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("qlora_tui.engine.train.loop.time.monotonic", lambda: now[0])
    monkeypatch.setattr(parking.Parked, "lacking", lambda _: 1 << 30)
    asked = Asked(wishes={3: [wish("pause")]})
    waiting(monkeypatch, asked, lambda: now.__setitem__(0, 100.0))
    ran = drive(run_of(max_time=90, **SETTINGS), tmp_path / "run", asked)
    assert ran.error is None
    assert ran.result is not None
    assert (ran.result.outcome, ran.result.adapter) == ("done", "adapter")
    assert any("without a last measurement" in finding.message for finding in ran.of(Finding))
    assert [event.step for event in ran.of(Evaluated)] == [0, 2]


def test_a_pause_that_is_taken_back_at_once_is_none(run_of: Make, tmp_path: Path) -> None:
    asked = Asked(wishes={2: [wish("pause"), wish("pause", 2), wish("resume"), wish("resume", 2)]})
    ran = drive(run_of(**SETTINGS), tmp_path / "run", asked)
    assert names(ran.events, "pause") == []
    told = [(name, obeyed) for name, obeyed, _ in answers(ran)]
    assert told == [("pause", True), ("pause", False), ("resume", True), ("resume", False)]


def test_a_pause_that_was_asked_for_outlasts_heat_and_the_other_way_round(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    degrees = [90.0]
    asked = Asked()
    steps: list[Any] = [wish("pause"), lambda: degrees.__setitem__(0, 60.0), wish("sample"), None, wish("resume"), None]
    rest, waited = iter(steps), []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        found = next(rest)
        asked.wishes.setdefault(0, []).append(found) if isinstance(found, Wish) else found and found()

    monkeypatch.setattr(job, "Limits", partial(Limits, temperature=lambda: degrees[0], wait=wait))
    ran = drive(run_of(max_temperature=80, **SETTINGS), tmp_path / "run", asked)
    assert ran.error is None
    assert names(ran.events, "pause") == ["begin", "end"]
    assert waited == [1.0] * 6
    assert ("sample", False, "the run is paused: go on first") in answers(ran)


# the learning rate


def rates(ran: Ran) -> list[float]:
    return [step.lr for step in ran.of(Stepped)]


def test_a_change_counts_from_the_next_step_on_and_only_by_its_factor(run_of: Make, tmp_path: Path, quiet: Ran) -> None:
    ran = drive(run_of(**SETTINGS), tmp_path / "run", Asked(wishes={2: [rate(0.5)], 4: [rate(4.0, 2)]}))
    assert ran.error is None
    factors = [changed / planned for changed, planned in zip(rates(ran), rates(quiet), strict=True)]
    assert factors == [1, 1, 0.5, 0.5, 2, 2]
    first, second = ran.of(Command)
    assert (first.obeyed, first.step, first.args) == (True, 3, {"key": "learning_rate", "factor": 0.5})
    assert second.why == "from step 5 on the learning rate is 2 times the planned one"
    assert not same_bits(ran, quiet)


def test_half_and_double_before_one_step_change_nothing(run_of: Make, tmp_path: Path, quiet: Ran) -> None:
    ran = drive(run_of(**SETTINGS), tmp_path / "run", Asked(wishes={2: [rate(0.5), rate(2.0, 2)]}))
    assert [answer.obeyed for answer in ran.of(Command)] == [True, True]
    assert same_bits(ran, quiet)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (rate(0.001), "it would be 0.001 times the planned one; 0.01 to 100 is possible"),
        (rate(1000), "it would be 1000 times the planned one; 0.01 to 100 is possible"),
        (rate(0), "0 is no factor"),
        (rate("nan"), "nan is no factor"),
        (rate("half"), "it names no factor"),
        (rate(None), "it names no factor"),
        (wish("set", key="learning_rate"), "it names no factor"),
        (wish("set", key="seed", factor=2), "only learning_rate can be set while a run goes, not 'seed'"),
        (wish("set", key=["\x1b[2J"], factor=2), "only learning_rate can be set while a run goes, not \"['\\\\x1b[2J']\""),
        (wish("dance"), "that is not obeyed between steps"),
    ],
)
def test_what_cannot_be_set_is_refused_with_the_reason(run_of: Make, tmp_path: Path, quiet: Ran, asked: Wish, why: str) -> None:
    ran = drive(run_of(**SETTINGS), tmp_path / "run", Asked(wishes={2: [asked]}))
    assert answers(ran) == [(asked.name, False, why)]
    assert same_bits(ran, quiet)


def journalled(ran: Ran, folder: Path) -> list[Record]:
    """Write what a run said as the session does, and return it."""
    journal = Journal(folder)
    found = [record for event in ran.events if (record := journal.write(event)) is not None]
    journal.close()
    return found


def test_a_run_that_is_told_of_the_changes_of_another_is_that_run(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(**SETTINGS), tmp_path / "run", Asked(wishes={2: [rate(0.3)], 3: [rate(0.7, 2), rate(1.9, 3)]}))
    changes = tuple(change.text for change in rate_changes(journalled(ran, ran.folder)))
    assert changes == ("3:0.3", "4:0.7", "4:1.9")
    again = drive(run_of(learning_rate_changes=changes, **SETTINGS), tmp_path / "again")
    assert again.error is None
    assert rates(again) == rates(ran)
    assert same_bits(again, ran)
    assert again.of(Command) == []


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_resume_makes_the_changes_again_that_its_checkpoint_does_not_hold(run_of: Make, tmp_path: Path, stop: int) -> None:
    """Killed in the step after `stop`, with the checkpoint of step 3 or none: the changes of the journal come again at their steps."""
    settings = SETTINGS | {"eval_steps": 100, "save_steps": 3}

    def asked() -> Asked:
        wishes = {1: [rate(0.5)], 3: [rate(0.5, 2)], 4: [rate(3.0, 3)]}
        return Asked(wishes={step: one for step, one in wishes.items() if step <= stop})

    def kill(step: Stepped) -> None:
        if step.step == stop + 1:
            raise KeyError("killed")

    whole = drive(run_of(**settings), tmp_path / "whole", asked())
    part = drive(run_of(**settings), tmp_path / "part", asked(), on_step=kill)
    assert isinstance(part.error, KeyError)
    journalled(part, part.folder)
    rest = drive(run_of(**settings), tmp_path / "part", resume=True)
    assert rest.error is None
    assert rates(rest) == rates(whole)[(3 if stop >= 3 else 0) :]
    assert same_bits(rest, whole)
    one, two = (rate_changes([*journalled(ran, ran.folder), *read_records(ran.folder / EVENTS)]) for ran in (rest, whole))
    assert {change.text for change in one} == {change.text for change in two}


def test_a_run_by_config_resumes_with_each_change_counted_once(run_of: Make, tmp_path: Path) -> None:
    settings = SETTINGS | {"learning_rate_changes": ("2:0.5", "5:0.5")}
    whole = drive(run_of(**settings), tmp_path / "whole")
    part = drive(run_of(**settings), tmp_path / "part", Asked({3: "stop"}))
    rest = drive(run_of(**settings), tmp_path / "part", resume=True)
    assert rates(part) + rates(rest) == rates(whole)
    assert same_bits(rest, whole)


def test_a_change_that_no_step_would_meet_is_refused_before_the_model_is_loaded(run_of: Make, tmp_path: Path) -> None:
    ran = drive(run_of(max_steps=0, num_train_epochs=1.0, learning_rate_changes=("500:0.5",)), tmp_path / "run")
    assert "500:0.5 comes after the last step, 9" in str(ran.error)
    assert "begin" not in names(ran.events, "load")


# samples

HOSTILE = "say 3 [/] \x1b]0;x\x07"


def sampled(ran: Ran) -> list[tuple[int, str]]:
    return [(event.step, event.prompt) for event in ran.of(Sampled)]


def test_a_sample_borrows_the_model_and_leaves_no_trace(run_of: Make, tmp_path: Path, quiet: Ran) -> None:
    asked = Asked(wishes={step: [wish("sample", step), wish("sample", 10 + step, prompt=HOSTILE)] for step in range(STEPS)})
    ran = drive(run_of(**SETTINGS), tmp_path / "run", asked)
    assert ran.error is None
    assert all(obeyed for _, obeyed, _ in answers(ran))
    assert len(ran.of(Sampled)) == STEPS * 4
    held_out = [prompt for step, prompt in sampled(ran) if step == 0][:3]
    assert all(prompt.startswith("say ") for prompt in held_out)
    assert ran.losses == quiet.losses
    assert same_bits(ran, quiet)
    assert [finding for finding in ran.of(Finding) if finding.detector == "fence"] == []


def test_a_sample_is_what_the_model_itself_would_say(run_of: Make, tmp_path: Path) -> None:
    """Against transformers' own greedy search over the saved adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from qlora_tui.engine.data import load_tokenizer

    run = run_of(max_steps=4, sample_prompts=("say 3", "what, now?"))
    ran = drive(run, tmp_path / "run")
    last = [event for event in ran.of(Sampled) if event.step == 4]
    tokenizer = load_tokenizer(Path(run.model_name_or_path))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.model_name_or_path), ran.folder / "adapter").eval()
    for event in last:
        ids = tokenizer.encode(tokenizer.render([{"role": "user", "content": event.prompt}], answer_next=True))[0]
        said = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False, max_new_tokens=64
        )
        text = tokenizer.decode(said[0, len(ids) :].tolist())
        assert text.removesuffix("<|im_end|>") == event.text
    assert [event.prompt for event in last] == ["say 3", "what, now?"]


def test_prompts_of_the_config_are_shown_at_each_measurement_and_at_the_end(run_of: Make, tmp_path: Path, quiet: Ran) -> None:
    ran = drive(run_of(sample_prompts=("say 1", "x" * 600), **SETTINGS), tmp_path / "run")
    assert sampled(ran) == [(2, "say 1"), (4, "say 1"), (6, "say 1")]
    (told,) = [finding for finding in ran.of(Finding) if finding.detector == "sample"]
    assert "448 at most" in told.message
    assert same_bits(ran, quiet)


@pytest.mark.parametrize(
    ("args", "settings", "why"),
    [
        ({"prompt": ""}, {}, "the prompt is empty"),
        ({"prompt": 7}, {}, "the prompt is empty"),
        ({"prompt": "x" * 5000}, {}, "448 at most"),
        ({"prompt": "x" * 5_000_000}, {}, "20,000 at most"),
        ({}, {"val_set_size": 0.0}, "no rows are held out and there are no sample_prompts: name a prompt"),
    ],
)
def test_a_sample_that_cannot_be_is_refused_with_the_reason(
    run_of: Make, tmp_path: Path, args: dict[str, Any], settings: dict[str, Any], why: str
) -> None:
    ran = drive(run_of(**SETTINGS | settings), tmp_path / "run", Asked(wishes={2: [wish("sample", **args)]}))
    ((name, obeyed, told),) = answers(ran)
    assert (name, obeyed, ran.of(Sampled)) == ("sample", False, [])
    assert why in told


def test_a_stop_is_seen_between_two_tokens(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(wishes={2: [wish("sample")]})
    real, tokens = samples.greedy, []

    def greedy(loaded: Any, prompt: Any, most: int, stops: Any, look: Callable[[], None]) -> list[int]:
        def looked() -> None:
            tokens.append(1)
            if len(tokens) == 5:
                asked.at_step = {0: "stop"}
            look()

        return real(loaded, prompt, most, (), looked)

    monkeypatch.setattr(samples, "greedy", greedy)
    ran = drive(run_of(**SETTINGS), tmp_path / "run", asked)
    assert ran.result is not None
    assert (ran.result.outcome, len(tokens), ran.of(Sampled)) == ("stopped", 5, [])
    assert len(ran.of(Stepped)) == 2


def test_memory_that_a_sample_lacks_costs_the_sample_and_nothing_else(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: Ran
) -> None:
    def full(*_: Any) -> list[int]:
        torch.rand(3)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(samples, "greedy", full)
    ran = drive(run_of(**SETTINGS), tmp_path / "run", Asked(wishes={2: [wish("sample")]}))
    (told,) = [finding for finding in ran.of(Finding) if finding.detector == "sample"]
    assert "training is not touched" in told.message
    assert same_bits(ran, quiet)


def test_a_sample_whose_random_numbers_stay_drawn_ends_the_run(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: somebody samples by chance and nobody puts the generator back."""
    real = samples.greedy

    def by_chance(*args: Any) -> list[int]:
        torch.rand(3)
        return real(*args)

    monkeypatch.setattr(samples, "greedy", by_chance)
    monkeypatch.setattr(RandomState, "restore", lambda *_: None)
    ran = drive(run_of(**SETTINGS | {"eval_steps": 100}), tmp_path / "run", Asked(wishes={2: [wish("sample")]}))
    assert "random numbers could not be put back" in str(ran.error)


@pytest.mark.parametrize("texts", [["one text to go on with " * 3, "another one, as long as that " * 2]])
def test_rows_that_are_all_text_are_gone_on_with(run_of: Make, tmp_path: Path, write_jsonl: Callable[..., Path], texts: list[str]) -> None:
    data = write_jsonl([{"text": f"{number} {texts[number % 2]}"} for number in range(40)], "texts.jsonl")
    asked = Asked(wishes={1: [wish("sample"), wish("sample", 2, prompt="go on")]})
    ran = drive(run_of(data=(str(data),), max_steps=2), tmp_path / "run", asked)
    assert ran.error is None
    prompts = [prompt for _, prompt in sampled(ran)]
    assert len(prompts) == 4
    assert all(len(prompt) > 20 for prompt in prompts[:3])
    assert prompts[3] == "go on"
