"""The only room that knows transformers' and PEFT's loaders: a folder in, a model ready to train out.

Lean from the start: head, embeddings and norms stay in the type they were loaded in (PEFT's usual
preparation upcasts them, which costs 2 GiB and a quarter of the speed on an 8 B model), and only the
adapter is float32.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.logging import disable_progress_bar

from qlora_tui.engine.batches import Batch, Blocks, collate, pack
from qlora_tui.engine.compat import TOWER_LAYERS
from qlora_tui.engine.data import TokenRow
from qlora_tui.engine.errors import ModelError
from qlora_tui.engine.families import FAMILIES
from qlora_tui.engine.fast import compiled, eightbit, eightload, pissa
from qlora_tui.engine.fast.eightbit import TYPES, EightBit
from qlora_tui.engine.fast.lora import ADAPTER, fuse, start_lengths
from qlora_tui.engine.fast.loss import Head
from qlora_tui.engine.fast.offload import Offload, streams_of
from qlora_tui.engine.fast.recompute import recompute
from qlora_tui.engine.fast.scores import settle_masks
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.onebyte import asked_gradients
from qlora_tui.engine.sizes import compute_type
from qlora_tui.engine.spec import RunConfig, checkpointed_of, offloads

_WITHOUT_MASK = "sdpa_without_mask"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A base with its adapter on a device. `decoder` gives hidden states, `head` turns them into logits."""

    model: PeftModel
    decoder: torch.nn.Module
    head: Head
    device: torch.device
    dtype: torch.dtype
    why_plain: str = ""  # why layers run as transformers has them; empty where they are fused
    why_wide: str = ""  # why gradients that were to be multiplied in 8 bits are in 16
    packs: bool = False  # rows of a batch lie end to end

    @property
    def caps_scores(self) -> bool:
        """Whether fused layers attend with a kernel of capped scores, for which no mask is ever made."""
        return not self.why_plain and _caps_scores(self.model.config)

    def batch(self, rows: Sequence[TokenRow]) -> Batch:
        """Return `rows` on the device: end to end where that is wanted, else padded."""
        return (pack if self.packs else collate)(rows, self.device)

    def hidden(self, input_ids_BT: torch.Tensor, blocks: Blocks | None = None) -> torch.Tensor:
        """Return the last hidden states [B, T, H]; with `blocks`, of rows that lie end to end.

        No attention mask: rows are right-padded and attention is causal, so padding never reaches a real
        token, and without a mask the flash kernel runs where the family allows it. Fused layers know windows and
        blocks themselves; a mask of four dimensions is passed through to them as it is, and an empty one keeps
        transformers from making its own.

        Raises:
            ValueError: there are blocks and layers are not fused, so nothing would keep the rows apart.
        """
        more: dict[str, Any] = {}
        if not self.why_plain and (blocks is not None or self.device.type == "cuda" or self.caps_scores):
            more = {"attention_mask": torch.empty(1, 1, 0, 0, device=self.device)}
        if blocks is not None:
            if self.why_plain:
                raise ValueError(f"rows lie end to end for fused layers only: {self.why_plain}")
            more |= {"position_ids": blocks.places_1T, "blocks": blocks}
        states: torch.Tensor = self.decoder(input_ids=input_ids_BT, use_cache=False, **more).last_hidden_state
        return states


def choose_dtype(run: RunConfig, machine: Machine) -> torch.dtype:
    """Return the type of computation as torch has it."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[compute_type(run, machine)]


def load(run: RunConfig, folder: Path, machine: Machine) -> Loaded:
    """Load the base of `run` from `folder`, quantized as asked, and put a fresh adapter on it.

    Whatever its kind, the adapter starts as a no-op, so the first measurement is the base's.

    Raises:
        ModelError: the weights cannot be loaded, or the head does more than a product.
    """
    device = torch.device("cuda", 0) if machine.kind == "cuda" else torch.device("cpu")
    dtype = choose_dtype(run, machine)
    settle_masks()
    base = _base(run, folder, device, dtype)
    why_wide = _narrow_gradients(base, asked_gradients(run, machine), device)
    base.config.use_cache = False
    torch.manual_seed(run.seed)
    random.seed(run.seed)  # nothing here draws from it, and a checkpoint holds it: two runs should hold the same
    model = get_peft_model(base, adapter_config(run, base), adapter_name=ADAPTER, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    why_plain = _fuse_layers(run, model, base.get_decoder(), device, dtype)
    settle_layers(run, base.get_decoder().layers, device)
    fuse(model)
    start_lengths(model)
    if run.init_lora_weights == "pissa":
        pissa.start(model)
    packs = run.packing == "on" and not why_plain
    loaded = Loaded(model, base.get_decoder(), _head(base), device, dtype, why_plain, why_wide, packs)
    _check_head(loaded, base)
    return loaded


def _narrow_gradients(base: torch.nn.Module, asked: str, device: torch.device) -> str:
    """Tell layers of an 8-bit base what gradients are multiplied in, and return why not in what was `asked`."""
    layers = [module for module in base.modules() if isinstance(module, EightBit)]
    kind = next((name for name in TYPES if name == asked), None)
    if not layers or kind is None:
        return ""
    if reason := compiled.why_not(device):
        return reason
    if not eightbit.makes(kind, device):
        return f"this machine's libraries make no products in {kind} on this card"
    for layer in layers:
        layer.narrow = kind
    return ""


def settle_layers(run: RunConfig, layers: torch.nn.ModuleList, device: torch.device) -> None:
    """Make as many layers recompute their inside as `run` says, with their inputs where it says; may be called again."""
    offload = Offload(streams_of(device)) if offloads(run) else None
    recompute(layers, checkpointed_of(run, len(layers)), dropout=run.lora_dropout > 0, offload=offload)


def _fuse_layers(run: RunConfig, model: PeftModel, decoder: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Fuse the decoder's layers where that can be done, and return why not elsewhere."""
    if run.fused_layers == "off":
        return "fused_layers=off"
    if reason := compiled.why_not(device):
        return reason
    if dtype != torch.bfloat16:
        return compiled.NO_BFLOAT16 if dtype == torch.float16 else "they compute in bfloat16 alone"
    if run.attn_implementation == "eager":
        return "attention that holds its scores goes layer by layer"
    from qlora_tui.engine.fast import layers  # imports Triton

    if reason := layers.why_not(model):
        return reason
    layers.fuse_layers(decoder)
    return ""


