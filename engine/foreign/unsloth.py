"""Unsloth: scripts and notebooks around FastLanguageModel, its small command line, and the YAML of its studio.

Sources: Unsloth's documentation of its parameters, its notebooks' usual form, its studio's configs and command line.
"""

from __future__ import annotations

from typing import Any

from qlora_tui.engine.foreign import huggingface as hf
from qlora_tui.engine.foreign import pythoncalls, trainer
from qlora_tui.engine.foreign.datasets import hub_name, part_of_name
from qlora_tui.engine.foreign.ledger import CHANGES, Ledger
from qlora_tui.engine.foreign.source import is_set
from qlora_tui.engine.foreign.table import Tool, defaults, read
from qlora_tui.engine.values import Value

_STUDIO: dict[str, Value] = {
    "lora_r": 64,
    "lora_alpha": 16,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 3.0,
    "learning_rate": 2e-4,
    "warmup_steps": 5.0,
    "weight_decay": 0.01,
    "seed": 3407,
}
_COMMAND: dict[str, Value] = {**_STUDIO, "lora_r": 16, "max_steps": 400, "num_train_epochs": 1.0}
_PATCHED: dict[str, Value] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.001,
    "optim": "adamw_8bit",
    "seed": 3407,
}
"""What Unsloth puts in the place of SFTConfig's own defaults; TrainingArguments keeps transformers'."""
_FORMATS = {"auto": "auto", "alpaca": "alpaca", "chatml": "messages", "sharegpt": "sharegpt"}


def _format(ledger: Ledger, path: str, value: Any) -> None:
    ledger.map(path, "data_format", _FORMATS.get(str(value), value))


def _kind(ledger: Ledger, path: str, value: Any) -> None:
    if str(value).lower().startswith(("lora", "qlora")):
        ledger.drop(path, "an adapter is trained here in any case")
    else:
        ledger.drop(path, "all the weights would be trained; here an adapter is", CHANGES)


def _whole(ledger: Ledger, path: str, value: Any) -> None:
    if value is True:
        ledger.drop(path, "as it is here too: answers are trained on")
    else:
        ledger.drop(path, "whole chats would be trained on; here only answers are", CHANGES)


def _never(ledger: Ledger, path: str, value: Any) -> None:
    """Take save_steps of 0, which means never there and our own choice here."""
    hf.cadence(ledger, path, "save_steps", value, "about ten times a run")


def _measured(ledger: Ledger, path: str, value: Any) -> None:
    hf.cadence(ledger, path, "eval_steps", value, "about five times a run")


def _epochs(ledger: Ledger, path: str, value: Any) -> None:
    if not is_set(value) and is_set(ledger.get("training.max_steps")):
        ledger.drop(path, "max_steps says how long")
    else:
        ledger.map(path, "num_train_epochs", value)


def _four_bits(ledger: Ledger, path: str, value: Any) -> None:
    if value is False:
        ledger.drop(path, "off: the base has 16 bits")
    else:
        hf.switch("method", "qlora")(ledger, path, value)


def _dataset(ledger: Ledger, path: str, value: Any) -> None:
    ledger.map(path, "data", hub_name(value, subset=ledger.get("data.subset") or "") if isinstance(value, str) else value)


def _subset(ledger: Ledger, path: str, value: Any) -> None:
    name = ledger.get("data.dataset")
    part_of_name(ledger, path, "data", hub_name(name, subset=value) if isinstance(name, str) else "")


_warm_steps, _warm_share = hf.warmup("training.lr_scheduler_type", "training.")
STUDIO = read(
    "unsloth",
    "studio",
    rules={
        "data.dataset": _dataset,
        "data.subset": _subset,
        "data.local_dataset": _dataset,
        "data.format_type": _format,
        "training.training_type": _kind,
        "training.load_in_4bit": _four_bits,
        "training.num_epochs": _epochs,
        "training.warmup_steps": _warm_steps,
        "training.warmup_ratio": _warm_share,
        "training.eval_steps": _measured,
        "training.max_steps": hf.steps_at_most,
        "training.save_steps": _never,
        "training.train_on_completions": _whole,
        "training.gradient_checkpointing": hf.recompute,
        "training.optim": hf.optimizer,
        "training.lr_scheduler_type": hf.schedule,
        "lora.target_modules": hf.layers,
    },
)


