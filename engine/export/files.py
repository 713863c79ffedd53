"""Small files of an export: the tokenizer and template that were trained, the base's config, the tokens that end an answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from qlora_tui.engine.data import load_tokenizer
from qlora_tui.engine.hub import SMALL_FILES
from qlora_tui.engine.places import replace_file
from qlora_tui.engine.shelf import digest_of

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_GENERATION = "generation_config.json"
_SEEING = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def copy_tokenizer(adapter: Path, out: Path) -> None:
    """Copy what lies beside the adapter's weights: the tokenizer, and the chat template that was trained."""
    for path in adapter.iterdir():
        if path.name in ADAPTER_FILES:
            continue
        if path.is_dir():
            shutil.copytree(path, out / path.name)
        else:
            shutil.copyfile(path, out / path.name)


def copy_about(base: Path, out: Path) -> None:
    """Copy the small files of the base that are not there yet, such as its config and how it generates."""
    for name in (*SMALL_FILES, *_SEEING):
        if (base / name).is_file() and not (out / name).exists() and not name.endswith(".index.json"):
            shutil.copyfile(base / name, out / name)


def stop_at(out: Path, stop: int | None) -> None:
    """Make generation end at the token that ends an answer as trained; some models' own files name another one only."""
    if stop is None or stop in (known := load_tokenizer(out).stop_ids()):
        return
    path = out / _GENERATION
    try:
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        said = {}
    replace_file(path, json.dumps({**said, "eos_token_id": [*sorted(known), stop]}, indent=2) + "\n")


def copied(source: Path, out: Path) -> str:
    """Copy a file and return its SHA-256, read back from the copy.

    Raises:
        OSError: the copy is not what was copied.
    """
    shutil.copyfile(source, out)
    digest = digest_of(source)
    if digest_of(out) != digest:
        raise OSError(None, f"the disk gave back something else than was written to {out.name}")
    return digest
