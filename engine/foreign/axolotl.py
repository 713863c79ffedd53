"""Axolotl's YAML. Sources: its configuration reference, its pages on dataset formats, and its example configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_tui.engine.foreign import huggingface as hf
from qlora_tui.engine.foreign import trainer
from qlora_tui.engine.foreign.datasets import LOADERS, Named, Sources, files_of, hub_name
from qlora_tui.engine.foreign.ledger import CHANGES, Ledger
from qlora_tui.engine.foreign.source import is_set, shown
from qlora_tui.engine.foreign.table import Rule, Tool, defaults, read
from qlora_tui.engine.values import Value

_PROMPT = "the rows are the same, put into the model's own chat template instead of a text of its own around them"
_TYPES: Mapping[str, tuple[str, str]] = {
    "chat_template": ("messages", ""),
    "sharegpt": ("sharegpt", ""),
    "completion": ("text", ""),
    "pretrain": ("text", ""),
    "input_output": ("segments", ""),
    "alpaca": ("alpaca", _PROMPT),
    "alpaca_chat": ("alpaca", _PROMPT),
    "alpaca_w_system": ("alpaca", _PROMPT),
    "gpteacher": ("question-answer", _PROMPT),
    "oasst": ("question-answer", _PROMPT),
    "jeopardy": ("question-answer", _PROMPT),
    "context_qa": ("question-answer", _PROMPT),
    "alpaca_chat.load_qa": ("question-answer", _PROMPT),
    "alpaca_chat.load_camel_ai": ("question-answer", _PROMPT),
    "alpaca_w_system.load_open_orca": ("question-answer", _PROMPT),
}
"""Types of datasets by our formats; where a reason stands, Axolotl writes the prompt as a text of its own."""


def _start(ledger: Ledger) -> None:
    """Refuse what is no supervised fine-tuning; take datasets, whose entries belong together."""
    for name in ("rl", "reward_model", "process_reward_model"):
        hf.refuse_other(ledger, name)
    Sources(ledger, _datasets(ledger, "datasets") + _datasets(ledger, "pretraining_dataset"), _DATASET).take("data")
    Sources(ledger, _datasets(ledger, "test_datasets"), _DATASET).take("eval_data")


def _adapter(ledger: Ledger, path: str, value: Any) -> None:
    if value == "qlora" or (value == "lora" and ledger.get("load_in_4bit") is True):
        ledger.map(path, "method", "qlora")
    elif value == "lora" and not is_set(ledger.get("load_in_8bit")):
        ledger.map(path, "method", "lora")
    elif value == "lora":
        ledger.drop(path, "load_in_8bit says how the base is held")
    else:
        ledger.change(path, "method", "qlora", f"{shown(path, value)} is not here, LoRA is")


def _linear(ledger: Ledger, path: str, value: Any) -> None:
    if value is not True:
        ledger.drop(path, "off: it does nothing")
    elif ledger.has("lora_target_modules") and is_set(ledger.get("lora_target_modules")):
        ledger.map(path, "lora_target_modules", "all-linear", "the layers named beside it are among them")
    else:
        ledger.map(path, "lora_target_modules", "all-linear")


def _modules(ledger: Ledger, path: str, value: Any) -> None:
    if ledger.get("lora_target_linear") is True:
        ledger.drop(path, "lora_target_linear takes all of them")
    elif not is_set(value):
        ledger.drop(path, "not set")
    else:
        hf.layers(ledger, path, value)


def _every(key: str, usual: str) -> Rule:
    return lambda ledger, path, value: hf.cadence(ledger, path, key, value, usual)


def _times(key: str, usual: str) -> Rule:
    def rule(ledger: Ledger, path: str, value: Any) -> None:
        if is_set(value):
            ledger.change(path, key, 0, f"how often an epoch is not told here; {usual}")
        else:
            ledger.drop(path, "off: it does nothing")

    return rule


def _too_long(ledger: Ledger, path: str, value: Any) -> None:
    known = {"drop": "drop", "truncate": "cut"}
    if str(value) in known:
        ledger.map(path, "too_long", known[str(value)])
    else:
        ledger.change(path, "too_long", "drop", "rows over the length are left out and counted; the run does not end for them")


def _template(ledger: Ledger, path: str, value: Any) -> None:
    if value == "tokenizer_default":
        ledger.map(path, "chat_template", "auto")
    elif value == "chatml":
        ledger.map(path, "chat_template", "chatml")
    elif str(value) == "tokenizer_default_fallback_chatml":
        ledger.change(path, "chat_template", "auto", "the model's own; for a model without one say chat_template=chatml")
    else:
        ledger.change(path, "chat_template", "auto", hf.OWN_TEMPLATE)


def _limit(ledger: Ledger, path: str, value: Any) -> None:
    ledger.map(path, "memory_limit_gib", str(value).lower().removesuffix("gib").removesuffix("gb") if isinstance(value, str) else value)


def _whole_texts(ledger: Ledger, path: str, value: Any) -> None:
    ledger.map(path, "data", value)
    if "data" in ledger.values:
        ledger.default("data_format", "text", "whole texts are trained on")


def _flash(name: str) -> Rule:
    def rule(ledger: Ledger, path: str, value: Any) -> None:
        if is_set(value):
            hf.attention(ledger, path, name)
        else:
            ledger.drop(path, "off: it does nothing")

    return rule


def _datasets(ledger: Ledger, prefix: str) -> list[Named]:
    """Take the list of datasets below `prefix` apart, one by one."""
    rows: dict[str, dict[str, str]] = {}
    for path in ledger.source.leaves:
        if path.startswith(f"{prefix}[") and "]." in path:
            place, _, field = path.partition("].")
            rows.setdefault(place, {})[field] = path
    return [_dataset(ledger, fields) for fields in rows.values()]


def _dataset(ledger: Ledger, fields: Mapping[str, str]) -> Named:
    given = {field: ledger.source.leaves[path] for field, path in fields.items()}
    path, files = str(given.get("path") or ""), files_of(given.get("data_files"))
    whole = hub_name(path, given.get("split") or "", given.get("name") or "")
    names = files if files and (path in LOADERS or not path) else [whole] if path else []
    word = str(given.get("type") or "").split(":", 1)[0]
    named = Named(names, fields, *_TYPES.get(word, _TYPES.get(word.split(".", 1)[0], ("", ""))))
    if any(field.startswith("type.") for field in fields):
        named.format, named.why = "alpaca", _PROMPT
    if named.format in ("messages", "sharegpt"):
        messages = str(given.get("field_messages") or ("conversations" if word == "sharegpt" else "messages"))
        named.format = "sharegpt" if messages in _KNOWN["conversations"] else "messages"
    for field, ours in _COLUMNS.items():
        column = given.get(field)
        if isinstance(column, str) and column and column not in _KNOWN.get(ours, (ours,)) and (field != "field" or named.format == "text"):
            named.columns[ours] = named.by_field[field] = column
    return named


_COLUMNS = {
    "field": "text",
    "field_messages": "messages",
    "message_property_mappings.role": "role",
    "message_property_mappings.content": "content",
    "message_field_role": "role",
    "message_field_content": "content",
    "field_tools": "tools",
    "type.field_system": "system",
    "type.field_instruction": "instruction",
    "type.field_input": "input",
    "type.field_output": "output",
}
_KNOWN = {
    "conversations": ("conversations", "conversation"),
    "messages": ("messages", "conversations", "conversation"),
    "role": ("role", "from"),
    "content": ("content", "value"),
}


def _known_column(ledger: Ledger, path: str, value: Any) -> None:
    known = {name for names in (*_KNOWN.values(), _COLUMNS.values()) for name in names}
    if value in known:
        ledger.drop(path, "a column of this name is known by itself")
    else:
        ledger.drop(path, "columns are named once for all data here, and these datasets differ", CHANGES)


def _roles(ledger: Ledger, path: str, value: Any) -> None:
    if isinstance(value, list) and all(role in ("assistant", "gpt") for role in value):
        ledger.drop(path, "as it is here too: answers are trained on")
    else:
        ledger.drop(path, "answers are trained on, whatever roles are named", CHANGES)


_DATASET = read(
    "axolotl",
    "dataset",
    rules={
        "train_on_eos": hf.as_here("turn", "the end of every answer is trained on, and no other"),
        "train_on_eot": hf.as_here("turn", "the end of every answer is trained on, and no other"),
        "roles_to_train": _roles,
        **dict.fromkeys(("field", *_COLUMNS), _known_column),
    },
)


_STEPS, _SHARE = hf.warmup("lr_scheduler")
TABLE = read(
    "axolotl",
    "settings",
    rules={
        "pretraining_dataset": _whole_texts,
        "adapter": _adapter,
        "load_in_4bit": hf.switch("method", "qlora"),
        "load_in_8bit": hf.eight_bits,
        "lora_target_linear": _linear,
        "lora_target_modules": _modules,
        "peft_init_lora_weights": hf.start_of_adapter,
        "batch_size": hf.whole_batch,
        "optimizer": hf.optimizer,
        "lr_scheduler": hf.schedule,
        "warmup_steps": _STEPS,
        "warmup_ratio": _SHARE,
        "eval_steps": _every("eval_steps", "about five times a run"),
        "save_steps": _every("save_steps", "about ten times a run"),
        "evals_per_epoch": _times("eval_steps", "about five times a run"),
        "saves_per_epoch": _times("save_steps", "about ten times a run"),
        "excess_length_strategy": _too_long,
        "chat_template": _template,
        "gpu_memory_limit": _limit,
        "dataset_exact_deduplication": hf.switch("filter_duplicates", "exact"),
        "flash_attention": _flash("flash_attention_2"),
        "xformers_attention": _flash("xformers"),
        "sdp_attention": _flash("sdpa"),
        "flex_attention": _flash("flex_attention"),
        "sage_attention": _flash("sage"),
        "eager_attention": _flash("eager"),
        "attn_implementation": hf.attention,
        "bfloat16": hf.brain_float,
        "float16": hf.half_float,
        "train_on_inputs": hf.as_here(False, "only answers are trained on, never the prompt"),
        "adam_eps": hf.as_here(1e-8, "AdamW's epsilon is 1e-8"),
        "relora": hf.as_here(False, "one adapter is trained from start to end"),
    },
)


def _finish(ledger: Ledger) -> None:
    if not is_set(ledger.get("adapter")):
        ledger.note("It names no adapter: Axolotl would train all the weights, and here an adapter is trained.")
    ledger.default("method", "qlora" if ledger.get("load_in_4bit") is True else "lora")
    if ledger.get("adapter") and not ledger.values.get("lora_target_modules"):
        ledger.default("lora_target_modules", hf.PEFT_CHOICE, "PEFT's own layers for Llama, Mistral, Qwen and Gemma")
    warm = 0.0 if ledger.get("lr_scheduler") == "constant" else 0.03
    taken: dict[str, Value] = {
        "lora_dropout": 0.0, "max_length": 512, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1, "num_train_epochs": 1.0, "optim": "adamw_torch", "lr_scheduler_type": "cosine",
        "warmup_steps": warm, "weight_decay": 0.0, "max_grad_norm": 1.0, "val_set_size": 0.0, "seed": 42,
    }  # fmt: skip
    defaults(ledger, taken)
    for key in ("learning_rate", "lora_r", "lora_alpha"):
        if key not in ledger.values:
            ledger.note(f"It gives no {key}, which Axolotl demands; ours is used.")


_SIGNS = """
base_model micro_batch_size sequence_len num_epochs adapter lora_target_linear sample_packing datasets[].path
datasets[].type dataset_prepared_path lr_scheduler optimizer evals_per_epoch saves_per_epoch pad_to_sequence_len
val_set_size peft_use_dora load_in_4bit load_in_8bit train_on_inputs excess_length_strategy
"""
AXOLOTL = Tool(
    name="axolotl",
    title="Axolotl",
    signs=frozenset(_SIGNS.split()),
    programs=frozenset(("axolotl",)),
    table=trainer.TRAINER | TABLE,
    start=_start,
    finish=_finish,
)
