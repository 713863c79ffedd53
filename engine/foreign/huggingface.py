"""What TRL, LLaMA-Factory and Unsloth share: the arguments of transformers' trainer, PEFT's adapters and bitsandbytes.

Sources: the documentation of transformers' TrainingArguments, PEFT's LoraConfig and bitsandbytes' configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.foreign.ledger import CHANGES, EXPRESSION, HARMLESS, Ledger
from qlora_tui.engine.foreign.source import Code, is_set, shown
from qlora_tui.engine.foreign.table import Rule
from qlora_tui.engine.text import one_line

ALL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT_CHOICE = ("q_proj", "v_proj")
"""PEFT's own layers for Llama, Mistral, Qwen and Gemma, where none are named."""

OWN_TEMPLATE = "the model's own template is used; it is the same where the model belongs to it"
USUAL_START = "it starts as no change at all, in PEFT's usual way"

_OPTIMIZERS: Mapping[str, tuple[str, str]] = {
    "adamw_torch": ("adamw_torch", ""),
    "adamw_torch_fused": ("adamw_torch", ""),
    "adamw_hf": ("adamw_torch", ""),
    "adamw_8bit": ("adamw_8bit", ""),
    "adamw_bnb_8bit": ("adamw_8bit", ""),
    "paged_adamw_8bit": ("paged_adamw_8bit", ""),
    "paged_adamw": ("adamw_torch", "the same arithmetic; only its states do not move to the machine's memory when the card is full"),
    "paged_adamw_32bit": ("adamw_torch", "the same arithmetic; only its states do not move to the machine's memory when the card is full"),
    "ao_adamw_8bit": ("adamw_8bit", "AdamW with 8-bit states of another library"),
    "ao_adamw_4bit": ("adamw_8bit", "AdamW with states of 4 bits is not here; 8 bits is nearest"),
}
"""Names of AdamW by ours, and what differs; an empty reason: the same."""

_SCHEDULES: Mapping[str, tuple[str, str]] = {
    "cosine": ("cosine", ""),
    "linear": ("linear", ""),
    "constant": ("constant", ""),
    "constant_with_warmup": ("constant", ""),
    "cosine_with_restarts": ("cosine", "no restarts; with one cycle, as it is unless told, both are the same"),
    "cosine_with_min_lr": ("cosine", "it falls to zero, not to a lowest rate"),
    "cosine_warmup_with_min_lr": ("cosine", "it falls to zero, not to a lowest rate"),
    "polynomial": ("linear", "a polynomial of power 1, as it is unless told, is linear; it ends at zero"),
    "reduce_lr_on_plateau": ("constant", "the rate does not follow the measurements"),
    "warmup_stable_decay": ("linear", "it falls from the end of warm-up on, not at the end alone"),
}
_TYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "auto": "auto"}
_KERNELS = "its kernel is chosen by torch: flash attention where the model and the card allow it"
_WORD = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


def optimizer(ledger: Ledger, path: str, value: Any) -> None:
    """Give the optimizer by its usual names; another one than AdamW is not here."""
    _by_name(ledger, path, "optim", value, _OPTIMIZERS, ("auto", "is not here, AdamW is; another learning rate may suit it"))


def schedule(ledger: Ledger, path: str, value: Any) -> None:
    """Give the course of the learning rate by its usual names."""
    _by_name(ledger, path, "lr_scheduler_type", value, _SCHEDULES, ("cosine", "is not here; cosine falls to zero over the run"))


def _by_name(ledger: Ledger, path: str, key: str, value: Any, names: Mapping[str, tuple[str, str]], other: tuple[str, str]) -> None:
    """Give `key` the name that stands for `value` here, and say what differs; one without takes `other`, a name and the reason."""
    known = names.get(str(value))
    if isinstance(value, Code):
        ledger.map(path, key, value)
    elif known is None:
        ledger.change(path, key, other[0], f"{shown(path, value)} {other[1]}")
    elif known[1]:
        ledger.change(path, key, *known)
    else:
        ledger.map(path, key, known[0])


