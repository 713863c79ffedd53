"""A pause, samples and changes of the learning rate on a CUDA device; skipped without one.

A step's sums may be added in another order from run to run, so losses are compared within that noise; what a pause itself brings
back is compared to the bit.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_model, write_tokenizer
from loop_driver import Asked, Ran, drive

from qlora_tui.engine.events import Finding, Sampled, Stepped, Wish
from qlora_tui.engine.machine import look
from qlora_tui.engine.spec import RunConfig, from_values
from qlora_tui.engine.train import job, parking, pause
from qlora_tui.engine.train.limits import Limits
from qlora_tui.engine.train.loop import Loop

pytestmark = pytest.mark.gpu
Make = Callable[..., RunConfig]
OPTIMIZERS = ["paged_adamw_8bit", "adamw_8bit", "adamw_torch"]


@pytest.fixture(autouse=True)
def nothing_left() -> Any:
    """Begin and end with an empty allocator: what an earlier test holds would count as this one's."""
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def run_of(tmp_path: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]]) -> Make:
    """A run over a model of some 90 MiB: wide enough that bitsandbytes pages the optimizer's state."""
    model = tmp_path / "model"
    write_model(model, hidden_size=512, intermediate_size=8192, num_attention_heads=8, num_key_value_heads=4)
    write_tokenizer(model)
    data = write_jsonl(chat_rows)

    def make(**values: Any) -> RunConfig:
        usual: dict[str, Any] = {"model_name_or_path": str(model), "data": (str(data),), "max_length": 256, "max_steps": 8}
        usual |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 2e-3, "lora_r": 32}
        return from_values({**usual, "lora_dropout": 0.1, **values})

    return make


def wish(name: str, number: int = 0, **args: Any) -> Wish:
    return Wish(f"{name} {number}", 0.0, 1, name, args)


def waiting(monkeypatch: pytest.MonkeyPatch, asked: Asked, *then: Callable[[], object] | Wish | None) -> None:
    """Let one of `then` happen at each look of a pause."""
    rest = itertools.chain(then, [None] * 3)

    def wait(_: float) -> None:
        found = next(rest)
        if isinstance(found, Wish):
            asked.wishes.setdefault(0, []).append(found)
        elif found is not None:
            found()

    monkeypatch.setattr(job, "Limits", partial(Limits, wait=wait))


def on_gpu(run: RunConfig, folder: Path, asked: Asked | None = None) -> Ran:
    return drive(run, folder, asked, machine=look())


def everything(loop: Loop) -> dict[str, torch.Tensor]:
    """Return a copy of every tensor that a step reads, and of the generators, on the host."""
    torch.cuda.synchronize()  # paged state is read from the host
    parts = [*parking._of_model(loop.loaded), *parking._trained(loop.optimizer), *parking._tensors(loop.optimizer.state)]
    found = {str(number): part.detach().cpu().clone() for number, part in enumerate(parts)}
    return found | {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state()}


def noise(one: Ran, two: Ran) -> float:
    return max(abs(a - b) for a, b in zip(one.losses, two.losses, strict=True))


