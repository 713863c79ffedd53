"""LLaMA-Factory's YAML, JSON and command lines. Sources: its argument reference, its page on datasets, and its example configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_tui.engine.data import registry
from qlora_tui.engine.foreign import huggingface as hf
from qlora_tui.engine.foreign import trainer
from qlora_tui.engine.foreign.datasets import hub_name
from qlora_tui.engine.foreign.ledger import CHANGES, Ledger
from qlora_tui.engine.foreign.source import is_set, shown
from qlora_tui.engine.foreign.table import Tool, defaults, read
from qlora_tui.engine.places import is_here
from qlora_tui.engine.values import Value


def _start(ledger: Ledger) -> None:
    hf.refuse_other(ledger, "stage", ("sft", "pt"))


def _stage(ledger: Ledger, path: str, value: Any) -> None:
    if value == "pt":
        ledger.map(path, "data_format", "text", "whole texts are trained on")
    else:
        ledger.drop(path, "supervised fine-tuning is all that is done")


def _kind(ledger: Ledger, path: str, value: Any) -> None:
    if value == "lora":
        ledger.drop(path, "an adapter is trained here in any case")
    else:
        ledger.drop(path, f"{shown(path, value)} is not here: an adapter is trained, not the weights", CHANGES)


def _bits(ledger: Ledger, path: str, value: Any) -> None:
    bits = int(hf.number(value))
    if bits == 4:
        ledger.map(path, "method", "qlora")
    elif bits == 8:
        hf.eight_bits(ledger, path, value)
    else:
        ledger.change(path, "method", "qlora", f"a base of {shown(path, value)} bits is not here, one of 4 is")


def _quantizer(ledger: Ledger, path: str, value: Any) -> None:
    if str(value).lower() in ("bnb", "bitsandbytes"):
        ledger.drop(path, "as it is here too")
    else:
        ledger.drop(path, "the base is quantized by bitsandbytes", CHANGES)


def _flash(ledger: Ledger, path: str, value: Any) -> None:
    known = {"auto": "sdpa", "sdpa": "sdpa", "disabled": "eager"}
    if str(value) in known:
        ledger.map(path, "attn_implementation", known[str(value)])
    else:
        hf.attention(ledger, path, value)


def _template(ledger: Ledger, path: str, value: Any) -> None:
    if value == "chatml":
        ledger.map(path, "chat_template", "chatml")
    else:
        told = hf.OWN_TEMPLATE
        ledger.change(path, "chat_template", "auto", told)


def _names(value: Any) -> list[str]:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(part).strip() for part in parts if str(part).strip()]


def _folder(ledger: Ledger) -> Path:
    """Return the folder of datasets: as named from here, or else from beside the config, or from the folder above that."""
    named = Path(str(ledger.get("dataset_dir") or "data"))
    beside = ledger.source.path.parent
    for folder in (named, beside / named, *(above / named for above in beside.absolute().parents[:3])):
        if is_here(folder / registry.FILE):
            return folder
    return beside if is_here(beside / registry.FILE) else named


def _data(ledger: Ledger, path: str, value: Any, key: str) -> None:
    names = _names(value)
    if not names:
        ledger.map(path, key, value)
        return
    if str(ledger.get("dataset_dir")) == "ONLINE":
        found = [hub_name(name, "") for name in names]
    else:
        file = _folder(ledger) / registry.FILE
        found = [f"{file}:{name}" for name in names]
        if not is_here(file):
            ledger.note(
                f"Its datasets are names in a {registry.FILE}, and there is none in {file.parent} or beside the config: put it there."
            )
    if key == "data":
        ledger.map(path, key, found)
    elif len(found) == 1:
        ledger.map(path, key, found[0])
    else:
        ledger.change(path, key, found[0], "rows to measure on come from one place; the first is used")


def _train_data(ledger: Ledger, path: str, value: Any) -> None:
    _data(ledger, path, value, "data")


def _eval_data(ledger: Ledger, path: str, value: Any) -> None:
    _data(ledger, path, value, "eval_data")


def _most(ledger: Ledger, path: str, value: Any) -> None:
    sets = max(1, len(_names(ledger.get("dataset"))))
    told = "so many rows are taken by seed, training and held-out together, not the first ones of each dataset"
    ledger.change(path, "max_samples", int(hf.number(value)) * sets, told) if hf.number(value) >= 1 else ledger.map(
        path, "max_samples", value
    )


def _shares(ledger: Ledger, path: str, value: Any) -> None:
    ledger.map(path, "data_weights", [str(share) for share in _names(value)])


def _mix(ledger: Ledger, path: str, value: Any) -> None:
    if value == "concat":
        ledger.drop(path, "as it is here too")
    else:
        ledger.drop(path, "data_weights says how much of each; a smaller one is repeated", CHANGES)


def _thinking(ledger: Ledger, path: str, value: Any) -> None:
    ledger.drop(path, "thoughts are trained on as the model's own template writes them", CHANGES if value is False else "harmless")


TABLE = read(
    "llamafactory",
    "settings",
    rules={
        "stage": _stage,
        "finetuning_type": _kind,
        "quantization_bit": _bits,
        "quantization_method": _quantizer,
        "lora_target": hf.layers,
        "pissa_init": hf.switch("init_lora_weights", "pissa"),
        "flash_attn": _flash,
        "disable_gradient_checkpointing": hf.switch("gradient_checkpointing", "false"),
        "template": _template,
        "dataset": _train_data,
        "eval_dataset": _eval_data,
        "max_samples": _most,
        "interleave_probs": _shares,
        "mix_strategy": _mix,
        "enable_thinking": _thinking,
        "pure_bf16": hf.brain_float,
        "infer_dtype": hf.number_type,
        "train_on_prompt": hf.as_here(False, "only answers are trained on, never the prompt"),
        "subcommand": hf.as_here("train", "training is all that is imported"),
    },
)


def _list_of_datasets(ledger: Ledger, path: str, value: Any) -> None:
    if str(value).lower().endswith((".yaml", ".yml")):
        ledger.drop(path, "its list of datasets is not read here: name the files with --data", CHANGES)
    else:
        ledger.map(path, "data", value)


V1 = read(
    "llamafactory",
    "next",
    rules={
        **{f"peft_config.{name}": rule for name, rule in trainer.ADAPTER.rules.items()},
        "peft_config.name": _kind,
        "quant_config.quantization_bit": _bits,
        "quant_config.name": _quantizer,
        "global_batch_size": hf.whole_batch,
        "enable_activation_checkpointing": hf.recompute,
        "train_dataset": _list_of_datasets,
    },
)
"""The settings of LLaMA-Factory's next version, which has its own names."""
_V1_DEFAULTS: dict[str, Value] = {"per_device_train_batch_size": 1, "learning_rate": 1e-4}


