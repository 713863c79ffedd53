"""Trained tensors in one buffer: the same updates to the bit as one by one, the same checkpoints, and nobody notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_by_one import SHAPES, Pair, pair, saved_one_by_one

from qlora_tui.engine.errors import CheckpointError
from qlora_tui.engine.fast import states
from qlora_tui.engine.fast.flat import BLOCK, Flat
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train.optim import clip, gradient_norm

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
CPU = torch.device("cpu")
OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")
RUNS = [RunConfig(optim=optim, loraplus_lr_ratio=ratio, weight_decay=0.1) for optim in OPTIMIZERS for ratio in (1.0, 8.0)]


def named(run: RunConfig) -> str:
    return f"{run.optim}, LoRA+ {run.loraplus_lr_ratio:g}"


def between(held: Pair) -> list[torch.Tensor]:
    """Return what lies between the tensors of each group: of the parameter and its moments, in 8 bits as shares of their blocks."""
    found = []
    for group in held.flat.groups:
        gap = torch.ones(group.parameter.numel(), dtype=torch.bool)
        for member in group.members:
            gap[member.start : member.start + member.shape.numel()] = False
        state = held.optimizer.state[group.parameter]
        found += [state[name][gap] for name in ("exp_avg", "exp_avg_sq") if name in state]
        for at in (1, 2) if "qmap1" in state else ():
            written = state[f"absmax{at}"].repeat_interleave(BLOCK) > 0
            found.append(state[f"qmap{at}"][state[f"state{at}"].long()][gap & written])
    return found


@pytest.mark.parametrize("run", RUNS, ids=named)
def test_every_step_is_that_of_each_tensor_alone(run: RunConfig) -> None:
    held = pair(run, CPU)
    assert len(held.optimizer.param_groups) < len(SHAPES) / 2
    for number in range(6):
        held.step(number)
        assert held.differ() == []
        # A processor's 8-bit states have no exact zero: 0 becomes 2e-5 of the largest number beside it, and creeps with its codes.
        assert float(torch.cat(between(held)).abs().max()) <= (0.0 if run.optim == "adamw_torch" else 1e-3)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=6),
    run=st.sampled_from(RUNS),
)
def test_shapes_and_their_order_do_not_matter(shapes: list[tuple[int, int]], run: RunConfig) -> None:
    held = pair(run, CPU, tuple(shapes))
    for number in range(3):
        held.step(number)
    assert held.differ() == []


@pytest.mark.parametrize("run", RUNS, ids=named)
def test_checkpoints_are_those_of_each_tensor_alone_and_go_on_to_the_bit(run: RunConfig) -> None:
    """A checkpoint from before tensors lay together is read as it is: nothing in it says how they lie."""
    held = pair(run, CPU)
    for number in range(3):
        held.step(number)
    assert held.differ() == []
    old, numbers = saved_one_by_one(held.reference)
    again = pair(run, CPU)
    again.alone, again.reference = held.alone, held.reference
    for name, parameter in again.together.items():
        parameter.data.copy_(held.together[name].data)
    for times in range(2):  # into an optimizer that is fresh, and into one that went on: a roll back
        states.check(again.optimizer, old, numbers, "here")
        states.restore(again.optimizer, old, numbers)
        assert again.differ() == []
        if not times:
            again.flat.lend()
            again.optimizer.step()
            again.flat.clear()
            for name, parameter in again.together.items():
                parameter.data.copy_(held.together[name].data)
    for number in range(3, 7):
        again.step(number)
        assert again.differ() == []


@pytest.mark.parametrize("optim", OPTIMIZERS[1:])
def test_no_update_waits_for_the_device_and_whoever_reads_or_writes_its_state_does(optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A paged state is the host's memory too, so a read that does not wait finds it half updated, and a write is overwritten."""
    held, waited = pair(RunConfig(optim=optim), CPU), list[str]()
    monkeypatch.setattr(bitsandbytes.optim.optimizer, "sync_gpu", lambda _: waited.append("update"))
    held.step(0)
    assert len(waited) >= len(SHAPES)  # bitsandbytes' own
    waited.clear()
    held.flat.lend()
    held.optimizer.step()
    assert waited == []
    before, rest = states.split(held.optimizer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    moments = [state["state1"] for state in held.optimizer.state.values()]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: [moment.fill_(7) for moment in moments])  # what the device was still at
    tensors, _ = states.split(held.optimizer)
    assert all(bool((part == 7).all()) for name, part in tensors.items() if name.endswith(".state1"))
    states.restore(held.optimizer, before, rest)
    monkeypatch.undo()
    tensors, _ = states.split(held.optimizer)
    assert all(torch.equal(part, before[name]) for name, part in tensors.items())


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_what_a_checkpoint_will_take_is_known_before_the_first_step(optim: str) -> None:
    held = pair(RunConfig(optim=optim), CPU)
    foretold = sum(part.nbytes for part in states.zeros(held.optimizer).values())
    held.step(0)
    tensors, _ = states.split(held.optimizer)
    moments = ("exp_avg", "exp_avg_sq", "state1", "state2")
    assert foretold == sum(part.nbytes for name, part in tensors.items() if name.split(".", 1)[1] in moments)


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, Any]], object], str]] = {
    "a moment too short": (lambda parts, _: parts.update({"2.state1": parts["2.state1"][:1]}), "state1 of tensor 2 has another shape"),
    "a moment in 32 bits": (lambda parts, _: parts.update({"2.state1": parts["2.state1"].float()}), "state1 of tensor 2 has another type"),
    "constants too few": (lambda parts, _: parts.update({"2.absmax1": parts["2.absmax1"][:1]}), "absmax1 of tensor 2 has another shape"),
    "another map": (lambda parts, _: parts.update({"4.qmap1": parts["4.qmap1"] * 2}), "qmap1 of tensor 4 is not that of"),
    "another step": (lambda _, rest: rest["numbers"]["4"].update(step=9), "step of tensor 4 is not that of"),
    "a part that is lost": (lambda parts, _: parts.pop("4.absmax2"), "state of tensor 4 has other parts"),
    "a tensor that is lost": (lambda parts, _: [parts.pop(name) for name in list(parts) if name.startswith("9.")], "is of 11 tensors"),
    "another optimizer": (lambda _, rest: rest.update(kind="AdamW"), "the checkpoint's optimizer is AdamW"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_state_that_does_not_fit_is_refused_in_one_sentence(damage: str) -> None:
    held = pair(RunConfig(optim="adamw_8bit"), CPU)
    held.step(0)
    tensors, rest = states.split(held.optimizer)
    harm, words = DAMAGE[damage]
    states.check(held.optimizer, tensors, rest, "here")
    harm(tensors, rest)
    with pytest.raises(CheckpointError, match=words):
        states.check(held.optimizer, tensors, rest, "here")


def made(*sizes: int) -> tuple[list[torch.nn.Parameter], Flat[int]]:
    parameters = [torch.nn.Parameter(torch.arange(size, dtype=torch.float32)) for size in sizes]
    return parameters, Flat(parameters, [size % 2 for size in sizes])


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=9))
def test_tensors_keep_their_values_and_never_share_a_block(sizes: list[int]) -> None:
    parameters, flat = made(*sizes)
    assert all(torch.equal(part.detach(), torch.arange(size, dtype=torch.float32)) for part, size in zip(parameters, sizes, strict=True))
    assert sum(len(group.members) for group in flat.groups) == len(sizes)
    for group in flat.groups:
        taken = [block for member in group.members for block in range(member.start // BLOCK, member.end // BLOCK)]
        assert taken == list(range(group.parameter.numel() // BLOCK))
        group.parameter.data.fill_(7.0)
    assert all(bool((part == 7.0).all()) for part in parameters)


def test_gradients_are_lent_empty_for_a_step_and_their_memory_is_let_go() -> None:
    parameters, flat = made(3, 300, 5)
    flat.lend()
    lent = [part.grad for part in parameters]
    (parameters[0].sum() + parameters[1].sum() * 2 + parameters[2].sum() * 3).backward()
    assert [part.grad for part in parameters] == lent  # added to where they lie
    flat.lend()  # a second batch of the same step
    assert [float(part.grad.mean()) for part in parameters] == [1.0, 2.0, 3.0]  # type: ignore[union-attr]
    assert [float(group.parameter.grad.sum()) for group in flat.groups] == [18.0, 600.0]  # type: ignore[union-attr]
    flat.clear()
    assert all(part.grad is None for part in (*parameters, *(group.parameter for group in flat.groups)))
    flat.lend()
    assert not any(part.grad.any() for part in parameters)  # type: ignore[union-attr]
    assert all(part.grad is was for part, was in zip(parameters, lent, strict=True))
    flat.release()
    assert all(part.grad is None for part in parameters)
    assert lent[0].untyped_storage().nbytes() == 0  # type: ignore[union-attr]
    flat.lend()
    assert all(part.grad is was and not was.any() for part, was in zip(parameters, lent, strict=True))  # type: ignore[union-attr]


def test_clipping_reaches_every_gradient() -> None:
    parameters, flat = made(3, 300, 5)
    flat.lend()
    for part in parameters:
        part.grad.fill_(2.0)  # type: ignore[union-attr]
    norm = gradient_norm(parameters)
    assert norm == pytest.approx(2.0 * 308**0.5)
    assert not clip(flat, norm, 0.0)
    assert not clip(flat, norm, norm)
    assert not clip(flat, float("nan"), 1.0)
    assert clip(flat, norm, 1.0)
    assert gradient_norm(parameters) == pytest.approx(1.0)


def test_a_tensor_that_went_elsewhere_is_found() -> None:
    parameters, flat = made(3, 300, 5)
    flat.lend()
    assert flat.strays() == []
    parameters[1].data = parameters[1].data.clone()
    parameters[2].grad = torch.zeros(5)
    assert {id(part) for part in flat.strays()} == {id(parameters[1]), id(parameters[2])}