@pytest.mark.parametrize("where", ["ram", "disk"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_pause_frees_the_card_and_brings_every_bit_back(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str, where: str
) -> None:
    run = run_of(optim=optim)
    whole, again = on_gpu(run, tmp_path / "whole"), on_gpu(run, tmp_path / "again")
    seen: dict[str, Any] = {}
    put_away, fetch = pause._put_away, pause._fetch

    def before(loop: Loop) -> Any:
        seen.setdefault("tensors", []).append(everything(loop))
        seen["held"] = torch.cuda.memory_reserved()
        yield from put_away(loop)
        assert loop.pause.parked is not None
        assert loop.pause.parked.on_disk is (where == "disk")
        seen["moved"] = loop.pause.parked.bytes

    def after(loop: Loop) -> bool:
        back = fetch(loop)
        seen["tensors"].append(everything(loop))
        return back

    monkeypatch.setattr(pause, "_put_away", before)
    monkeypatch.setattr(pause, "_fetch", after)
    if where == "disk":
        monkeypatch.setattr(parking, "ram_bytes", lambda: (1, 1))
    asked = Asked(wishes={3: [wish("pause")], 5: [wish("pause", 2)]})
    left: list[int] = []
    waiting(monkeypatch, asked, lambda: left.append(torch.cuda.memory_reserved()), wish("resume"), None, wish("resume", 2))
    ran = on_gpu(run, tmp_path / "run", asked)
    assert ran.error is None
    assert len(ran.of(Stepped)) == 8
    first, second, third, fourth = seen["tensors"]
    for one, two in ((first, second), (third, fourth)):
        assert [name for name in one if not torch.equal(one[name], two[name])] == []
    print(f"{optim}, {where}: {seen['held'] / 2**20:.0f} MiB held, {left[0] / 2**20:.0f} MiB in the pause")
    assert seen["held"] - left[0] > 0.7 * seen["moved"]  # what stays: workspaces of cuBLAS, and blocks that hold them
    freed = [finding.numbers["freed_bytes"] for finding in ran.of(Finding) if finding.detector == "pause"]
    assert all(number > 0 for number in freed)
    assert noise(whole, ran) <= max(4 * noise(whole, again), 1e-3)


def test_other_programs_get_the_memory_and_the_run_waits_until_they_give_it_back(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is asked for real; what another program took is imitated by what it says is free."""
    real = parking.device_free_bytes
    taken = [True]
    monkeypatch.setattr(parking, "device_free_bytes", lambda device: 1 << 20 if taken[0] else real(device))
    asked = Asked(wishes={3: [wish("pause")]})
    gained: list[int] = []
    before: list[int] = []
    put_away = pause._put_away

    def measured(loop: Loop) -> Any:
        before.append(real(loop.loaded.device))
        yield from put_away(loop)
        gained.append(real(loop.loaded.device) - before[0])

    monkeypatch.setattr(pause, "_put_away", measured)
    waiting(monkeypatch, asked, wish("resume"), None, None, lambda: taken.__setitem__(0, False), None)
    ran = on_gpu(run_of(), tmp_path / "run", asked)
    assert ran.error is None
    assert gained[0] > 0
    assert sum("still paused" in finding.message for finding in ran.of(Finding)) == 1
    assert len(ran.of(Stepped)) == 8


def test_a_real_refusal_of_the_allocator_keeps_the_run_paused(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator is held to less than the weights while the run wants to go on, and freed again."""
    asked = Asked(wishes={3: [wish("pause")]})
    total = torch.cuda.get_device_properties(0).total_memory

    def squeeze() -> None:
        torch.cuda.set_per_process_memory_fraction(max(1e-9, torch.cuda.memory_reserved() / total))
        asked.wishes[0] = [wish("resume")]

    monkeypatch.setattr(parking.Parked, "lacking", lambda _: 0)
    monkeypatch.setattr(pause, "_taken", lambda loop: Finding("pause", "warn", loop.step, "still paused"))
    waiting(monkeypatch, asked, squeeze, None, lambda: torch.cuda.set_per_process_memory_fraction(1.0), None)
    try:
        ran = on_gpu(run_of(optim="adamw_torch"), tmp_path / "run", asked)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert ran.error is None
    assert len(ran.of(Stepped)) == 8
    assert any(finding.message == "still paused" for finding in ran.of(Finding))


@pytest.mark.parametrize("name", ["stop", "abort"])
def test_a_run_ends_out_of_a_pause_without_the_card(run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = Asked(wishes={3: [wish("pause")]})
    waiting(monkeypatch, asked, None, lambda: asked.at_step.update({0: name}))
    ran = on_gpu(run_of(), tmp_path / "run", asked)
    assert ran.error is None
    assert ran.result is not None
    assert (ran.folder / "adapter").exists() is (name == "stop")
    rest = drive(run_of(), tmp_path / "run", resume=True, machine=look())
    assert [step.step for step in rest.of(Stepped)] == [4, 5, 6, 7, 8]


def test_samples_leave_no_trace_and_little_memory(run_of: Make, tmp_path: Path) -> None:
    run = run_of(gradient_checkpointing="true")
    whole, again = on_gpu(run, tmp_path / "whole"), on_gpu(run, tmp_path / "again")
    asked = Asked(wishes={step: [wish("sample", step), wish("sample", step + 10, prompt="say 3")] for step in range(8)})
    ran = on_gpu(run, tmp_path / "run", asked)
    assert ran.error is None
    assert len(ran.of(Sampled)) == 8 * 4
    assert [finding for finding in ran.of(Finding) if finding.detector == "fence"] == []
    assert noise(whole, ran) <= max(4 * noise(whole, again), 1e-3)
    peaks = [max(step.memory_peak_bytes for step in one.of(Stepped)) for one in (whole, ran)]
    assert peaks[1] <= peaks[0] * 1.02


def test_half_and_double_before_one_step_change_nothing(run_of: Make, tmp_path: Path) -> None:
    rates = [wish("set", 1, key="learning_rate", factor=0.5), wish("set", 2, key="learning_rate", factor=2.0)]
    plain = on_gpu(run_of(), tmp_path / "plain")
    ran = on_gpu(run_of(), tmp_path / "run", Asked(wishes={2: rates}))
    assert [step.lr for step in ran.of(Stepped)] == [step.lr for step in plain.of(Stepped)]