def attend_without_mask(loaded: Loaded) -> None:
    """Never make a mask for attention: right for rows padded on the right of which every layer sees the whole.

    transformers leaves it out too, but not while a CUDA graph is recorded: a dense mask costs memory and the flash kernel.
    """
    AttentionInterface.register(_WITHOUT_MASK, sdpa_attention_forward)
    loaded.model.get_base_model().set_attn_implementation(_WITHOUT_MASK)


def adapter_config(run: RunConfig, base: Any) -> LoraConfig:
    """Return PEFT's description of the adapter of `run` on `base`."""
    return LoraConfig(
        r=run.lora_r,
        lora_alpha=run.lora_alpha,
        lora_dropout=run.lora_dropout,
        target_modules=_targets(run, base),
        use_rslora=run.use_rslora,
        use_dora=run.use_dora,
        task_type="CAUSAL_LM",
        bias="none",
    )


def quantization(run: RunConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return how the base is quantized, or None for a 16-bit base."""
    if run.method in ("lora", "lora-8bit"):
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


def _targets(run: RunConfig, base: Any) -> str | list[str]:
    """Return which modules get an adapter, as PEFT reads it.

    In a model that also sees, plain names would fit the parts that see as well: other tools would give those an
    adapter too. So its names are tied to the text part.
    """
    everything = run.lora_target_modules == ("all-linear",)
    if base.config.get_text_config() is base.config:
        return "all-linear" if everything else list(run.lora_target_modules)
    linears = (name for name, part in base.get_decoder().layers.named_modules() if isinstance(part, torch.nn.Linear))
    names = sorted({name.rsplit(".", 1)[-1] for name in linears}) if everything else run.lora_target_modules
    return rf"(.*\.)?language_model\..*\.({'|'.join(re.escape(name) for name in names)})"


def _base(run: RunConfig, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the frozen base; only safetensors are read and no code of the folder is run."""
    disable_progress_bar()  # it writes to the terminal that the screen or the printer owns
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # loaders warn about what is checked below or is of no use to a person
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            in_4_bits = quantization(run, dtype)
            text_alone = config.get_text_config() is config
            stored = config.to_dict().get("quantization_config")
            if run.method == "lora-8bit":
                return eightload.read(folder, config, device, dtype, _attention(run, config))
            base = (AutoModelForCausalLM if text_alone else AutoModelForImageTextToText).from_pretrained(
                folder,
                config=config if text_alone else _without_layers_that_see(config),
                dtype=dtype,
                device_map={"": device},
                attn_implementation=_attention(run, config),
                quantization_config=None if stored else in_4_bits,  # what is stored in 4 bits is not quantized again
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
            )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(f"the model cannot be loaded: {error}", where=str(folder)) from error
    if not text_alone:
        for name in [name for name, _ in base.model.named_children() if name != "language_model"]:
            delattr(base.model, name)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            _settle(module, dtype)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
        if stored and parameter.is_floating_point() and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.to(dtype)  # the loader leaves the 16-bit parts in the type they were stored in
        if device.type == "cpu" and in_4_bits and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.clone()  # one tensor that lies in the file keeps all of it mapped, and counted as ours
    return base


def _attention(run: RunConfig, config: Any) -> str:
    """Return the attention that transformers is to use: of capped scores it has one kind, whatever fused layers do in its place."""
    return "eager" if _caps_scores(config) else run.attn_implementation


def _caps_scores(config: Any) -> bool:
    family = FAMILIES.get(config.get_text_config().model_type)
    return family is not None and family.soft_caps


def _without_layers_that_see(config: Any) -> Any:
    """Return `config` with a vision tower of no layers: its weights are then never read, let alone loaded.

    The loader must find the tower, or it would not know the names of the text part.
    """
    for name in TOWER_LAYERS:
        if hasattr(config.vision_config, name):  # a tower calls its number of layers by one of the two
            setattr(config.vision_config, name, 0)  # by the name found
    return config


def _settle(module: Linear4bit, dtype: torch.dtype) -> None:
    """Make a 4-bit layer compute in `dtype`, whatever the type it was stored with, and never repack its weights.

    On CPUs with AVX512-BF16 bitsandbytes repacks weights in place in eval mode and does not undo it: every
    gradient after the first evaluation would be wrong.
    """
    module.support_avx512bf16_for_cpu = False
    module.compute_dtype = module.weight.quant_state.dtype = dtype


def _head(base: Any) -> Head:
    output, said = base.get_output_embeddings(), base.config.get_text_config().to_dict()
    cap, divisor = said.get("final_logit_softcapping"), said.get("logits_scaling")
    bias = output.bias.detach() if output.bias is not None else None
    return Head(output.weight.detach(), bias, float(cap) if cap else None, float(divisor) if divisor else 1.0)


def _check_head(loaded: Loaded, base: Any) -> None:
    """Compare our logits with the model's own on a few tokens: a family that scales them otherwise is refused, not guessed."""
    ids = torch.arange(3, 11, device=loaded.device)[None] % base.config.get_text_config().vocab_size
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