def warmup(schedule_name: str, place: str = "") -> tuple[Rule, Rule]:
    """Return what reads steps and share of warm-up, for a tool that calls its schedule `schedule_name`; they stand at `place`.

    Steps win over a share where both are set, and a schedule called `constant` has no warm-up, whatever is set.
    """

    def steps(ledger: Ledger, path: str, value: Any) -> None:
        if not value and ledger.get(f"{place}warmup_ratio"):
            ledger.drop(path, "warmup_ratio says how much")
        elif ledger.get(schedule_name) == "constant" and is_set(value):
            ledger.change(path, "warmup_steps", 0.0, "their schedule called constant has no warm-up, whatever is set")
        else:
            ledger.map(path, "warmup_steps", value)

    def share(ledger: Ledger, path: str, value: Any) -> None:
        if ledger.get(f"{place}warmup_steps"):
            ledger.drop(path, "warmup_steps says how much")
        elif ledger.get(schedule_name) == "constant" and is_set(value):
            ledger.change(path, "warmup_steps", 0.0, "their schedule called constant has no warm-up, whatever is set")
        elif number(value) >= 1:
            ledger.drop(path, "a share of 1 or more leaves nothing after warm-up", CHANGES)
        else:
            ledger.map(path, "warmup_steps", value)

    return steps, share


def steps_at_most(ledger: Ledger, path: str, value: Any) -> None:
    """Give the number of steps; -1 and 0 both mean: by epochs."""
    ledger.map(path, "max_steps", 0 if number(value, 1) <= 0 else value)


def brain_float(ledger: Ledger, path: str, value: Any) -> None:
    """Give bf16: true, auto, or as the device has it."""
    if isinstance(value, Code):
        _as_the_device_has_it(ledger, path)
    elif value == "auto" or value is True:
        ledger.map(path, "dtype", "auto" if value == "auto" else "bfloat16")
    else:
        ledger.drop(path, "off: it does nothing")


def half_float(ledger: Ledger, path: str, value: Any) -> None:
    """Give fp16, which is chosen where a device has nothing better."""
    if isinstance(value, Code):
        _as_the_device_has_it(ledger, path)
    elif is_set(value):
        ledger.change(path, "dtype", "auto", "bfloat16 where the device has it, float16 on older cards")
    else:
        ledger.drop(path, "off: it does nothing")


def _as_the_device_has_it(ledger: Ledger, path: str) -> None:
    """Take a question to the device, as scripts ask it; another setting may have answered it."""
    if "dtype" in ledger.values:
        ledger.drop(path, "dtype is told by another setting")
    else:
        ledger.map(path, "dtype", "auto", "bfloat16 where the device has it")


def number_type(ledger: Ledger, path: str, value: Any) -> None:
    """Give the type that a base is loaded in; the type of computation is what counts here."""
    word = (value.text if isinstance(value, Code) else str(value)).rsplit(".", 1)[-1]
    if word in _TYPES:
        ledger.map(path, "dtype", _TYPES[word])
    elif word in ("float16", "fp16", "half"):
        half_float(ledger, path, True)
    elif word == "none":
        ledger.drop(path, "not set")
    elif isinstance(value, Code) or word in ("float32", "fp32", "float"):
        ledger.drop(path, "the base lies in memory in the type of computation (dtype)")
    else:
        ledger.map(path, "dtype", value)


def attention(ledger: Ledger, path: str, value: Any) -> None:
    """Give the attention; kernels by name are torch's choice."""
    if value in ("sdpa", "eager"):
        ledger.map(path, "attn_implementation", value)
    else:
        ledger.change(path, "attn_implementation", "sdpa", _KERNELS)


def recompute(ledger: Ledger, path: str, value: Any) -> None:
    """Give the recomputing of activations: memory against time, never another result."""
    word = str(value).lower()
    if isinstance(value, Code):
        ledger.drop(path, "it is computed; as it changes no result, gradient_checkpointing chooses")
    elif word in ("true", "false"):
        ledger.map(path, "gradient_checkpointing", word)
    elif word in ("none", "no"):
        ledger.map(path, "gradient_checkpointing", "false")
    else:
        ledger.change(path, "gradient_checkpointing", "true", "all layers recompute; nothing is moved to the machine's memory")


def layers(ledger: Ledger, path: str, value: Any) -> None:
    """Give the layers with an adapter: a list, names with commas, or a word for all of them."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    names = [part.strip() if isinstance(part, str) else part for part in parts if not isinstance(part, str) or part.strip()]
    if not names:
        ledger.drop(path, "not set")
    elif names in (["all"], ["all-linear"], ["all_linear"]):
        ledger.map(path, "lora_target_modules", "all-linear")
    elif isinstance(value, str) and not all(_WORD.fullmatch(name) for name in names):
        ledger.change(path, "lora_target_modules", "all-linear", "a pattern is not read here, names are; all linear layers get an adapter")
    elif any(name in ("lm_head", "embed_tokens") for name in names):
        kept = [name for name in names if name not in ("lm_head", "embed_tokens")]
        ledger.change(
            path, "lora_target_modules", kept or "all-linear", "words going in and out (embed_tokens, lm_head) get no adapter here"
        )
    else:
        ledger.map(path, "lora_target_modules", value if isinstance(value, Code) else names)


def start_of_adapter(ledger: Ledger, path: str, value: Any) -> None:
    """Give how an adapter starts."""
    if value is True or value == "default":
        ledger.map(path, "init_lora_weights", "default")
    elif str(value).startswith("pissa"):
        ledger.map(path, "init_lora_weights", "pissa")
    else:
        ledger.change(path, "init_lora_weights", "default", USUAL_START)


def no_bias(ledger: Ledger, path: str, value: Any) -> None:
    """Give the training of biases, which is not here."""
    if value in ("none", False):
        ledger.drop(path, "biases are not trained here either")
    else:
        ledger.drop(path, "biases stay as they are", CHANGES)


def eight_bits(ledger: Ledger, path: str, value: Any) -> None:
    """Give a base of 8 bits: one byte a weight, by other arithmetic than bitsandbytes'."""
    if value is True or number(value) == 8:
        ledger.map(path, "method", "lora-8bit")
    else:
        ledger.drop(path, "off: it does nothing")


