"""The only room that knows transformers' and PEFT's loaders: a folder in, a model ready to train out.

Lean from the start: head, embeddings and norms stay in the type they were loaded in (PEFT's usual
preparation upcasts them, which costs 2 GiB and a quarter of the speed on an 8 B model), and only the
adapter is float32.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from qlora_tui.engine.errors import ModelError
from qlora_tui.engine.fast.lora import ADAPTER, fuse
from qlora_tui.engine.fast.loss import Head
from qlora_tui.engine.fast.recompute import recompute
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.spec import RunConfig


@dataclass(frozen=True, slots=True)
class Loaded:
    """A base with its adapter on a device. `decoder` gives hidden states, `head` turns them into logits."""

    model: PeftModel
    decoder: torch.nn.Module
    head: Head
    device: torch.device
    dtype: torch.dtype

    def hidden(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states [B, T, H].

        No attention mask: rows are right-padded and attention is causal, so padding never reaches a real
        token, and without a mask the flash kernel runs where the family allows it.
        """
        states: torch.Tensor = self.decoder(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        return states


def choose_dtype(run: RunConfig, machine: Machine) -> torch.dtype:
    """Return the type of computation: bfloat16 where the device computes in it, else float32."""
    if run.dtype == "auto":
        return torch.bfloat16 if machine.kind == "cuda" and machine.bf16 else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[run.dtype]


def load(run: RunConfig, folder: Path, machine: Machine) -> Loaded:
    """Load the base of `run` from `folder`, quantized as asked, and put a fresh adapter on it.

    The adapter starts as a no-op (`lora_B` is zero), so the first measurement is the base's.

    Raises:
        ModelError: the weights cannot be loaded, or the head does more than a product.
    """
    device = torch.device("cuda", 0) if machine.kind == "cuda" else torch.device("cpu")
    dtype = choose_dtype(run, machine)
    base = _base(run, folder, device, dtype)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 bitsandbytes repacks weights in place in eval mode and does not undo it:
            # every gradient after the first evaluation would be wrong.
            module.support_avx512bf16_for_cpu = False
    base.config.use_cache = False
    torch.manual_seed(run.seed)
    model = get_peft_model(base, adapter_config(run), adapter_name=ADAPTER, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if run.gradient_checkpointing:
        recompute(base.get_decoder().layers, dropout=run.lora_dropout > 0)
    fuse(model)
    loaded = Loaded(model, base.get_decoder(), _head(base), device, dtype)
    _check_head(loaded, base)
    return loaded


def adapter_config(run: RunConfig) -> LoraConfig:
    """Return PEFT's description of the adapter of `run`."""
    targets: str | list[str] = "all-linear" if run.lora_target_modules == ("all-linear",) else list(run.lora_target_modules)
    return LoraConfig(
        r=run.lora_r, lora_alpha=run.lora_alpha, lora_dropout=run.lora_dropout, target_modules=targets, task_type="CAUSAL_LM", bias="none"
    )


def quantization(run: RunConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return how the base is quantized, or None for a 16-bit base."""
    if run.method != "qlora":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=run.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=run.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are trained, by name, in a fixed order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _base(run: RunConfig, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the frozen base; only safetensors are read and no code of the folder is run."""
    disable_progress_bar()  # it writes to the terminal that the screen or the printer owns
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # loaders warn about what is checked below or is of no use to a person
            base = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                device_map={"": device},
                attn_implementation=run.attn_implementation,
                quantization_config=quantization(run, dtype),
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
            )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(f"the model cannot be loaded: {error}", where=str(folder)) from error
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    return base


def _head(base: Any) -> Head:
    output = base.get_output_embeddings()
    cap = base.config.to_dict().get("final_logit_softcapping")
    return Head(output.weight.detach(), output.bias.detach() if output.bias is not None else None, float(cap) if cap else None)


def _check_head(loaded: Loaded, base: Any) -> None:
    """Compare our logits with the model's own on a few tokens: a family that scales them otherwise is refused, not guessed."""
    ids = torch.arange(3, 11, device=loaded.device)[None] % base.config.vocab_size
    loaded.model.eval()
    with torch.no_grad():
        ours = loaded.head.logits(loaded.hidden(ids)[0])
        theirs = base(input_ids=ids, use_cache=False).logits[0].float()
    loaded.model.train()
    if not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max())):
        raise ModelError(
            f"{base.config.model_type} computes its logits in a way this engine does not know",
            hint="training it would optimise something else than what it is used for",
        )
