"""Merging into the original weights, held against PEFT's own merge; what does not belong together is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_model, write_tokenizer
from safetensors.torch import load_file, save_file

from qlora_tui.engine import checkpoint
from qlora_tui.engine.data import load_tokenizer
from qlora_tui.engine.errors import CheckpointError, ModelError
from qlora_tui.engine.export.merge import merge
from qlora_tui.engine.hub import listed
from qlora_tui.engine.load import load, trainable
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.spec import from_values

CPU = Machine(name="CPU", kind="cpu", total_bytes=8 << 30, others_bytes=0, bf16=False)
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 259,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 64},
    "phi3": {},
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa", "use_rslora": True},
    {"lora_target_modules": ("q_proj", "down_proj"), "lora_alpha": 7, "lora_r": 5},
]


def write_family(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **FAMILIES[kind]})
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder, **saving)
    write_tokenizer(folder)
    return folder


def write_adapter(base: Path, folder: Path, **values: Any) -> Path:
    """An adapter of ours on `base` whose every part was moved, saved as a run saves it."""
    run = from_values({"model_name_or_path": str(base), "method": "lora", "gradient_checkpointing": "false", **values})
    loaded = load(run, base, CPU)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(loaded.model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return checkpoint.write_adapter(folder, loaded.model, str(base), load_tokenizer(base))


def merged(adapter: Path, base: Path, out: Path) -> dict[str, torch.Tensor]:
    out.mkdir()
    merge(adapter, base, listed(base), out, lambda done, total: None, lambda: None)
    return {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def by_peft(adapter: Path, base: Path) -> dict[str, torch.Tensor]:
    """PEFT's merge in float32, of any model of the folder."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(base)
    kind = AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText
    model = PeftModel.from_pretrained(kind.from_pretrained(base, dtype=torch.float32), adapter)
    return dict(model.merge_and_unload().state_dict())


@pytest.mark.parametrize("values", VARIANTS, ids=lambda values: "-".join(f"{name}={value}" for name, value in values.items()) or "plain")
def test_every_kind_of_adapter_is_merged_as_peft_merges_it(tmp_path: Path, values: dict[str, Any]) -> None:
    base = write_family("llama", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "run", **values)
    found, expected, before = merged(adapter, base, tmp_path / "out"), by_peft(adapter, base), load_file(base / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    moved = [name for name, tensor in found.items() if not torch.equal(tensor, before[name])]
    assert len(moved) == (4 if "lora_target_modules" in values else 14)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_merged_as_peft_merges_it(tmp_path: Path, kind: str) -> None:
    base = write_family(kind, tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "run")
    found, expected = merged(adapter, base, tmp_path / "out"), by_peft(adapter, base)
    for name, tensor in found.items():  # a tied head is no tensor of the file
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl"])
def test_the_text_part_of_a_model_that_sees_is_merged_and_the_rest_is_copied(tmp_path: Path, kind: str) -> None:
    from test_variants import write_seeing

    base = write_seeing(kind, tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "run")
    found, before = merged(adapter, base, tmp_path / "out"), load_file(base / "model.safetensors")
    moved = [name for name, tensor in found.items() if not torch.equal(tensor, before[name])]
    assert len(moved) == 14
    assert not [name for name in moved if "vis" in name]
    from transformers import AutoConfig, AutoModelForImageTextToText

    for name in ("config.json",):
        shutil.copyfile(base / name, tmp_path / "out" / name)
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == kind
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, tensor in by_peft(adapter, base).items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_types_names_and_shards_stay_and_rounding_happens_once(tmp_path: Path, dtype: torch.dtype) -> None:
    base = write_family("llama", tmp_path / "base", dtype=dtype, max_shard_size="60KB")
    assert len(listed(base)) > 2
    adapter = write_adapter(base, tmp_path / "run")
    found, expected = merged(adapter, base, tmp_path / "out"), by_peft(adapter, base)
    assert {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()} == {
        name: (base / name).stat().st_size for name in listed(base)
    }
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        steps = (tensor.float() - expected[name]).abs() / expected[name].abs().clamp(min=1e-3)
        assert float(steps.max()) <= 2 * torch.finfo(dtype).eps, name


def test_progress_counts_bytes_and_a_wish_to_stop_ends_it(tmp_path: Path) -> None:
    base = write_family("llama", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "run")
    told: list[tuple[int, int]] = []
    (tmp_path / "out").mkdir()
    merge(adapter, base, listed(base), tmp_path / "out", lambda done, total: told.append((done, total)), lambda: None)
    size = (base / "model.safetensors").stat().st_size
    assert told == sorted(told)
    assert told[-1] == (size, size)

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        merge(adapter, base, listed(base), tmp_path / "out", lambda done, total: None, stop)


def broken(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(name for name in tensors if "lora_A" in name)


def test_what_is_no_sound_lora_is_refused(tmp_path: Path) -> None:
    base = write_family("llama", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "run")
    broken(adapter, lambda tensors: tensors[first(tensors)].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="not finite"):
        merged(adapter, base, tmp_path / "a")
    broken(adapter, lambda tensors: tensors.update({"base_model.model.odd": tensors.pop(first(tensors))}))
    with pytest.raises(CheckpointError, match="of a kind that is not merged"):
        merged(adapter, base, tmp_path / "b")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        merged(adapter, base, tmp_path / "c")


def test_another_base_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = write_family("llama", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "run")
    write_model(tmp_path / "fewer", num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"no weights for the adapter's layer model\.layers\.1"):
        merged(adapter, tmp_path / "fewer", tmp_path / "a")
    write_model(tmp_path / "wider", hidden_size=128, intermediate_size=96)
    with pytest.raises(ModelError, match="another shape"):
        merged(adapter, tmp_path / "wider", tmp_path / "b")


def test_weights_that_are_no_numbers_of_16_bits_are_refused(tmp_path: Path) -> None:
    base = write_family("llama", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "run")
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**weights, name: weights[name].to(torch.uint8)}, base / "model.safetensors")
    with pytest.raises(ModelError, match="stored as U8: there are no 16-bit weights"):
        merged(adapter, base, tmp_path / "out")


def test_a_merged_weight_that_its_type_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = write_family("llama", tmp_path / "base", dtype=torch.float16)
    adapter = write_adapter(base, tmp_path / "run")
    broken(adapter, lambda tensors: tensors[first(tensors)].fill_(1e6))
    with pytest.raises(ModelError, match="holds numbers that F16 cannot"):
        merged(adapter, base, tmp_path / "out")


def test_ranks_by_layer_are_refused(tmp_path: Path) -> None:
    base = write_family("llama", tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "run")
    said = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**said, "rank_pattern": {"q_proj": 2}}))
    with pytest.raises(CheckpointError, match="different kinds"):
        merged(adapter, base, tmp_path / "out")
