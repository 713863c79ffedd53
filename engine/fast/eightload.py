"""A text model read from its files a tensor at a time, each linear layer quantized to 8 bits as it arrives.

So neither the card nor the memory of the machine ever holds the model in 16 bits: what is there at once is what was quantized
already, and one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from qlora_tui.engine.errors import ModelError
from qlora_tui.engine.fast.eightbit import EightBit
from qlora_tui.engine.text import one_line

_INDEX, _WHOLE, _GENERATION = "model.safetensors.index.json", "model.safetensors", "generation_config.json"


def read(folder: Path, config: Any, device: torch.device, dtype: torch.dtype, attention: str) -> Any:
    """Return the base on `device`: linear layers of its decoder in 8 bits, the rest in `dtype`.

    Raises:
        ModelError: a model with other parts than text, or files that do not hold every weight.
    """
    if config.get_text_config() is not config:
        raise ModelError("an 8-bit base is made of text models alone", hint="say method=qlora, or method=lora", where=str(folder))
    with init_empty_weights():
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention, trust_remote_code=False)
    inside = {id(module) for module in base.get_decoder().layers.modules() if isinstance(module, torch.nn.Linear)}
    names = {name for name, _ in base.named_parameters()}
    for key, tensor in _tensors(folder):
        name = key if key in names else f"{base.base_model_prefix}.{key}"
        if name not in names:
            continue  # such as a head that is the embeddings, or places that are computed
        path, _, part = name.rpartition(".")
        parent, _, child = path.rpartition(".")
        module = base.get_submodule(path)
        value = tensor.to(device, dtype)
        if part == "weight" and id(module) in inside:
            made = EightBit(value, None)
            made.register_parameter("bias", module.bias)
            base.get_submodule(parent).register_module(child, made)
        else:
            module.register_parameter(part, torch.nn.Parameter(value, requires_grad=False))
        del tensor, value
    return _settled(base, folder, device)


def _settled(base: Any, folder: Path, device: torch.device) -> Any:
    """Share what is shared, move what is computed, and make sure that nothing is missing."""
    base.tie_weights()
    if missing := next((name for name, parameter in base.named_parameters() if parameter.device.type == "meta"), ""):
        raise ModelError(f"its files hold no weight called {one_line(missing, limit=80)}", where=str(folder))
    for module in base.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    if (folder / _GENERATION).is_file():
        base.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    return base.eval()


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of a checkpoint with its name, one at a time; a file that its index does not name is not read."""
    index = folder / _INDEX
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [_WHOLE]
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no dictionary
                yield name, opened.get_tensor(name)
