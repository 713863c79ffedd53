"""Trained tensors in one buffer on a card: the same updates to the bit as one by one, states that stay paged, and the time of a step."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from one_by_one import KINDS, SHAPES, pair, same, saved_one_by_one

from qlora_tui.engine.fast import states
from qlora_tui.engine.spec import RunConfig

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda", 0)
LARGE = (*SHAPES, (64, 4096), (4096, 64), (33, 5001))
"""With tensors that bitsandbytes pages alone, too; all that are small in 8 bits are paged only together."""
ADAPTER = ((16, 4096), (4096, 16)) * 128 + ((16, 4096), (14_336, 16)) * 40  # 336 tensors, about those of an 8 B model


@pytest.mark.parametrize("ratio", [1.0, 8.0])
@pytest.mark.parametrize("optim", KINDS)
def test_every_step_is_that_of_each_tensor_alone(optim: str, ratio: float) -> None:
    held = pair(RunConfig(optim=optim, loraplus_lr_ratio=ratio, weight_decay=0.1), CARD, LARGE)
    for number in range(8):
        held.step(number)
        torch.cuda.synchronize()
        assert held.differ() == []


@pytest.mark.parametrize("optim", KINDS)
def test_a_state_that_was_written_one_by_one_goes_on_to_the_bit_and_stays_paged(optim: str) -> None:
    run = RunConfig(optim=optim, weight_decay=0.1)
    held, again = pair(run, CARD, LARGE), pair(run, CARD, LARGE)
    for number in range(3):
        held.step(number)
    torch.cuda.synchronize()
    old, numbers = saved_one_by_one(held.reference)
    again.alone, again.reference = held.alone, held.reference
    for name, parameter in again.together.items():
        parameter.data.copy_(held.together[name].data)
    states.check(again.optimizer, old, numbers, "here")
    states.restore(again.optimizer, old, numbers)
    for number in range(3, 8):
        again.step(number)
        torch.cuda.synchronize()
        assert again.differ() == []
    if optim == "paged_adamw_8bit":
        large = [group["params"][0] for group in again.optimizer.param_groups if group["bits"] == states.EIGHT]
        assert large
        assert all(again.optimizer.state[parameter][name].is_paged for parameter in large for name in ("state1", "state2"))


@pytest.mark.parametrize("optim", KINDS)
def test_the_host_has_few_kernels_to_start(optim: str) -> None:
    """Printed and not asserted but for the number of launches: milliseconds of the host until a step's work is handed over and done."""
    held = pair(dataclasses.replace(RunConfig(), optim=optim), CARD, ADAPTER)
    for number in range(3):
        held.step(number)
    held.flat.lend()
    for parameter in held.alone.values():
        parameter.grad = torch.zeros_like(parameter)
    taken = {}
    for name, optimizer in (("one by one", held.reference), ("together", held.optimizer)):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            optimizer.step()
        handed = time.perf_counter() - began
        torch.cuda.synchronize()
        taken[name] = (handed * 100, (time.perf_counter() - began) * 100)
    for name, (handed, done) in taken.items():
        print(f"{optim}, {len(ADAPTER)} tensors {name}: {handed:.2f} ms until handed over, {done:.2f} ms until done")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        held.optimizer.step()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    print(f"{optim}: {len(kernels)} kernels")
    assert len(kernels) < 60  # the plain one goes through a large tensor in two parts


def test_gradients_come_back_to_the_same_places_after_their_memory_was_let_go() -> None:
    held = pair(RunConfig(optim="adamw_8bit"), CARD, LARGE)
    parameters = list(held.together.values())
    held.flat.lend()
    lent = [parameter.grad for parameter in parameters]
    size = sum(group.parameter.nbytes for group in held.flat.groups)
    before = torch.cuda.memory_allocated()
    held.flat.release()
    assert before - torch.cuda.memory_allocated() >= size
    held.flat.lend()
    assert all(parameter.grad is part for parameter, part in zip(parameters, lent, strict=True))
    sum(parameter.sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    assert all(same(parameter.grad, torch.ones_like(parameter)) for parameter in parameters if parameter.grad is not None)
    assert held.flat.strays() == []
