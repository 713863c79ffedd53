"""Inputs of checkpointed layers away from the device and back: the same bits, nothing lost, and every copy in its order."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_driver import Asked, Ran, drive
from safetensors.torch import load_file

from qlora_tui.engine.fast.offload import Buffer, Offload, streams_of
from qlora_tui.engine.fast.recompute import offloading, recompute
from qlora_tui.engine.spec import RunConfig

Make = Callable[..., RunConfig]
HOST = torch.device("cpu")


def same_run(left: Ran, right: Ran) -> bool:
    assert left.error is None, left.error
    assert right.error is None, right.error
    one, other = (load_file(ran.folder / "adapter" / "adapter_model.safetensors") for ran in (left, right))
    return left.losses == right.losses and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Through the front door


@pytest.mark.parametrize(
    "values",
    [{}, {"lora_dropout": 0.2}, {"method": "qlora"}, {"gradient_checkpointing": "1"}, {"per_device_train_batch_size": 1}],
    ids=str,
)
def test_a_run_with_inputs_away_gives_the_same_bits(run_of: Make, tmp_path: Path, values: dict[str, Any]) -> None:
    usual = {"gradient_checkpointing": "true", "eval_steps": 3, **values}
    kept = drive(run_of(**usual, offload_checkpoints="off"), tmp_path / "kept")
    away = drive(run_of(**usual, offload_checkpoints="on"), tmp_path / "away")
    assert same_run(kept, away)


def test_a_stop_and_a_resume_give_the_same_bits(run_of: Make, tmp_path: Path) -> None:
    run = run_of(gradient_checkpointing="true", offload_checkpoints="on")
    whole = drive(run, tmp_path / "whole")
    drive(run, tmp_path / "part", Asked({3: "stop"}))
    rest = drive(run, tmp_path / "part", resume=True)
    assert rest.error is None
    assert whole.losses[-len(rest.losses) :] == rest.losses


# The class itself, on layers of its own


class Stackful(torch.nn.Module):
    """Layers that keep far more than their input, as decoder layers do."""

    def __init__(self, number: int, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(width, 3 * width), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(3 * width, width)
            )
            for _ in range(number)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden) + 0
        return hidden


def gradients(model: Stackful, *lengths: int, seed: int = 3) -> list[torch.Tensor]:
    """Add up over batches of several lengths, as accumulation does."""
    torch.manual_seed(seed)
    for length in lengths:
        model(torch.randn(2, length, 8)).square().sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


def expected(number: int, *lengths: int, seed: int = 3) -> list[torch.Tensor]:
    model = Stackful(number)
    recompute(model.layers, number, dropout=True)
    return gradients(model, *lengths, seed=seed)


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) > 0 and all(map(torch.equal, left, right))


def away(number: int, offload: Offload, first: int | None = None) -> Stackful:
    model = Stackful(number)
    recompute(model.layers, number if first is None else first, dropout=True, offload=offload)
    return model


def test_buffers_are_used_again_and_grow_to_the_longest_row_alone() -> None:
    offload = Offload(streams_of(HOST))
    model = away(4, offload)
    lengths = (5, 9, 3, 9, 7)
    assert equal(gradients(model, *lengths), expected(4, *lengths))
    assert offload.lent == 0
    assert offload.held_bytes <= 3 * 2 * 9 * 8 * 4  # three of four layers' inputs, each at most as long as the longest
    offload.release()
    assert offload.held_bytes == 0
    assert equal(gradients(model, *lengths), expected(4, *lengths))


def test_the_input_is_gone_from_the_device_while_it_is_away() -> None:
    offload = Offload(streams_of(HOST))
    model = away(4, offload)
    alive: list[weakref.ref[Any]] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, args: alive.append(weakref.ref(args[0])))
    loss = model(torch.randn(2, 5, 8).requires_grad_()).sum()
    gc.collect()
    assert offload.lent == 3
    assert offload.held_bytes == 0
    assert [there() is not None for there in alive[1:3]] == [False, False]
    loss.backward()
    assert offload.lent == 0


def test_nothing_is_away_without_gradients() -> None:
    offload = Offload(streams_of(HOST))
    with torch.no_grad():
        away(3, offload)(torch.randn(2, 5, 8))
    assert (offload.lent, offload.held_bytes) == (0, 0)


@pytest.mark.parametrize("where", [0, 2, 3])
def test_a_fault_in_the_forward_pass_gives_everything_back(where: int) -> None:
    offload = Offload(streams_of(HOST))
    model = away(4, offload)
    handle = model.layers[where].register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        model(torch.randn(2, 5, 8))
    gc.collect()
    assert offload.lent == 0
    handle.remove()
    assert equal(gradients(model, 5), expected(4, 5))


def test_a_pass_that_is_never_gone_back_through_gives_everything_back() -> None:
    offload = Offload(streams_of(HOST))
    model = away(4, offload)
    loss = model(torch.randn(2, 5, 8)).sum()
    assert offload.lent == 3
    del loss
    gc.collect()
    assert offload.lent == 0
    assert equal(gradients(model, 5), expected(4, 5))


def test_two_passes_at_once_do_not_meet() -> None:
    offload = Offload(streams_of(HOST))
    model = away(3, offload)
    torch.manual_seed(4)
    one, other = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    (model(one).square().sum() + model(other).square().sum()).backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    plain = Stackful(3)
    torch.manual_seed(4)
    one, other = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    (plain(one).square().sum() + plain(other).square().sum()).backward()
    assert equal(found, [parameter.grad for parameter in plain.parameters() if parameter.grad is not None])


# The order of copies: a device whose copies are as late as events allow


class Event:
    """Happens when the copies handed over before it are done."""

    def __init__(self, lane: Late, after: int) -> None:
        self.lane, self.after = lane, after


class Late:
    """A stream that does nothing before somebody waits for it; the one that computes is always done."""

    def __init__(self, name: str, broken: tuple[str, str] | None) -> None:
        self.name, self.broken = name, broken
        self.work: deque[tuple[int, Callable[[], None]]] = deque()
        self.numbers = itertools.count(1)
        self.log: list[Event] = []

    def hand_over(self, work: Callable[[], None]) -> None:
        self.work.append((next(self.numbers), work))

    def wait_event(self, event: Event) -> None:
        if self.broken == (self.name, event.lane.name):
            return
        self.log.append(event)
        if self.name == "compute":
            event.lane.until(event.after)
        else:
            self.hand_over(lambda: event.lane.until(event.after))

    def record_event(self) -> Event:
        return Event(self, next(self.numbers))

    def until(self, number: int) -> None:
        while self.work and self.work[0][0] < number:
            self.work.popleft()[1]()


class LateStreams:
    """Copies that see memory as a card would: what was freed before its copy is counted, what was not waited for is not a number."""

    def __init__(self, broken: tuple[str, str] | None = None) -> None:
        self.compute, self.out, self.back = (Late(name, broken) for name in ("compute", "out", "back"))
        self.device = HOST
        self.freed_early = 0
        self.copies: list[tuple[str, set[str]]] = []  # direction of each copy, and the streams that it waits for

    def current(self) -> Late:
        return self.compute

    def copy(self, lane: Late, target: torch.Tensor, source: torch.Tensor) -> None:
        if lane is self.back:
            target.fill_(torch.nan)
        self.copies.append((lane.name, {event.lane.name for event in lane.log}))
        lane.log.clear()
        ends = [(weakref.ref(end.untyped_storage()), end.dtype, end.storage_offset(), end.shape) for end in (target, source)]

        def work() -> None:
            found = [(storage(), *rest) for storage, *rest in ends]
            if any(storage is None for storage, *_ in found):
                self.freed_early += 1
                return
            to, what = (torch.empty(0, dtype=dtype).set_(storage, offset, shape) for storage, dtype, offset, shape in found)
            to.copy_(what)

        lane.hand_over(work)

    def buffer(self, size: int) -> Buffer:
        return Buffer(torch.full((size,), 255, dtype=torch.uint8))


def late(broken: tuple[str, str] | None = None) -> tuple[bool, LateStreams]:
    """Train with late copies; say whether the gradients are those of inputs that stayed."""
    streams = LateStreams(broken)
    model = away(5, Offload(streams))
    lengths = (5, 9, 5, 9)
    return equal(gradients(model, *lengths), expected(5, *lengths)), streams


def test_late_copies_change_nothing_and_each_waits_for_what_it_needs() -> None:
    right, streams = late()
    assert right
    assert streams.freed_early == 0
    assert len(streams.copies) == 2 * 4 * 4  # four batches, four of five layers, out and back
    assert all("compute" in waits for _, waits in streams.copies)  # for what made the source, or had the target's memory before
    assert all("out" in waits for way, waits in streams.copies if way == "back")
    assert all(waits == {"compute"} for way, waits in streams.copies if way == "out")  # the buffer was given back in that stream


def test_a_layer_below_is_fetched_before_the_one_above_is_computed_again() -> None:
    streams = LateStreams()
    model = away(3, Offload(streams))
    seen: list[int] = []
    loss = model(torch.randn(2, 5, 8)).sum()
    for layer in model.layers:
        layer[0].register_forward_pre_hook(lambda module, args: seen.append(sum(way == "back" for way, _ in streams.copies)))
    loss.backward()
    assert seen == [1, 2, 2]  # layer 2's input stayed; each time the next copy is on its way already


def test_what_is_read_without_waiting_is_wrong() -> None:
    right, _ = late(("compute", "back"))
    assert not right


def test_an_input_let_go_without_waiting_is_freed_before_its_copy() -> None:
    _, streams = late(("compute", "out"))
    assert streams.freed_early > 0


@pytest.mark.parametrize("fault", ["forward", "backward"])
def test_a_fault_frees_nothing_before_its_copy_is_done(fault: str) -> None:
    streams = LateStreams()
    offload = Offload(streams)
    model = away(5, offload)
    left = 5 if fault == "backward" else 3

    def fail(module: torch.nn.Module, args: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("out of memory")

    for layer in model.layers:
        layer.register_forward_pre_hook(fail) if fault == "forward" else layer[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(torch.randn(2, 5, 8).requires_grad_()).sum().backward()
    gc.collect()
    for lane in (streams.out, streams.back):
        lane.until(1 << 30)
    assert streams.freed_early == 0
    assert offload.lent == 0


def test_the_number_of_layers_and_where_their_inputs_are_can_be_changed() -> None:
    model = Stackful(4)
    offload = Offload(streams_of(HOST))
    for number, to in ((4, offload), (2, offload), (3, None), (4, offload)):
        recompute(model.layers, number, dropout=True, offload=to)
        assert offloading(model.layers) is to
        assert equal(gradients(model, 5), expected(4, 5))
