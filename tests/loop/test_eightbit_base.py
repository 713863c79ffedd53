"""Training on a base at one byte a weight: it learns what a 16-bit base learns, and its adapter is an adapter like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_model, write_tokenizer
from loop_driver import drive
from safetensors.torch import load_file, save_file

from qlora_tui.engine.errors import ModelError
from qlora_tui.engine.events import Evaluated, Sampled, Stepped
from qlora_tui.engine.fast import eightbit
from qlora_tui.engine.fast.eightbit import EightBit
from qlora_tui.engine.load import load
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.rules import problems
from qlora_tui.engine.spec import RunConfig, from_values

Make = Callable[..., RunConfig]
CPU = Machine("cpu", "cpu", 1 << 34, cores=1)


def test_it_learns_what_a_16_bit_base_learns_and_better_than_a_4_bit_one(run_of: Make, tmp_path: Path) -> None:
    starts = dict[str, float]()
    for method in ("lora", "lora-8bit", "qlora"):
        ran = drive(run_of(method=method, max_steps=20), tmp_path / method)
        assert ran.error is None
        starts[method] = ran.of(Evaluated)[0].loss
        if method == "lora":
            whole = [step.loss for step in ran.of(Stepped)]
        elif method == "lora-8bit":
            assert [step.loss for step in ran.of(Stepped)] == pytest.approx(whole, abs=0.03)
    assert abs(starts["lora-8bit"] - starts["lora"]) < 0.5 * abs(starts["qlora"] - starts["lora"])


def test_its_adapter_loads_anywhere_and_the_model_speaks(run_of: Make, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = run_of(method="lora-8bit", sample_prompts=("say 3",))
    ran = drive(run, tmp_path / "run")
    assert ran.error is None
    assert ran.of(Sampled)
    base = AutoModelForCausalLM.from_pretrained(run.model_name_or_path)
    model = PeftModel.from_pretrained(base, tmp_path / "run/adapter")
    moved = {name.split(".lora_B.")[0].rsplit(".", 1)[1] for name, part in model.named_parameters() if "lora_B" in name and part.any()}
    assert moved >= {"q_proj", "down_proj"}


def test_layers_alone_are_in_8_bits_and_the_tied_head_stays_tied(tiny_model: Path) -> None:
    run = from_values({"model_name_or_path": str(tiny_model), "data": ("x",), "method": "lora-8bit"})
    loaded = load(run, tiny_model, CPU)
    base = loaded.model.get_base_model()
    linears = [module for module in base.modules() if isinstance(module, torch.nn.Linear) and module.weight.shape[0] > run.lora_r]
    assert sum(isinstance(module, EightBit) for module in linears) == 7 * len(base.get_decoder().layers)
    assert base.get_input_embeddings().weight.dtype == torch.float32
    tied = base.config.tie_word_embeddings
    assert (base.get_input_embeddings().weight.data_ptr() == base.get_output_embeddings().weight.data_ptr()) is tied


def test_a_file_without_a_weight_is_refused_by_its_name(tmp_path: Path) -> None:
    write_model(tmp_path)
    write_tokenizer(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    run = from_values({"model_name_or_path": str(tmp_path), "data": ("x",), "method": "lora-8bit"})
    with pytest.raises(ModelError, match=r"no weight called .*layers\.1\.mlp\.up_proj\.weight"):
        load(run, tmp_path, CPU)


def test_pissa_needs_more_than_8_bits(run_of: Make) -> None:
    (problem,) = problems(run_of(method="lora-8bit", init_lora_weights="pissa"))
    assert "fewer bits" in problem.message


def test_gradients_stay_in_16_bits_where_a_library_has_no_such_product(
    run_of: Make, tmp_path: Path, narrow_on_cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {"method": "lora-8bit", "dtype": "bfloat16"}
    wanted = drive(run_of(**usual, grad_matmul="16bit"), tmp_path / "16bit")
    assert eightbit.makes(narrow_on_cpu, torch.device("cpu"))  # type: ignore[arg-type]
    monkeypatch.setattr(eightbit, "narrow_product", refused)
    eightbit.makes.cache_clear()
    found = drive(run_of(**usual), tmp_path / "auto")
    eightbit.makes.cache_clear()
    assert found.error is None
    assert found.losses == wanted.losses


def refused(*given: Any) -> Any:
    raise RuntimeError("no such product")


@pytest.mark.parametrize("more", [{}, {"fused_layers": "off"}, {"use_dora": True}], ids=["fused", "plain", "dora"])
def test_gradients_in_8_bits_learn_what_16_bits_learn(run_of: Make, tmp_path: Path, narrow_on_cpu: str, more: dict[str, Any]) -> None:
    losses = dict[str, list[float]]()
    for name, values in {"lora": {"method": "lora"}, "16bit": {"grad_matmul": "16bit"}, "auto": {}}.items():
        run = run_of(**{"method": "lora-8bit", "dtype": "bfloat16", "gradient_checkpointing": "1", "max_steps": 20, **more, **values})
        ran = drive(run, tmp_path / name)
        assert ran.error is None
        losses[name] = [step.loss for step in ran.of(Stepped)]
    assert losses["auto"] == pytest.approx(losses["lora"], abs=0.05)
    assert len({tuple(each) for each in losses.values()}) == 3
    assert losses["auto"][-1] < losses["auto"][0] - 0.3
