"""The lean operations against the plain ones they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qlora_tui.engine.fast import lora, loss
from qlora_tui.engine.load import load
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.spec import from_values


def _adapted(folder: Path, *, quantized: bool, dropout: float = 0.0) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config if quantized else None)
    for module in base.modules():
        module.support_avx512bf16_for_cpu = False  # on such processors PEFT's own forward would compute in bfloat16
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # a fresh lora_B is zero, which would hide every mistake in A's gradient
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def _gradients(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    logits = model(input_ids=ids).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("quantized", [False, True], ids=["16-bit base", "nf4 base"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_operation_gives_pefts_outputs_and_gradients(tiny_model: Path, quantized: bool, dropout: float) -> None:
    ids = torch.arange(40).reshape(2, 20) * 5 % 256
    plain = _adapted(tiny_model, quantized=quantized, dropout=dropout)
    fused = _adapted(tiny_model, quantized=quantized, dropout=dropout)
    assert lora.fuse(fused) == 14
    expected, expected_grads = _gradients(plain, ids)
    found, found_grads = _gradients(fused, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found_grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(found_grads[name], grad, rtol=1e-3, atol=1e-6, msg=name)


def test_switching_the_adapter_off_gives_the_base(tiny_model: Path) -> None:
    ids = torch.arange(12)[None]
    model = _adapted(tiny_model, quantized=False)
    lora.fuse(model)
    with torch.no_grad(), model.disable_adapter():
        off = model(input_ids=ids).logits
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(off, base)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_chunked_losses_equal_full_logits(monkeypatch: pytest.MonkeyPatch, softcap: float | None) -> None:
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 50 * 7)  # seven tokens a chunk, so that borders are crossed
    torch.manual_seed(0)
    weight, labels = torch.randn(50, 16), torch.randint(0, 50, (23,))
    hidden = torch.randn(23, 16, requires_grad=True)
    scale = torch.rand(23)
    losses = loss.token_losses(hidden, loss.Head(weight, softcap=softcap), labels)
    (found,) = torch.autograd.grad((losses * scale).sum(), hidden)
    logits = hidden @ weight.T
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    expected_losses = F.cross_entropy(logits, labels, reduction="none")
    (expected,) = torch.autograd.grad((expected_losses * scale).sum(), hidden)
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("divisor", [8.0, 0.5])
def test_logits_that_a_family_divides_are_divided_and_so_are_their_gradients(divisor: float) -> None:
    torch.manual_seed(0)
    weight, labels, hidden = torch.randn(50, 16), torch.randint(0, 50, (23,)), torch.randn(23, 16, requires_grad=True)
    head = loss.Head(weight, divisor=divisor)
    losses = loss.token_losses(hidden, head, labels, 7)
    (found,) = torch.autograd.grad(losses.sum(), hidden)
    expected_losses = F.cross_entropy(hidden @ weight.T / divisor, labels, reduction="none")
    (expected,) = torch.autograd.grad(expected_losses.sum(), hidden)
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(head.logits(hidden), hidden @ weight.T / divisor)


def test_a_granite_model_with_all_its_factors_can_be_trained(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    factors = {"logits_scaling": 8.0, "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "attention_multiplier": 0.0156}
    config = AutoConfig.for_model("granite", vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape, **factors)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    run = from_values({"model_name_or_path": str(tmp_path), "data": ("x",), "method": "lora", "gradient_checkpointing": "false"})
    loaded = load(run, tmp_path, Machine("cpu", "cpu", 1 << 33, cores=1))
    ids = torch.randint(3, 100, (1, 12))
    ours = loss.token_losses(loaded.hidden(ids)[0, :-1], loaded.head, ids[0, 1:]).mean()
    torch.testing.assert_close(ours, model.eval()(input_ids=ids, labels=ids).loss)


def test_a_head_with_a_bias_is_used_with_it() -> None:
    weight, bias, hidden = torch.randn(9, 4), torch.randn(9), torch.randn(3, 4)
    losses = loss.token_losses(hidden, loss.Head(weight, bias), torch.tensor([0, 4, 8]))
    torch.testing.assert_close(losses, F.cross_entropy(hidden @ weight.T + bias, torch.tensor([0, 4, 8]), reduction="none"))
