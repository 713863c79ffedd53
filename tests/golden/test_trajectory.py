"""The losses of one small run, step by step, against numbers written down with their environment.

Change them only with a reason in the commit message: `python tests/golden/test_trajectory.py` writes them anew.
Machines add floats in another order, so single steps may differ a little; the residuals must also average to nothing,
since a wrong scale or a lost token shifts all steps to one side.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_model, write_tokenizer
from loop_driver import drive

from qlora_tui.engine.spec import from_values

REFERENCE = Path(__file__).with_name("trajectory.json")
KINDS = {"lora": {"method": "lora"}, "nf4": {}, "fp4": {"bnb_4bit_quant_type": "fp4"}}
STEP_NATS, MEAN_NATS = 2e-3, 2e-4


def losses(folder: Path, values: dict[str, Any]) -> list[float]:
    """Train twenty steps on ragged rows: two epochs and a bit, the smaller last step included."""
    write_model(folder / "model")
    write_tokenizer(folder / "model")
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "abc " * (1 + n % 7) + str(n)}]}
        for n in range(37)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = from_values(
        {
            "model_name_or_path": str(folder / "model"),
            "data": (str(folder / "data.jsonl"),),
            "max_length": 256,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 20,
            "learning_rate": 3e-3,
            **values,
        }
    )
    ran = drive(run, folder / "run")
    assert ran.error is None
    return ran.losses


@pytest.mark.parametrize("kind", KINDS)
def test_the_trajectory_is_the_one_written_down(tmp_path: Path, kind: str) -> None:
    expected = json.loads(REFERENCE.read_text())["losses"][kind]
    residuals = [found - wanted for found, wanted in zip(losses(tmp_path, KINDS[kind]), expected, strict=True)]
    assert max(map(abs, residuals)) < STEP_NATS
    assert abs(statistics.fmean(residuals)) < MEAN_NATS


def test_the_three_bases_are_three_models() -> None:
    """Equal first losses would mean that a base was not loaded in the type that was asked for."""
    first = {kind: values[0] for kind, values in json.loads(REFERENCE.read_text())["losses"].items()}
    assert len(set(first.values())) == 3


def write() -> None:
    """Write the reference of this machine."""
    torch.set_num_threads(1)
    found = {}
    for kind, values in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = [round(loss, 6) for loss in losses(Path(folder), values)]
    import bitsandbytes
    import peft
    import transformers

    environment = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "bitsandbytes": bitsandbytes.__version__,
    }
    REFERENCE.write_text(json.dumps({"environment": environment, "losses": found}, indent=1) + "\n")


if __name__ == "__main__":
    write()
