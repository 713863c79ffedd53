"""TRL: YAML and command lines of `trl sft`, and scripts around SFTTrainer.

Sources: TRL's pages on its command line, SFTTrainer, and PEFT; its example config and scripts.
"""

from __future__ import annotations

from typing import Any

from qlora_tui.engine.foreign import huggingface as hf
from qlora_tui.engine.foreign import pythoncalls, trainer
from qlora_tui.engine.foreign.datasets import files_of, hub_name, part_of_name
from qlora_tui.engine.foreign.ledger import CHANGES, Ledger
from qlora_tui.engine.foreign.source import is_set
from qlora_tui.engine.foreign.table import Table, Tool, defaults, read
from qlora_tui.engine.values import Value

_SCRIPTS = ("Python", "notebook")


def _start(ledger: Ledger) -> None:
    hf.refuse_other(ledger, "subcommand", ("sft",))
    pythoncalls.refuse_preferences(ledger)


def _peft(ledger: Ledger, path: str, value: Any) -> None:
    if value is True:
        ledger.drop(path, "an adapter is trained here in any case")
    else:
        ledger.drop(path, "all the weights would be trained; here an adapter is", CHANGES)


def _named(ledger: Ledger, split: str) -> str:
    name = ledger.get("dataset_name")
    return hub_name(name, ledger.get(split) or "", ledger.get("dataset_config") or "") if isinstance(name, str) else ""


def _dataset(ledger: Ledger, path: str, value: Any) -> None:
    ledger.map(path, "data", _named(ledger, "dataset_train_split") or value)


def _part(ledger: Ledger, path: str, value: Any) -> None:
    part_of_name(ledger, path, "data", _named(ledger, "dataset_train_split"))


def _measures(ledger: Ledger) -> bool:
    return isinstance(ledger.get("dataset_name"), str) and ledger.get("eval_strategy") in ("steps", "epoch")


def _measured_split(ledger: Ledger, path: str, value: Any) -> None:
    if _measures(ledger):
        ledger.map(path, "eval_data", _named(ledger, "dataset_test_split"))
    else:
        ledger.drop(path, "without eval_strategy it is not measured")


def _mixture(ledger: Ledger, path: str, value: Any) -> None:
    """Take a part of the name of one dataset of a mixture; all of them are `data`."""
    leaves, names = ledger.source.leaves, []
    for one in (found.removesuffix(".path") for found in leaves if ledger.source.name(found) == "datasets[].path"):
        whole, files = leaves[f"{one}.path"], files_of(leaves.get(f"{one}.data_files"))
        if isinstance(whole, str):
            names += files or [hub_name(whole, leaves.get(f"{one}.split") or "", leaves.get(f"{one}.name") or "")]
    ledger.map(path, "data", names or value)


def _no_limit(ledger: Ledger, path: str, value: Any) -> None:
    if value is None:
        ledger.change(path, "max_length", 8192, "a length is needed here: rows over it are cut")
    else:
        ledger.map(path, "max_length", value)


def _end(ledger: Ledger, path: str, value: Any) -> None:
    if value == "keep_start":
        ledger.map(path, "too_long", "cut")
    else:
        ledger.change(path, "too_long", "cut", "the end of a long row is cut off, not its start")


def _share_held_out(ledger: Ledger, path: str, value: Any) -> None:
    ledger.map(path, "val_set_size", value)


TABLE = read(
    "trl",
    "settings",
    rules={
        "use_peft": _peft,
        "load_in_4bit": hf.switch("method", "qlora"),
        "load_in_8bit": hf.eight_bits,
        "lora_target_modules": hf.layers,
        "dtype": hf.number_type,
        "torch_dtype": hf.number_type,
        "attn_implementation": hf.attention,
        "dataset_name": _dataset,
        "dataset_train_split": _part,
        "dataset_config": _part,
        "dataset_test_split": _measured_split,
        "datasets[].path": _mixture,
        "datasets[].data_files": _mixture,
        "datasets[].split": _mixture,
        "datasets[].name": _mixture,
        "test_split_size": _share_held_out,
        "max_length": _no_limit,
        "max_seq_length": _no_limit,
        "truncation_mode": _end,
        "completion_only_loss": hf.as_here(True, "only answers are trained on, never the prompt"),
        "assistant_only_loss": hf.as_here(True, "only answers are trained on, never the prompt"),
        "subcommand": hf.as_here("sft", "training is all that is imported"),
        "lora_task_type": hf.as_here("CAUSAL_LM", "causal language models are all there is"),
    },
    nulls=frozenset(("max_length", "max_seq_length")),
)


def _text_field(ledger: Ledger, path: str, value: Any) -> None:
    if value == "text":
        ledger.drop(path, "a column of this name is known by itself")
    else:
        pythoncalls.text_column(ledger, path, value)


def _plain_loss(ledger: Ledger, path: str, value: Any) -> None:
    fine = value in ("nll", "chunked_nll")
    ledger.drop(path, "as it is here too" if fine else "the loss is the plain one", "harmless" if fine else CHANGES)


def _finish(ledger: Ledger) -> None:
    script = ledger.source.kind in _SCRIPTS
    if not script and not is_set(ledger.get("use_peft")):
        ledger.note("It does not set use_peft: TRL would train all the weights, and here an adapter is trained.")
    if script:
        pythoncalls.finish(ledger)
    if _measures(ledger):
        ledger.default("eval_data", hub_name(ledger.get("dataset_name"), "test", ledger.get("dataset_config") or ""))
    ledger.default("method", "lora", "without load_in_4bit the base has 16 bits")
    if ledger.values["method"] == "qlora":
        defaults(ledger, {"bnb_4bit_use_double_quant": False})
    if not ledger.values.get("lora_target_modules"):
        ledger.default("lora_target_modules", hf.PEFT_CHOICE, "PEFT's own layers for Llama, Mistral, Qwen and Gemma")
    adapter: dict[str, Value] = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05} if not script else {}
    taken: dict[str, Value] = {
        **trainer.TRAINER_DEFAULTS,
        **adapter,
        "learning_rate": 2e-5,
        "max_length": 1024,
        "too_long": "cut",
        "val_set_size": 0.0,
    }
    defaults(ledger, taken)
    if not any(ledger.get(name) is True for name in ("completion_only_loss", "assistant_only_loss")):
        ledger.note("TRL trains on whole chats unless told; here only answers are trained on, and of plain texts everything.")


_SIGNS = """
dataset_name dataset_config dataset_train_split dataset_test_split use_peft use_bnb_nested_quant max_length
lora_target_modules lora_r load_in_4bit load_in_8bit bnb_4bit_quant_type model_revision packing_strategy
completion_only_loss assistant_only_loss dataset_text_field dataset_num_proc chat_template_path lora_modules_to_save
lora_task_type max_seq_length torch_dtype packing
"""
TRL = Tool(
    name="trl",
    title="TRL",
    signs=frozenset(_SIGNS.split()),
    programs=frozenset(("trl", "sft.py", "transformers", "peft")),
    table=trainer.TRAINER | pythoncalls.TABLE | TABLE | Table(rules={"dataset_text_field": _text_field, "loss_type": _plain_loss}),
    start=_start,
    finish=_finish,
)
