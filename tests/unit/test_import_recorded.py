"""Configs of other tools, recorded after their documentation: what is said of each is on file, and each becomes a run that starts.

Run this file as a program to write the lists anew; every line that changes is then read by a person.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_tui.engine import foreign, machine
from qlora_tui.engine.machine import Machine
from qlora_tui.tui.cli import main

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "foreign"
LISTS = "lists"
CONFIGS = sorted(path for tool in foreign.TOOLS for path in (RECORDED / tool.name).iterdir() if path.is_file())
NAMES = [f"{path.parent.name}/{path.name}" for path in CONFIGS]
CPU = Machine("a test", "cpu", 64 * 2**30, cores=2)
TURNS = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "abc abc"}]
ROWS: dict[str, dict[str, Any]] = {
    "auto": {"messages": TURNS},
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": "say"}, {"from": "gpt", "value": "abc"}]},
    "alpaca": {"instruction": "say", "output": "abc"},
    "text": {"text": "once upon a time"},
    "segments": {"segments": [{"text": "say ", "label": False}, {"text": "abc", "label": True}]},
    "question-answer": {"question": "say", "answer": "abc"},
}


def said(path: Path) -> dict[str, Any]:
    """Return what `import --json` says of a config, from beside it, without its own name."""
    out = io.StringIO()
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with contextlib.redirect_stdout(out):
            assert main(["import", path.name, "--dry-run", "--json"]) == 0
    finally:
        os.chdir(before)
    return {key: value for key, value in json.loads(out.getvalue()).items() if key not in ("file", "out")}


def paths(tree: Any, path: str = "") -> list[str]:
    """Return the path of every value, as the tests see it: their own few lines, so that the program's can be wrong."""
    if isinstance(tree, dict) and tree:
        return [found for key, value in tree.items() for found in paths(value, f"{path}.{key}" if path else str(key))]
    if isinstance(tree, list) and any(isinstance(part, dict) for part in tree):
        return [found for place, value in enumerate(tree) for found in paths(value, f"{path}[{place}]")]
    return [path]


def test_at_least_five_configs_of_each_tool() -> None:
    assert all(sum(path.parent.name == tool.name for path in CONFIGS) >= 5 for tool in foreign.TOOLS)


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_what_is_said_of_a_config_is_on_file(path: Path) -> None:
    on_file = json.loads((path.parent / LISTS / f"{path.name}.json").read_text(encoding="utf-8"))
    assert said(path) == on_file


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.suffix in (".yml", ".yaml", ".json")], ids=lambda path: path.name)
def test_every_setting_is_in_exactly_one_list(path: Path) -> None:
    found = said(path)
    listed = [entry["from"] for kept in ("mapped", "changed", "dropped") for entry in found[kept]]
    assert sorted(listed) == sorted(paths(yaml.safe_load(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_the_tool_is_recognized(path: Path) -> None:
    assert foreign.title_of(path) == {tool.name: tool.title for tool in foreign.TOOLS}[path.parent.name]


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_an_imported_config_is_a_run_that_could_start(
    path: Path, long_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Model and data are replaced by tiny ones of the same shape, since the hub is not asked in tests; all else is as imported."""
    monkeypatch.setattr(machine, "look", lambda: CPU)
    monkeypatch.chdir(path.parent)
    out = tmp_path / "run.toml"
    assert main(["import", str(path), "--out", str(out), "--json"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    columns = dict(entry.split("=", 1) for entry in config.get("data_columns", []))
    row = {columns.get(name, name): value for name, value in ROWS[config.get("data_format", "auto")].items()}
    data = [tmp_path / f"rows-{number}.jsonl" for number in range(len(config.get("data_weights", [1])))]
    for number, file in enumerate(data):
        rows = [{**row, "id": f"{number}-{each}"} for each in range(80)]
        file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    words = ["--dry-run", "--no-ui", "--json", "--config", str(out), "--model", str(long_model), "--set", "revision=main"]
    words += [word for file in data for word in ("--data", str(file))]
    words += ["--set", f"eval_data={data[0]}"] if config.get("eval_data") else []
    paged = config.get("optim") == "paged_adamw_8bit"  # it needs a GPU, and there is none here
    words += ["--set", "optim=adamw_8bit"] if paged else []
    code = main(words)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    started = json.loads(printed.out)["config"]
    replaced = {"model_name_or_path", "data", "eval_data", "revision"} | ({"optim"} if paged else set())
    assert {key: value for key, value in config.items() if key not in replaced}.items() <= started.items()


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with as many positions as the longest of the configs asks for."""
    from conftest import write_model, write_tokenizer

    folder = tmp_path_factory.mktemp("long-llama")
    write_model(folder, max_position_embeddings=16_384)
    write_tokenizer(folder)
    return folder


if __name__ == "__main__":
    for config in CONFIGS:
        (config.parent / LISTS).mkdir(exist_ok=True)
        text = json.dumps(said(config), indent=1, ensure_ascii=True)
        (config.parent / LISTS / f"{config.name}.json").write_text(text + "\n", encoding="utf-8")