def switch(key: str, value: Any) -> Rule:
    """Return what reads a switch that, on, means `key = value`."""

    def rule(ledger: Ledger, path: str, found: Any) -> None:
        if is_set(found):
            ledger.map(path, key, value if found is True else found)
        else:
            ledger.drop(path, "off: it does nothing")

    return rule


def whole_batch(ledger: Ledger, path: str, value: Any) -> None:
    """Give the rows of a whole step, beside those of a micro-batch."""
    rows = number(ledger.get("micro_batch_size"), 1.0)
    if is_set(ledger.get("gradient_accumulation_steps")):
        ledger.drop(path, "gradient_accumulation_steps and micro_batch_size say it")
    else:
        steps = max(1, int(number(value) // rows)) if rows >= 1 and number(value) >= 1 else value
        ledger.map(path, "gradient_accumulation_steps", steps, "rows a step, by micro_batch_size")


def as_here(value: Any, why: str) -> Rule:
    """Return what drops a setting: without harm where it is `value`, which is what is done here, else with the reason."""

    def rule(ledger: Ledger, path: str, found: Any) -> None:
        same = number(found) == value if isinstance(value, float) else found == value
        ledger.drop(path, "as it is here too" if same else why, HARMLESS if same else CHANGES)

    return rule


def cadence(ledger: Ledger, path: str, key: str, value: Any, times: str) -> None:
    """Give every how many steps something happens; a share of all steps, or nothing, is our own choice."""
    if not is_set(value):
        ledger.drop(path, "off: it does nothing")
    elif 0 < number(value) < 1:
        ledger.change(path, key, 0, f"a share of all steps; here {times}")
    else:
        ledger.map(path, key, value)


def every(key: str, strategy: str, times: str) -> Rule:
    """Return what reads a cadence in steps that counts only where `strategy` says so."""

    def rule(ledger: Ledger, path: str, value: Any) -> None:
        chosen = ledger.get(strategy)
        asked = chosen if chosen is not None else "steps" if key == "save_steps" else "no"
        if str(asked).lower() != "steps":
            ledger.drop(path, f"without {strategy}: steps it does nothing")
        else:
            cadence(ledger, path, key, value, times)

    return rule


def strategy(key: str, steps: str, times: str) -> Rule:
    """Return what reads a strategy: by steps, by epoch, or never."""

    def rule(ledger: Ledger, path: str, value: Any) -> None:
        word = str(value).lower()
        if word == "steps":
            ledger.drop(path, f"{steps} says how often")
        elif word in ("no", "false"):
            ledger.drop(
                path, "a run can only go on from a checkpoint: it is kept, " + times if key == "save_steps" else "off: it does nothing"
            )
        else:
            ledger.change(path, key, 0, times)

    return rule


def refuse_other(ledger: Ledger, name: str, fine: tuple[object, ...] = ()) -> None:
    """Refuse a config of another kind of training, as the setting `name` tells.

    Raises:
        ConfigError: it is none of `fine`.
    """
    value = ledger.get(name)
    if is_set(value) and value not in fine:
        told = f"it is for {shown(name, value)} ({name}), and only supervised fine-tuning is done here"
        raise ConfigError(told, where=one_line(ledger.source.path))


def expression(ledger: Ledger, path: str, value: Any) -> None:
    """Drop what a script computes."""
    ledger.drop(path, EXPRESSION if isinstance(value, Code) else "it says nothing about training")


def number(value: Any, other: float = 0.0) -> float:
    """Return `value` as a number, whatever it is; `other` where it is none."""
    try:
        return float(value) if not isinstance(value, (Code, bool)) else other
    except (TypeError, ValueError, OverflowError):
        return other
