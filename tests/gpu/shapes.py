"""Random weights in public shapes, made where they are used: what memory and time are measured on without a download.

A checkpoint of 8 B weights takes 40 s to write and read, so only a few cases of the grid do that; the others get a base
that is made on the device, a layer's weight at a time, and already quantized. Both lie in memory alike.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / ".pkg"), str(ROOT / "tests"), str(ROOT / "tests/loop"), str(ROOT / "tests/gpu")]

from qlora_tui.engine.session import settle_libraries  # noqa: E402

settle_libraries()  # before torch is imported, as in any run

import measure  # noqa: E402
import torch  # noqa: E402
from conftest import write_tokenizer  # noqa: E402
from loop_driver import Asked, Ran, drive  # noqa: E402

from qlora_tui.engine import load, measured  # noqa: E402
from qlora_tui.engine.events import Device  # noqa: E402
from qlora_tui.engine.fast.eightbit import EightBit  # noqa: E402
from qlora_tui.engine.machine import Machine, cpu_machine, look  # noqa: E402
from qlora_tui.engine.models import ModelSpec, find  # noqa: E402
from qlora_tui.engine.spec import RunConfig, rows_per_step  # noqa: E402

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 16_384,
}


def use_home(folder: Path) -> None:
    """Keep what is remembered out of the real home, and start with nothing remembered."""
    os.environ["QLORA_TUI_HOME"] = str(folder / "home")
    os.environ["HF_HUB_OFFLINE"] = "1"


def device_of(cpu: bool) -> Machine:
    """Return the machine, looked at before CUDA begins, so that what others hold is known."""
    return cpu_machine() if cpu else look()


def spec_of(shape: str, *, tiny: bool) -> ModelSpec:
    """Return a shape of the catalogue; `tiny` keeps its family alone."""
    spec = find(shape)
    if spec is None:
        raise SystemExit(f"no shape {shape} in the catalogue")
    return dataclasses.replace(spec, **TINY) if tiny else spec


def config_of(spec: ModelSpec) -> Any:
    """Return the Hugging Face config of a shape."""
    from transformers import AutoConfig

    window = {"sliding_window": spec.sliding_window} if spec.sliding_window else {}
    return AutoConfig.for_model(
        spec.family,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_hidden_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.max_position_embeddings,
        tie_word_embeddings=spec.tie_word_embeddings,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        **window,
    )


def write_small_files(folder: Path, spec: ModelSpec) -> None:
    """Write config and tokenizer: all that a run reads before its weights."""
    write_tokenizer(folder)
    config = config_of(spec)
    config.architectures = []
    config.save_pretrained(folder)


def write_checkpoint(folder: Path, spec: ModelSpec, device: torch.device) -> None:
    """Write a whole random checkpoint in bfloat16, to be loaded as any other."""
    from transformers import AutoModelForCausalLM

    with device:
        model = AutoModelForCausalLM.from_config(config_of(spec), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    write_tokenizer(folder)


def random_base(spec: ModelSpec, run: RunConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a frozen base with random weights on `device`, quantized as `run` says, never whole in 16 bits."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        base = AutoModelForCausalLM.from_config(config_of(spec), dtype=dtype, attn_implementation=run.attn_implementation)
    layers = base.get_decoder().layers
    if run.method == "qlora":
        _quantize(layers, run, device, dtype)
        base.is_loaded_in_4bit = True  # PEFT asks the model, not its layers
    elif run.method == "lora-8bit":
        _as_bytes(layers, device, dtype)
    _fill(base, device, dtype)
    base.tie_weights()
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    return base.eval()


def _as_bytes(layers: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    for owner in list(layers.modules()):
        for name, linear in list(owner.named_children()):
            if isinstance(linear, torch.nn.Linear):
                made = EightBit(torch.randn(linear.weight.shape, device=device, dtype=dtype).mul_(0.02), None)
                made.register_parameter("bias", linear.bias)
                setattr(owner, name, made)
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def _quantize(layers: torch.nn.Module, run: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for owner in list(layers.modules()):
        for name, linear in list(owner.named_children()):
            if not isinstance(linear, torch.nn.Linear):
                continue
            made = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype, device="meta")
            weight = torch.randn(linear.weight.shape, device=device, dtype=dtype).mul_(0.02)
            double, kind = run.bnb_4bit_use_double_quant, run.bnb_4bit_quant_type
            made.weight = Params4bit(weight, requires_grad=False, compress_statistics=double, quant_type=kind, module=made).to(device)
            made.support_avx512bf16_for_cpu = False
            setattr(owner, name, made)
            del weight
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the next weight in full width must not be split into what stays


def _fill(base: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter that is still without numbers some, each once however often it is shared, and move the buffers."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in base.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or parameter.device.type != "meta":
                continue
            if id(parameter) not in made:
                numbers = torch.randn(parameter.shape, device=device, dtype=dtype).mul_(0.02)
                made[id(parameter)] = torch.nn.Parameter(numbers if parameter.dim() > 1 else numbers.add_(1.0), requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = buffer.to(device) if buffer is not None else None


@contextmanager
def made_here(spec: ModelSpec) -> Iterator[None]:
    """While inside, runs get a base that is made and not loaded."""
    real = load._base

    def base(run: RunConfig, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
        return random_base(spec, run, device, dtype)

    load._base = base
    try:
        yield
    finally:
        load._base = real


def run_once(run: RunConfig, spec: ModelSpec, folder: Path, machine: Machine, *, steps_of_rows: int = 2) -> Ran:
    """Train `run` in this process on rows as long as it allows, on a base of shape `spec`, or on the checkpoint in its folder.

    The rows are the same in number as two steps need; one micro-batch of them is held out.
    """
    folder.mkdir(parents=True)
    rows = rows_per_step(run) * steps_of_rows
    held = max(1, run.per_device_train_batch_size)
    data = folder / "rows.jsonl"
    measure.rows(data, rows + held, run.max_length)
    model = Path(run.model_name_or_path)
    run = dataclasses.replace(run, data=(str(data),), val_set_size=float(held), runs_dir=str(folder))
    clear()
    if (model / "model.safetensors").exists() or list(model.glob("*.safetensors")):
        ran = drive(run, folder / "run", Asked(), machine=machine, rehearse=True)
    else:
        with made_here(spec):
            ran = drive(run, folder / "run", Asked(), machine=machine, rehearse=True)
    ran.events[:] = [event for event in ran.events if not isinstance(event, Device)]
    shutil.rmtree(folder / "run", ignore_errors=True)
    if ran.error is not None:
        ran.error.__traceback__ = None  # its frames hold the model
        ran.error.__context__ = ran.error.__cause__ = None
    clear()
    return ran


def clear() -> None:
    """Let go of an earlier run: its memory, and bitsandbytes' list of paged buffers, which keeps them for ever."""
    from bitsandbytes.functional import GlobalPageManager

    GlobalPageManager.get_instance().paged_tensors.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # else those of each stream stay, and cut the memory of the next run into pieces
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


def forget_all_but_speed(machine: Machine) -> None:
    """Forget remembered peaks and steps, so that every prediction rests on formulas and on the measured pieces of the card."""
    speed = measured.speed(machine.name)
    home = Path(os.environ["QLORA_TUI_HOME"])
    for file in home.rglob(measured.FILE):
        file.unlink()
    if speed is not None:
        measured.remember_speed(machine.name, measured.versions(), speed)
