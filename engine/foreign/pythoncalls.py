"""What scripts around TRL and Unsloth give to their calls: loading, adapter, quantization, trainer and data.

Names are those of `scripts.CALLS`: `load.` for from_pretrained, `peft.` for LoraConfig, `trainer.` for SFTTrainer, and so on.
"""

from __future__ import annotations

from typing import Any

from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.foreign import huggingface as hf
from qlora_tui.engine.foreign import trainer
from qlora_tui.engine.foreign.datasets import LOADERS, files_of, hub_name, part_of_name
from qlora_tui.engine.foreign.ledger import CHANGES, EXPRESSION, Ledger
from qlora_tui.engine.foreign.source import Code, is_set
from qlora_tui.engine.foreign.table import defaults, read
from qlora_tui.engine.text import one_line

_OBJECT = "an object of the script; what it is made with is read where it is made"


def refuse_preferences(ledger: Ledger) -> None:
    """Refuse a script that trains on preferences or rewards.

    Raises:
        ConfigError: it does, and has no SFTTrainer.
    """
    paths = {ledger.source.name(path).partition(".")[0]: path.partition(".")[0] for path in ledger.source.leaves}
    if "preference" in paths and "trainer" not in paths:
        told = f"it is for {one_line(paths['preference'], limit=40)}, and only supervised fine-tuning is done here"
        raise ConfigError(told, where=one_line(ledger.source.path))


def _object(ledger: Ledger, path: str, value: Any) -> None:
    if isinstance(value, Code):
        ledger.drop(path, _OBJECT)
    else:
        ledger.drop(path, "it says nothing of a run here")


def _model(ledger: Ledger, path: str, value: Any) -> None:
    """Take a model by its name; an object was loaded elsewhere."""
    if isinstance(value, Code):
        ledger.drop(path, _OBJECT)
    else:
        ledger.map(path, "model_name_or_path", value)


def _named(ledger: Ledger) -> str:
    name = ledger.get("data.path")
    return hub_name(name, ledger.get("data.split") or "", ledger.get("data.name") or "") if isinstance(name, str) else ""


def _path(ledger: Ledger, path: str, value: Any) -> None:
    if value in LOADERS:
        ledger.drop(path, "the kind of file is told by its ending")
    else:
        ledger.map(path, "data", _named(ledger) or value)


def _part(ledger: Ledger, path: str, value: Any) -> None:
    if ledger.get("data.path") in LOADERS:
        ledger.drop(path, "a file has no parts")
    else:
        part_of_name(ledger, path, "data", _named(ledger))


def _files(ledger: Ledger, path: str, value: Any) -> None:
    if ledger.get("data.path") in LOADERS:
        ledger.map(path, "data", files_of(value) or value)
    else:
        ledger.drop(path, "which files of the dataset are read cannot be said here", CHANGES)


def _text_field(ledger: Ledger, path: str, value: Any) -> None:
    if value == "text":
        ledger.drop(path, "the script writes the texts; here rows are read as their source holds them, in the model's own template")
    elif value == "":
        ledger.drop(path, "not set")
    else:
        text_column(ledger, path, value)


def text_column(ledger: Ledger, path: str, value: Any) -> None:
    """Take the column of whole texts to train on."""
    ledger.map(path, "data_columns", [f"text={value}"] if isinstance(value, str) else value)
    if "data_columns" in ledger.values:
        ledger.default("data_format", "text", "the column that it names holds whole texts")


def _template(ledger: Ledger, path: str, value: Any) -> None:
    if value == "chatml":
        ledger.map(path, "chat_template", "chatml")
    else:
        ledger.change(path, "chat_template", "auto", hf.OWN_TEMPLATE)


def _length(ledger: Ledger, path: str, value: Any) -> None:
    """Take a length that stands in several calls; the trainer's own counts."""
    for name in ("max_length", "max_seq_length", "trainer.max_seq_length", "load.max_seq_length"):
        if ledger.source.name(path) == name:
            break
        if is_set(ledger.get(name)) and not isinstance(ledger.get(name), Code):
            same = ledger.get(name) == value
            ledger.drop(path, "the trainer's own length counts", "harmless" if same else CHANGES)
            return
    ledger.map(path, "max_length", value)


def _held_out(ledger: Ledger, path: str, value: Any) -> None:
    ledger.map(path, "val_set_size", value)


def _quantization(ledger: Ledger, path: str, value: Any) -> None:
    if isinstance(value, Code):
        ledger.drop(path, _OBJECT)
    else:
        ledger.drop(path, EXPRESSION, CHANGES)


_ADAPTER = {f"peft.{name}": what for name, what in trainer.ADAPTER.rules.items()}
TABLE = read(
    "pythoncalls",
    "calls",
    rules={
        **_ADAPTER,
        "load.model_name": _model,
        "load.pretrained_model_name_or_path": _model,
        "trainer.model": _model,
        "load.load_in_4bit": hf.switch("method", "qlora"),
        "load.load_in_8bit": hf.eight_bits,
        "load.load_in_16bit": hf.switch("method", "lora"),
        "bnb.load_in_4bit": hf.switch("method", "qlora"),
        "bnb.load_in_8bit": hf.eight_bits,
        "bnb.bnb_4bit_compute_dtype": hf.number_type,
        "load.dtype": hf.number_type,
        "load.torch_dtype": hf.number_type,
        "model_init_kwargs.dtype": hf.number_type,
        "model_init_kwargs.torch_dtype": hf.number_type,
        "load.attn_implementation": hf.attention,
        "model_init_kwargs.attn_implementation": hf.attention,
        "load.quantization_config": _quantization,
        "trainer.quantization_config": _quantization,
        "peft.use_gradient_checkpointing": hf.recompute,
        "data.path": _path,
        "data.data_files": _files,
        "data.data_files.train": _files,
        "data.split": _part,
        "data.name": _part,
        "split.test_size": _held_out,
        "load.max_seq_length": _length,
        "trainer.max_seq_length": _length,
        "max_length": _length,
        "max_seq_length": _length,
        "trainer.dataset_text_field": _text_field,
        "dataset_text_field": _text_field,
        "template.chat_template": _template,
        **{
            f"trainer.{name}": _object for name in ("args", "train_dataset", "eval_dataset", "tokenizer", "processing_class", "peft_config")
        },
        **{f"peft.{name}": _object for name in ("model", "peft_config")},
        **dict.fromkeys(("template.tokenizer", "responses.trainer"), _object),
    },
)


def finish(ledger: Ledger) -> None:
    """Take what PEFT and bitsandbytes take for granted in a script that makes their configs itself."""
    names = {ledger.source.name(path).partition(".")[0] for path in ledger.source.leaves}
    if "bnb" in names and ledger.values.get("method") == "qlora":
        defaults(ledger, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False})
    if "peft" not in names:
        ledger.note("It makes no adapter: all the weights would be trained, and here an adapter is trained.")
    else:
        defaults(ledger, {"lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0})
