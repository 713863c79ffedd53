"""The held-out losses of a finished run once more, in nothing but transformers, PEFT, bitsandbytes and torch.

    python tests/bench/bare_peft.py RUN_FOLDER [ROWS.jsonl]

Nothing of this project is imported: rows are rendered by the tokenizer's own chat template, the model is loaded as PEFT's documentation
says, the logits are the model's own and the loss is torch's. It compares row by row with what the run wrote under `eval/`,
and ends with 1 where a row differs by more than 1e-3 nats a token. The rows are the lines of the run's data, or of ROWS.jsonl
where the run was trained on `builtin:` rows: `labels.py` writes those as `docs.jsonl`.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

LIMIT = 1e-3


def main(folder: Path, rows: Path | None) -> int:
    config = {name: value for table in tomllib.loads((folder / "run.toml").read_text()).values() if isinstance(table, dict)
              for name, value in table.items()}  # fmt: skip
    lines = (rows or Path(config["data"][0])).read_text().splitlines()
    adapter = folder / "adapter"
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config["bnb_4bit_quant_type"],
        bnb_4bit_use_double_quant=config["bnb_4bit_use_double_quant"],
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=quantized if config["method"] == "qlora" else None
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its shortcut on some processors computes in 16 bits
    model = PeftModel.from_pretrained(model, adapter).eval()
    worst = 0.0
    last = max((folder / "eval").glob("step-*.jsonl"))
    for name, path in (("base", folder / "eval" / "base.jsonl"), ("tuned", last)):
        worst = max(worst, compare(name, path, lines, tokenizer, model))
    print(f"largest difference of a row: {worst:.2e} nats a token; limit {LIMIT:g}")
    return int(worst > LIMIT)


def compare(name: str, path: Path, lines: list[str], tokenizer, model) -> float:
    known = [json.loads(line) for line in path.read_text().splitlines()]
    worst = nll = theirs = 0.0
    tokens = 0
    for row in known:
        found, number = loss_of(json.loads(lines[row["row"] - 1])["messages"], tokenizer, model, adapter=name == "tuned")
        assert number == row["tokens"], f"row {row['row']}: {number} supervised tokens, the run counted {row['tokens']}"
        worst = max(worst, abs(found - row["nll"]) / number)
        nll, theirs, tokens = nll + found, theirs + row["nll"], tokens + number
    print(f"{name}: {nll / tokens:.6f} here, {theirs / tokens:.6f} in the run, on {len(known)} rows; largest difference {worst:.2e}")
    return worst


@torch.no_grad()
def loss_of(messages, tokenizer, model, *, adapter: bool) -> tuple[float, int]:
    """Return the summed loss of the answer's tokens, up to the one that ends it, and how many they are."""
    asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    whole = whole[: whole.rindex("<|im_end|>") + len("<|im_end|>")]
    ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt").input_ids
    start = len(tokenizer(asked, add_special_tokens=False).input_ids)
    if adapter:
        logits = model(input_ids=ids).logits
    else:
        with model.disable_adapter():
            logits = model(input_ids=ids).logits
    losses = torch.nn.functional.cross_entropy(logits[0, start - 1 : -1].double(), ids[0, start:], reduction="sum")
    return float(losses), ids.shape[1] - start


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