def _finish(ledger: Ledger) -> None:
    rank = int(hf.number(ledger.values.get("lora_r"), 8))
    ledger.default("method", "lora", "without quantization_bit the base has 16 bits")
    ledger.default("lora_r", 8)
    ledger.default("lora_alpha", min(2 * rank, 4096), "default of LLaMA-Factory: twice the rank")
    taken: dict[str, Value] = {
        **trainer.TRAINER_DEFAULTS,
        **(_V1_DEFAULTS if ledger.has("model") else {}),
        "max_length": 2048,
        "too_long": "cut",
        "val_set_size": 0.0,
        "lora_target_modules": ("all-linear",),
    }
    defaults(ledger, taken)
    if is_set(ledger.get("stage")) and ledger.get("stage") == "pt":
        ledger.note("Stage pt joins texts into blocks of cutoff_len; here each text is a row of its own.")


_SIGNS = """
model_class peft_config.name dist_config.name kernel_config.name quant_config.name train_dataset
stage finetuning_type cutoff_len template lora_rank lora_target quantization_bit dataset dataset_dir val_size
quantization_method double_quantization flash_attn preprocessing_num_workers plot_loss neat_packing pissa_init
overwrite_cache mask_history train_on_prompt eval_dataset additional_target enable_thinking
"""
LLAMAFACTORY = Tool(
    name="llamafactory",
    title="LLaMA-Factory",
    signs=frozenset(_SIGNS.split()),
    programs=frozenset(("llamafactory-cli", "train_bash.py", "llamafactory")),
    table=trainer.TRAINER | V1 | TABLE,
    start=_start,
    finish=_finish,
)