_PARTS = {
    "finetune_attention_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "finetune_mlp_modules": ("gate_proj", "up_proj", "down_proj"),
}


def _part(ledger: Ledger, path: str, value: Any) -> None:
    """Take a switch of a part of the layers; off, it leaves out layers, where none are named."""
    place, _, _ = ledger.source.name(path).rpartition(".")
    if value is not False:
        ledger.drop(path, "on, as it is unless told")
    elif is_set(ledger.get(f"{place}.target_modules")):
        ledger.drop(path, "lora_target_modules names the layers")
    else:
        out = [name for part, names in _PARTS.items() if ledger.get(f"{place}.{part}") is False for name in names]
        ledger.map(path, "lora_target_modules", [name for name in hf.ALL_SEVEN if name not in out])


def _language(ledger: Ledger, path: str, value: Any) -> None:
    if value is False:
        ledger.drop(path, "the adapter is on the language model", CHANGES)
    else:
        ledger.drop(path, "on, as it is unless told")


SCRIPT = read(
    "unsloth",
    "script",
    rules={
        **{f"{place}.{name}": _part for place in ("peft", "lora") for name in _PARTS},
        "peft.finetune_language_layers": _language,
        "lora.finetune_language_layers": _language,
        "load.load_in_4bit": _four_bits,
        "load_in_4bit": _four_bits,
        "dataset": _dataset,
        "bias": hf.no_bias,
        "use_gradient_checkpointing": hf.recompute,
        "dtype": hf.number_type,
        "load.use_gradient_checkpointing": hf.recompute,
    },
)


def _start(ledger: Ledger) -> None:
    pythoncalls.refuse_preferences(ledger)


def _finish(ledger: Ledger) -> None:
    names = {ledger.source.name(path).partition(".")[0] for path in ledger.source.leaves}
    studio = ledger.source.kind in ("YAML", "JSON")
    four = "training.load_in_4bit" if studio else "load.load_in_4bit" if "load" in names else "load_in_4bit"
    ledger.default("method", "lora" if ledger.get(four) is False else "qlora")
    adapter: dict[str, Value] = {"lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_modules": hf.ALL_SEVEN}
    patched = any(path.startswith("SFTConfig") for path in ledger.source.leaves)
    command = ledger.source.kind == "command line"
    taken = _STUDIO if studio else _COMMAND if command else _PATCHED if patched else {}
    if studio or command:
        taken = {"optim": "adamw_8bit", **taken}
    common: dict[str, Value] = {**trainer.TRAINER_DEFAULTS, "max_length": 2048, "too_long": "cut", "val_set_size": 0.0}
    defaults(ledger, {**adapter, **common, **taken})
    if not studio and "responses" not in names:
        ledger.note("It does not call train_on_responses_only: whole chats would be trained on, and here only answers are.")
    if any(path.startswith("FastVisionModel") for path in ledger.source.leaves):
        ledger.note("It loads a model that also sees; its text part alone is trained here.")


_SIGNS = """
training.max_seq_length training.training_type training.load_in_4bit training.random_seed training.train_on_completions
training.num_epochs training.batch_size data.format_type data.dataset lora.lora_r lora.target_modules lora.use_loftq
logging.enable_wandb
"""
UNSLOTH = Tool(
    name="unsloth",
    title="Unsloth",
    signs=frozenset(_SIGNS.split()),
    programs=frozenset(("unsloth", "unsloth-cli.py")),
    table=trainer.TRAINER | pythoncalls.TABLE | SCRIPT | STUDIO,
    start=_start,
    finish=_finish,
)
