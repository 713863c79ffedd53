"""What each way of holding a base costs in quality: the loss of an untouched model on real text, in nats above 32 bits.

usage: python tests/bench/base_quality.py [--parts N] [--model FOLDER]      default: the demo's model, 17 parts of 512 tokens

The text is documentation of the running Python, as the demo's rows have it. Nothing is trained. Linear layers of the decoder alone are
quantized, as in a run. "weights and inputs" also quantizes the input of every product, a token at a time, which is what a card does
that multiplies in 8 bits: here the numbers are rounded and multiplied in 32 bits.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / ".pkg")]

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from qlora_tui.engine import builtin  # noqa: E402
from qlora_tui.engine.data import builtin_docs  # noqa: E402
from qlora_tui.engine.fast import eightbit  # noqa: E402
from qlora_tui.engine.load import quantization  # noqa: E402
from qlora_tui.engine.spec import from_values  # noqa: E402

PART = 512
CPU = torch.device("cpu")


def in_8_bits(model: Any, kind: eightbit.Kind) -> Any:
    """Return the model with the weights of its layers rounded to `kind`."""
    for linear in _linears(model):
        held, scales = eightbit.quantize(linear.weight.data, kind)
        linear.weight.data.copy_(held.float() * scales[:, None])
    return model


def _linears(model: Any) -> list[torch.nn.Linear]:
    return [module for module in model.get_decoder().layers.modules() if isinstance(module, torch.nn.Linear)]


def loaded(folder: Path, **settings: Any) -> Any:
    """Return the model with its layers in 32 bits, or as bitsandbytes holds them for such a run."""
    run = from_values({"model_name_or_path": str(folder), "data": ("x",), **settings})
    found = quantization(run, torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=found, device_map={"": "cpu"})


def inputs_rounded(model: Any, kind: eightbit.Kind) -> Any:
    """Return the model with the inputs of its layers' products quantized too, a token at a time."""

    def rounded(_module: Any, given: tuple[torch.Tensor]) -> torch.Tensor:
        held, scales = eightbit.quantize(given[0], kind)
        return held.float() * scales[..., None]

    for linear in _linears(model):
        linear.register_forward_pre_hook(rounded)
    return model


def parts(folder: Path, number: int) -> torch.Tensor:
    """Return so many parts of the text, as token ids [number, PART]."""
    rows: list[Any] = [row["messages"] for row in builtin_docs.read_docs()]
    random.Random(0).shuffle(rows)
    text = "\n\n".join(f"{question['content']}\n{answer['content']}" for question, answer in rows)
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][: number * PART]
    return torch.tensor(ids).view(-1, PART)


@torch.no_grad()
def nats(model: Any, ids: torch.Tensor) -> float:
    """Return the mean loss of a token."""
    return float(torch.stack([model(input_ids=part[None], labels=part[None]).loss for part in ids]).mean())


def main() -> None:
    """Measure every way and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=17)
    parser.add_argument("--model", type=Path, default=None)
    asked = parser.parse_args()
    folder = asked.model or builtin.ready_folder()
    if folder is None:
        raise SystemExit("the demo's model is not here yet: run the demo once, or name a folder with --model")
    ids = parts(folder, asked.parts)
    whole = nats(loaded(folder, method="lora"), ids)
    print(f"| base | nats above 32 bits ({whole:.4f}, {ids.numel():,} tokens) |\n|---|---|", flush=True)
    for kind in ("int8", "fp8"):
        model = in_8_bits(loaded(folder, method="lora"), kind)
        print(f"| {kind.upper()} weights, a scale a row | {nats(model, ids) - whole:+.4f} |", flush=True)
        print(f"| {kind.upper()} weights and inputs | {nats(inputs_rounded(model, kind), ids) - whole:+.4f} |", flush=True)
    for four in ("nf4", "fp4"):
        print(f"| {four.upper()}, double quantized | {nats(loaded(folder, bnb_4bit_quant_type=four), ids) - whole:+.4f} |", flush=True)


if __name__ == "__main__":
    main()
