"""The fence holds with fused layers too: each race and each way around the doors, in a step that goes through them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_driver import drive
from test_races import AROUND_THE_DOORS, BY_THE_DOOR, ON_STEP, SETTINGS, Strike, intruder, same_bits, switches_kept, tensors

from qlora_tui.engine.errors import FenceError
from qlora_tui.engine.events import Stepped
from qlora_tui.engine.spec import RunConfig
from qlora_tui.engine.train import parking

Make = Callable[..., RunConfig]
FUSED = SETTINGS | {"dtype": "bfloat16", "lora_dropout": 0.0, "gradient_checkpointing": "1"}
VARIANTS = [FUSED, FUSED | {"method": "lora-8bit", "packing": "on"}]
either = pytest.mark.parametrize("settings", VARIANTS, ids=["padded", "8-bit base, end to end"])
pytestmark = pytest.mark.usefixtures("fused_on_cpu")
__all__ = ["switches_kept"]


@pytest.fixture(autouse=True)
def pauses_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "PARKED_FROM", ("cpu",))


@either
@pytest.mark.parametrize("race", BY_THE_DOOR)
def test_a_second_thread_is_refused(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, race: str, settings: dict[str, Any]
) -> None:
    quiet = drive(run_of(**settings), tmp_path / "quiet")
    met: list[BaseException | None] = []
    Strike(monkeypatch, "backward", lambda it: met.append(intruder(lambda: BY_THE_DOOR[race](it))))
    ran = drive(run_of(**settings), tmp_path / "raced")
    assert quiet.error is None
    assert ran.error is None
    assert isinstance(met[0], FenceError)
    assert same_bits(tensors(ran), tensors(quiet))


@pytest.mark.usefixtures("switches_kept")
@either
@pytest.mark.parametrize("race", AROUND_THE_DOORS)
def test_what_goes_around_the_doors_is_caught(
    run_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, race: str, settings: dict[str, Any]
) -> None:
    action, words = AROUND_THE_DOORS[race]
    Strike(monkeypatch, "backward", lambda it: intruder(lambda: action(it)))
    ran = drive(run_of(**settings), tmp_path / "raced")
    assert isinstance(ran.error, FenceError)
    assert words in str(ran.error)
    assert len(ran.of(Stepped)) == ON_STEP - 1


@either
def test_two_runs_give_the_same_bits(run_of: Make, tmp_path: Path, settings: dict[str, Any]) -> None:
    one, other = (drive(run_of(**settings), tmp_path / name) for name in ("one", "other"))
    assert one.error is None
    assert all(torch.equal(one_part, tensors(other)[name]) for name, one_part in tensors(one).items())
