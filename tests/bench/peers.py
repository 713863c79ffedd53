"""One training step of each peer on given rows, in nothing but its own packages: `plain` is the recipe of PEFT's documentation.

`plain-lean` leaves PEFT's preparation out, which makes head and norms float32; `liger` adds Liger's kernels to that; `unsloth` is
its own loader, kernels and offloading. All read one checkpoint and train on NF4 weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.bench.workloads import Case, bins

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PAD, IGNORED, ALPHA = 0, -100, 16
Row = dict[str, list[int]]


def measure(case: Case, model: Path, data: Path, *, cpu: bool) -> dict[str, Any]:
    """Train the peer of `case` and return seconds, tokens and memory; a limit holds its allocator, CUDA's context counted."""
    device = "cpu" if cpu else "cuda"
    name = case.backend.removesuffix("-nogc")
    if name == "unsloth":
        import unsloth  # noqa: F401  before torch's other users, as its documentation says
    import torch

    if case.limit and not cpu:
        torch.ones(1024, 1024, device=device).matmul(torch.ones(1024, 1024, device=device))  # the context with its libraries
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction(max(0.0, case.limit * 2**30 - context) / total)
    began = time.monotonic()
    net = MAKE[name](case, model, device)
    loaded = time.monotonic() - began
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(parameters, cpu=cpu)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    net.train()
    if not cpu:
        torch.cuda.reset_peak_memory_stats()
    steps = []
    for first in range(0, len(rows), case.rows):
        part = rows[first : first + case.rows]
        if not cpu:
            torch.cuda.synchronize()
        began = time.monotonic()
        loss = 0.0
        for batch in batches(part, case, device):
            with torch.autocast(device, torch.bfloat16, enabled=name != "unsloth"):
                part_loss = net(**batch).loss
            part_loss.backward()
            loss = part_loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = float(loss)  # waits for the device
        if not cpu:
            torch.cuda.synchronize()
        steps.append((time.monotonic() - began, part, last))
    more = {"load_seconds": round(loaded, 1), "last_loss": steps[-1][2], "config": json.loads((model / "config.json").read_text())}
    numbers = {"rows": list(range(case.warm * case.rows + 1, len(rows) + 1))}
    return told(steps[case.warm :]) | more | numbers | memory(cpu=cpu)


def told(steps: list[tuple[float, list[Row], float]]) -> dict[str, Any]:
    """Return what every backend tells of its steps."""
    return {
        "seconds": [seconds for seconds, _, _ in steps],
        "tokens": [sum(len(row["input_ids"]) for row in rows) for _, rows, _ in steps],
        "supervised": [sum(label != IGNORED for row in rows for label in row["labels"]) for _, rows, _ in steps],
    }


def memory(*, cpu: bool) -> dict[str, Any]:
    """Return peaks in bytes, and what the whole device holds; a processor has none of them."""
    import torch

    if cpu:
        return {"allocated": 0, "reserved": 0, "device": 0}
    free, total = torch.cuda.mem_get_info()
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(), "device": total - free}


def batches(rows: list[Row], case: Case, device: str) -> Iterator[dict[str, Any]]:
    """Return the micro-batches of a step: padded ones of rows alike in length, or packed ones without any padding."""
    sizes = [len(row["input_ids"]) for row in rows]
    if case.packing == "packed":
        for places in bins(sizes, case.at_once * case.length):
            yield packed([rows[place] for place in places], device, unsloth=case.backend.startswith("unsloth"))
        return
    order = sorted(range(len(rows)), key=lambda place: sizes[place])
    for first in range(0, len(rows), case.at_once):
        yield padded([rows[place] for place in order[first : first + case.at_once]], device)


