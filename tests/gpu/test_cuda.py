"""What only a CUDA device can show; skipped without one.

Sums on a GPU may be added in another order from run to run, so these compare losses within noise, not bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_model, write_tokenizer
from loop_driver import Asked, Ran, drive

from qlora_tui.engine.errors import WontFit
from qlora_tui.engine.events import Evaluated, Planned, Resumed, Stepped
from qlora_tui.engine.machine import look
from qlora_tui.engine.spec import RunConfig, from_values

pytestmark = pytest.mark.gpu
Make = Callable[..., RunConfig]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Wide enough that adapter tensors pass the 1e5 elements from which bitsandbytes pages its state."""
    write_model(tmp_path / "model", hidden_size=512, intermediate_size=8192, num_attention_heads=8, num_key_value_heads=4)
    write_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run_of(model: Path, write_jsonl: Callable[..., Path], chat_rows: list[dict[str, Any]]) -> Make:
    data = write_jsonl(chat_rows)

    def make(**values: Any) -> RunConfig:
        usual = {
            "model_name_or_path": str(model),
            "data": (str(data),),
            "max_length": 256,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 12,
            "learning_rate": 2e-3,
        }
        return from_values({**usual, **values})

    return make


def on_gpu(run: RunConfig, folder: Path, asked: Asked | None = None, *, resume: bool = False) -> Ran:
    return drive(run, folder, asked, resume=resume, machine=look())


@pytest.mark.parametrize(
    "values", [{}, {"bnb_4bit_quant_type": "fp4"}, {"method": "lora"}, {"gradient_checkpointing": "false"}, {"lora_dropout": 0.1}]
)
def test_every_base_learns(run_of: Make, tmp_path: Path, values: dict[str, Any]) -> None:
    ran = on_gpu(run_of(**values), tmp_path / "run")
    assert ran.error is None
    assert ran.of(Planned)[0].choices["optim"] == "adamw_8bit"  # paging is for memory that is short
    assert ran.of(Planned)[0].choices["dtype"] == "bfloat16"
    assert ran.losses[-1] < ran.losses[0] - 0.5
    assert ran.of(Evaluated)[-1].drop > 0.5


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_8bit", "adamw_torch"])
def test_resume_goes_on_as_if_nothing_happened(run_of: Make, tmp_path: Path, optim: str) -> None:
    run = run_of(optim=optim, lora_dropout=0.1, lora_r=32)
    whole = on_gpu(run, tmp_path / "whole")
    again = on_gpu(run, tmp_path / "again")
    noise = max(abs(a - b) for a, b in zip(whole.losses, again.losses, strict=True))
    part = on_gpu(run, tmp_path / "part", Asked({5: "stop"}))
    rest = on_gpu(run, tmp_path / "part", resume=True)
    assert rest.of(Resumed)[0].to_step == 5
    gap = max(abs(a - b) for a, b in zip(whole.losses, part.losses + rest.losses, strict=True))
    assert gap <= max(4 * noise, 1e-3)


def test_any_split_of_a_step_is_one_trajectory_in_bfloat16(run_of: Make, tmp_path: Path) -> None:
    whole = on_gpu(run_of(per_device_train_batch_size=4, gradient_accumulation_steps=1), tmp_path / "whole")
    split = on_gpu(run_of(per_device_train_batch_size=1, gradient_accumulation_steps=4), tmp_path / "split")
    assert whole.losses == pytest.approx(split.losses, abs=3e-2)


def test_plain_peft_gives_the_tuned_loss(run_of: Make, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from qlora_tui.engine.data import load as load_data
    from qlora_tui.engine.data import load_tokenizer, prepare
    from qlora_tui.engine.load import quantization

    run = run_of(max_steps=10)
    ran = on_gpu(run, tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(
        run.model_name_or_path, dtype=torch.bfloat16, device_map={"": 0}, quantization_config=quantization(run, torch.bfloat16)
    )
    tuned = PeftModel.from_pretrained(base, ran.folder / "adapter").eval()
    nll, tokens = 0.0, 0
    for row in prepare(run, load_data(run), load_tokenizer(Path(run.model_name_or_path))).holdout:
        ids, kept = torch.tensor(list(row.input_ids)).cuda(), torch.tensor(list(row.trained), dtype=torch.bool)[1:].cuda()
        with torch.no_grad():
            logits = tuned(input_ids=ids[None]).logits[0, :-1].float()
        nll += float(torch.nn.functional.cross_entropy(logits[kept], ids[1:][kept], reduction="sum"))
        tokens += int(kept.sum())
    assert nll / tokens == pytest.approx(ran.of(Evaluated)[-1].loss, abs=2e-2)


def test_running_out_of_memory_is_a_sentence(run_of: Make, tmp_path: Path) -> None:
    """The limit is the allocator's own, below the weights alone, so this is a real out-of-memory error."""
    try:
        ran = on_gpu(run_of(memory_limit_gib=0.01), tmp_path / "run")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert isinstance(ran.error, WontFit)
    assert "max_length" in str(ran.error)


def test_memory_is_counted(run_of: Make, tmp_path: Path) -> None:
    ran = on_gpu(run_of(max_steps=2), tmp_path / "run")
    last = ran.of(Stepped)[-1]
    assert 0 < last.memory_allocated_bytes <= last.memory_peak_bytes <= last.memory_reserved_bytes
