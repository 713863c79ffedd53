"""The engines that the parity gate asks: ours, with the adapter as it was trained, and transformers as everybody runs it.

Both compute in one type on one device. Ours is the reference: the same forward pass and the same losses as in training, on
the 16-bit base. The other knows nothing of this program but the files.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

from qlora_tui.engine import evaluate, machine
from qlora_tui.engine.data import TokenRow
from qlora_tui.engine.errors import ModelError, WontFit
from qlora_tui.engine.evaluate import RowLoss
from qlora_tui.engine.export.files import ADAPTER_FILES
from qlora_tui.engine.export.room import Room
from qlora_tui.engine.export.target import Work
from qlora_tui.engine.load import load
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.meter import out_of_memory
from qlora_tui.engine.spec import RunConfig


@dataclass(frozen=True, slots=True)
class Reference:
    """The rows by our engine on the 16-bit base, with the adapter and without."""

    adapter: list[RowLoss]
    base: list[RowLoss]


def reference(work: Work) -> Reference:
    """Measure the rows with the adapter as it was trained, and without it."""
    loaded = load(_as_saved(work), work.source.base, _device(work.room))
    set_peft_model_state_dict(loaded.model, load_file(work.source.adapter / ADAPTER_FILES[1]))
    loaded.model.eval()
    tuned = _drained(evaluate.measure(loaded, work.rows.tokens, 1, work.look), work, "rows by the adapter")
    with loaded.model.disable_adapter():
        base = _drained(evaluate.measure(loaded, work.rows.tokens, 1, work.look), work, "rows by the base")
    del loaded
    _free()
    return Reference(tuned, base)


class Plain:
    """transformers' own model of a folder, loaded for one measurement and let go of."""

    def __init__(self, work: Work, folder: Path, *, adapter: Path | None = None, gguf: str = "") -> None:
        """Say what to load: a folder, an adapter on it for PEFT to put there, or the name of a GGUF file in the folder.

        Of a GGUF file only the weights are read, into a model of the base's config: transformers does not read all that such
        a file says (how positions are stretched, for one), so what it says proves nothing here.
        """
        self._work, self._folder, self._adapter, self._gguf = work, folder, adapter, gguf
        self.words = work.room.words

    def losses(self, rows: Sequence[TokenRow]) -> list[float]:
        """Return nats a supervised token for each row.

        Raises:
            ModelError: transformers cannot load it.
        """
        model = self._loaded()
        found = []
        for row in rows:
            self._work.look()
            found.append(_loss(model, row, self._work.room.device))
            self._work.note(len(found), len(rows), "rows by the export")
        del model
        _free()
        return found

    def _loaded(self) -> Any:
        disable_progress_bar()
        options: dict[str, Any] = {"dtype": self._work.room.dtype, "trust_remote_code": False, "local_files_only": True}
        try:
            if self._gguf:
                config = _as_in_gguf(AutoConfig.from_pretrained(self._work.source.base, trust_remote_code=False, local_files_only=True))
                model: Any = AutoModelForCausalLM.from_pretrained(self._folder, gguf_file=self._gguf, config=config, **options)
            else:
                config = AutoConfig.from_pretrained(self._folder, trust_remote_code=False, local_files_only=True)
                kind = AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText
                attention = self._work.source.run.attn_implementation
                model = kind.from_pretrained(self._folder, use_safetensors=True, attn_implementation=attention, **options)
            if self._adapter is not None:
                model = PeftModel.from_pretrained(model, self._adapter)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            if _short(error):
                raise
            raise ModelError(f"transformers cannot load the export: {error}", where=str(self._folder)) from error
        return model.to(self._work.room.device).eval()


def _as_in_gguf(config: Any) -> Any:
    """Return a config under the name that its family has in GGUF files: a Mistral is a Llama there, and computes as one."""
    if config.model_type != "mistral":
        return config
    return AutoConfig.for_model(
        "llama", **{key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    )


@torch.no_grad()
def _loss(model: Any, row: TokenRow, device: str) -> float:
    ids = torch.tensor(row.input_ids, dtype=torch.long, device=device)
    targets = torch.tensor(list(row.trained), dtype=torch.bool, device=device)[1:].nonzero().squeeze(1)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, targets].float()
    return float(F.cross_entropy(logits, ids[1:][targets]))


def _as_saved(work: Work) -> RunConfig:
    """Return the run as our loader must see it to hold the saved adapter on a 16-bit base.

    What PiSSA started from is part of what was saved, as more rank: a plain LoRA.
    """
    said = json.loads((work.source.adapter / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    return dataclasses.replace(
        work.source.run,
        method="lora",
        dtype=work.room.type_name,
        lora_r=said["r"],
        lora_alpha=said["lora_alpha"],
        lora_dropout=0.0,
        init_lora_weights="default",
        gradient_checkpointing="false",
    )


def _device(room: Room) -> Machine:
    return machine.look() if room.device == "cuda" else machine.cpu_machine()


def _drained(measuring: Generator[int, None, list[RowLoss]], work: Work, what: str) -> list[RowLoss]:
    try:
        while True:
            work.note(next(measuring), len(work.rows.tokens), what)
    except StopIteration as end:
        losses: list[RowLoss] = end.value
        return losses


@contextmanager
def memory_told() -> Iterator[None]:
    """Turn memory that ran out into one sentence.

    Raises:
        WontFit: it did.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _short(error):
            raise
        hint = "close other programs and export again, or say --unchecked: then nobody has compared it with the adapter"
        raise WontFit("memory ran out while the export was compared with the adapter", hint=hint) from error.with_traceback(None)


def _short(error: Exception) -> bool:
    """Say whether memory ran out, on a card or in RAM."""
    return isinstance(error, MemoryError) or out_of_memory(error) or "DefaultCPUAllocator" in str(error)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