def padded(rows: list[Row], device: str) -> dict[str, Any]:
    """Return rows padded on the right to the longest; no mask where nothing is padded, so that attention can be the causal kernel."""
    import torch

    most = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [PAD] * (most - len(row["input_ids"])) for row in rows]
    labels = [row["labels"] + [IGNORED] * (most - len(row["labels"])) for row in rows]
    batch = {"input_ids": torch.tensor(ids, device=device), "labels": torch.tensor(labels, device=device)}
    if any(len(row["input_ids"]) < most for row in rows):
        mask = [[1] * len(row["input_ids"]) + [0] * (most - len(row["input_ids"])) for row in rows]
        batch["attention_mask"] = torch.tensor(mask, device=device)
    return batch


def packed(rows: list[Row], device: str, *, unsloth: bool) -> dict[str, Any]:
    """Return rows one after another, each with positions of its own, by which transformers keeps them apart; Unsloth wants lengths too."""
    import torch

    ids = [token for row in rows for token in row["input_ids"]]
    labels = [label for row in rows for label in row["labels"]]
    positions = [place for row in rows for place in range(len(row["input_ids"]))]
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    made = {name: torch.tensor([values], device=device) for name, values in batch.items()}
    if unsloth:
        made["packed_seq_lengths"] = torch.tensor([len(row["input_ids"]) for row in rows], dtype=torch.int32, device=device)
    return made


def optimizer_of(parameters: list[Any], *, cpu: bool) -> Any:
    """Return paged 8-bit AdamW, as in the article; plain AdamW on a processor, which has no such kernel."""
    import torch
    from bitsandbytes.optim import PagedAdamW8bit

    return torch.optim.AdamW(parameters, lr=2e-4) if cpu else PagedAdamW8bit(parameters, lr=2e-4)


def plain(case: Case, model: Path, device: str) -> Any:
    """The article's path: transformers, PEFT, and PEFT's preparation."""
    from peft import prepare_model_for_kbit_training

    net = base(model, device)
    net = prepare_model_for_kbit_training(
        net, use_gradient_checkpointing=case.setting == "full", gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    return adapted(net, case)


def lean(case: Case, model: Path, device: str) -> Any:
    """The same without the preparation."""
    net = base(model, device)
    if case.setting == "full":
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        net.enable_input_require_grads()
    return adapted(net, case)


def liger(case: Case, model: Path, device: str) -> Any:
    """Lean, with Liger's kernels and its loss without logits, put in before the model is made."""
    from liger_kernel.transformers import _apply_liger_kernel

    _apply_liger_kernel(json.loads((model / "config.json").read_text())["model_type"])
    return lean(case, model, device)


def unsloth(case: Case, model: Path, device: str) -> Any:
    """Unsloth's own loader and adapter; with checkpointing, its offloading kind."""
    import torch
    from unsloth import FastLanguageModel

    most = case.length * (case.at_once if case.packing == "packed" else 1)
    net, _ = FastLanguageModel.from_pretrained(
        model_name=str(model), max_seq_length=most, load_in_4bit=True, dtype=torch.bfloat16, local_files_only=True
    )
    return FastLanguageModel.get_peft_model(
        net,
        r=case.rank,
        target_modules=TARGETS,
        lora_alpha=ALPHA,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth" if case.setting == "full" else False,
        random_state=0,
    )


def base(model: Path, device: str) -> Any:
    """Load the checkpoint: quantized already, as its config says, or else quantized while it is loaded."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    place = {"": 0 if device == "cuda" else "cpu"}
    more = {}
    if "quantization_config" not in json.loads((model / "config.json").read_text()):
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map=place, attn_implementation="sdpa", **more)
    net.config.use_cache = False
    for module in net.modules() if device == "cpu" else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # that shortcut has no backward
    return net


def adapted(net: Any, case: Case) -> Any:
    """Put a LoRA adapter on all seven linear layers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=case.rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(net, config)


MAKE: dict[str, Callable[[Case, Path, str], Any]] = {"plain": plain, "plain-lean": lean, "liger": liger, "unsloth": unsloth}
