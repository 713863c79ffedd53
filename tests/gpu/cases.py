"""The grid of configurations on which memory and time are measured on a card; nothing here needs one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_tui.engine.spec import RunConfig, from_values

STEPS = 5

QWEN05, QWEN15, QWEN7 = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"
LLAMA1, LLAMA3, LLAMA8 = "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"
QWEN4, QWEN14 = "Qwen/Qwen3-4B", "Qwen/Qwen3-14B"
GEMMA2, GEMMA9, GEMMA3 = "google/gemma-2-2b-it", "google/gemma-2-9b", "google/gemma-3-1b-it"
PHI4, PHI35 = "microsoft/phi-4", "microsoft/Phi-3.5-mini-instruct"
MISTRAL, SMOL3 = "mistralai/Mistral-7B-Instruct-v0.3", "HuggingFaceTB/SmolLM3-3B"


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration: shape, rows at once, tokens a row, layers checkpointed, and what differs from nf4, rank 16, paged 8 bits."""

    shape: str
    rows: int
    length: int
    layers: str
    more: dict[str, Any] = field(default_factory=dict)
    saved: bool = False

    @property
    def name(self) -> str:
        """The configuration in one line."""
        more = " ".join("packed" if key == "packing" else str(value) for key, value in self.more.items())
        return f"{self.shape.split('/')[-1]} {self.rows}x{self.length} ckpt={self.layers} {more}{' loaded' if self.saved else ''}".strip()

    def run(self, folder: Path, *, tiny: bool) -> RunConfig:
        """Return the settings; two micro-batches a step, so that the second meets the gradients of the first."""
        usual = {"lora_r": 16, "optim": "paged_adamw_8bit", "bnb_4bit_quant_type": "nf4", "method": "qlora"}
        optim = self.more.get("optim", "adamw_torch").removeprefix("paged_")
        small = {"max_length": min(self.length, 96), "optim": optim, "packing": "off"} if tiny else {}  # a processor fuses no layers
        rows = min(self.rows, 2) if tiny else self.rows
        settings = {
            "model_name_or_path": str(folder),
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": self.layers,
            "max_length": self.length,
            "max_steps": STEPS,
            "eval_steps": STEPS,
            "save_steps": STEPS,
            "num_train_epochs": 100.0,
        }
        return from_values({**settings, **usual, **self.more, **small})


FP4, LORA = {"bnb_4bit_quant_type": "fp4"}, {"method": "lora"}
PLAIN, EIGHT = {"optim": "adamw_torch"}, {"optim": "adamw_8bit"}
EAGER = {"attn_implementation": "eager"}
BYTE, PACKED = {"method": "lora-8bit"}, {"packing": "on"}

CASES: tuple[Case, ...] = (
    Case(QWEN05, 16, 256, "false", LORA | EIGHT),
    Case(LLAMA1, 16, 256, "false", EIGHT),
    Case(QWEN4, 8, 512, "true", {"lora_r": 64, "optim": "adamw_8bit"}),
    Case(SMOL3, 2, 2048, "18", FP4),
    Case(LLAMA8, 2, 2048, "true", {"loss_chunk_size": 256}),
    Case(GEMMA3, 4, 2048, "true", {}),
    Case(QWEN05, 1, 512, "true", saved=True),
    Case(QWEN05, 8, 1024, "false", {"lora_r": 64}),
    Case(QWEN05, 16, 512, "12", PLAIN),
    Case(QWEN05, 4, 4096, "true", LORA),
    Case(QWEN15, 4, 2048, "true", {"lora_r": 32}),
    Case(QWEN15, 2, 2048, "false", FP4),
    Case(LLAMA1, 1, 8192, "true", {}),
    Case(LLAMA1, 8, 1024, "true", {"lora_r": 64} | PLAIN, saved=True),
    Case(LLAMA1, 4, 2048, "8", LORA),
    Case(LLAMA1, 2, 4096, "4", {"lora_r": 8}),
    Case(LLAMA3, 2, 2048, "14", {}),
    Case(LLAMA3, 4, 1024, "false", {"lora_r": 8}),
    Case(QWEN4, 1, 4096, "true", {}, saved=True),
    Case(QWEN4, 2, 1024, "false", {"bnb_4bit_use_double_quant": False}),
    Case(QWEN4, 4, 2048, "18", LORA),
    Case(GEMMA2, 2, 1024, "true", EAGER),
    Case(GEMMA2, 2, 2048, "true", {}),
    Case(GEMMA2, 1, 4096, "13", LORA),
    Case(GEMMA2, 1, 1024, "13", EAGER | LORA),
    Case(GEMMA3, 2, 1024, "false", {"lora_r": 32} | PLAIN),
    Case(PHI35, 2, 2048, "true", {}),
    Case(PHI35, 1, 2048, "false", LORA),
    Case(MISTRAL, 1, 2048, "true", {}),
    Case(MISTRAL, 2, 1024, "16", {"lora_r": 32}),
    Case(QWEN7, 2, 2048, "true", EIGHT),
    Case(LLAMA8, 2, 2048, "true", {}),
    Case(LLAMA8, 1, 4096, "16", {}),
    Case(LLAMA8, 1, 2048, "false", {"lora_r": 8}),
    Case(LLAMA8, 1, 1024, "true", LORA),
    Case(QWEN14, 1, 2048, "true", {}),
    Case(PHI4, 1, 2048, "true", {}),
    Case(PHI4, 4, 512, "false", {"lora_r": 8}),
    Case(LLAMA8, 1, 8192, "true", {"lora_r": 64} | PLAIN),
    Case(QWEN14, 2, 1024, "20", {"lora_r": 32}),
    Case(LLAMA1, 2, 1024, "true", EAGER),
    Case(QWEN4, 1, 2048, "true", EAGER),
    Case(GEMMA2, 2, 2048, "true", EAGER),
    Case(GEMMA2, 4, 1024, "true", {}),
    Case(GEMMA9, 1, 4096, "true", {}),
    Case(LLAMA8, 2, 2048, "false", BYTE),
    Case(LLAMA8, 1, 4096, "true", BYTE | {"lora_r": 32}),
    Case(QWEN4, 4, 1024, "18", BYTE),
    Case(LLAMA1, 8, 1024, "false", BYTE | EIGHT),
    Case(QWEN14, 1, 2048, "true", BYTE),
    Case(LLAMA8, 4, 1024, "true", PACKED),
    Case(MISTRAL, 2, 2048, "16", PACKED),
    Case(QWEN7, 4, 512, "false", BYTE | PACKED),
)
