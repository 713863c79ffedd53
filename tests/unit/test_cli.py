"""The command line: what is understood, what is refused and how, and how little is loaded to say so."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.engine import machine
from qlora_tui.engine.errors import ConfigError
from qlora_tui.engine.machine import Machine
from qlora_tui.engine.spec import KEYS
from qlora_tui.tui.cli import COMMANDS, build, main, parse

CPU = Machine("a test", "cpu", 64 * 2**30, cores=2)
Writer = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def place_and_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "look", lambda: CPU)


@pytest.fixture
def rows(chat_rows: list[dict[str, Any]], write_jsonl: Writer) -> str:
    return str(write_jsonl(chat_rows))


def program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the program itself, without a terminal."""
    settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run([sys.executable, "-m", "qlora_tui.tui", *arguments], check=False, **settings)


def options_of(name: str) -> set[str]:
    return {text for action in build(name)._actions for text in action.option_strings}


RUN_OPTIONS = {
    *("--config", "--preset", "--model", "--data", "--runs-dir", "--set", "--resume", "--max-steps", "--max-time", "--skip-bad-rows"),
    *("--detach", "--dry-run", "--json", "--no-ui", "--no-mouse", "--ascii"),
}


def test_the_promised_options_are_there() -> None:
    assert options_of("") >= RUN_OPTIONS
    assert options_of("demo") >= RUN_OPTIONS
    assert {"--readonly", "--no-mouse", "--ascii"} <= options_of("attach")
    assert {"--card", "--json", "--model"} <= options_of("budget")
    assert {"--examples", "--json", "--model"} <= options_of("data")
    assert all("--json" in options_of(name) for name in ("presets", "runs", "doctor"))


def test_help_names_every_command_there_is(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert "examples:" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_help(name: str, capsys: Capture) -> None:
    assert main([name, "--help"]) == 0
    assert f"qlora-tui {name}" in capsys.readouterr().out


def test_every_key_is_listed(capsys: Capture) -> None:
    assert main(["--help-keys"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in KEYS)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["dmo"], "did you mean demo?"),
        (["resume", "last"], "did you mean qlora-tui --resume?"),
        (["--modle", "x"], "did you mean --model?"),
        (["--lora-r", "8"], "say --set lora_r=VALUE"),
        (["--set", "lora_rank=8"], "did you mean lora_r?"),
        (["--set", "lora_r"], "has no `=`"),
        (["--set", "lora_r=many"], "lora_r = 'many' is not a whole number"),
        (["--set", "learning_rate=2e-4x"], "is not a number such as 2e-4"),
        (["--max-time", "soon"], "is not a duration"),
        (["--max-steps", "1.5"], "not a whole number"),
        (["--model"], "expected one argument"),
        (["--no-ui", "demo"], "put the command first"),
        (["attach", "a", "b"], "unexpected 'b'"),
        (["data", "--examples", "-1"], "'-1' is not a whole number of at least 0"),
        (["data", "--examples", "x"], "'x' is not a whole number of at least 0"),
        (["--set", "batch=1"], "qlora-tui --help-keys lists them all"),
        (["--no-ui", "--model", "m", "--data", ""], "data: one of the names is empty"),
        (["--no-ui", "--data", "d", "--runs-dir", ""], "runs_dir: it is empty"),
        (["data", ""], "no data named"),
        (["data", "d.jsonl", "--set", "max_length=1"], "max_length: 1 is out of range"),
        (["budget", "--model", "Qwen/Qwen3-8B", "--set", "per_device_train_batch_size=-1"], "-1 is out of range"),
        (["budget", "--model", "Qwen/Qwen3-8B", "--set", "max_length=999999"], "positions of this model"),
        (
            ["budget", "--model", "google/gemma-2-9b-it"],
            "sdpa does not exist for the family gemma2 where its layers are not fused; say eager",
        ),
        (["--resume", "last", "--preset", "demo", "--no-ui"], "leave out --config and --preset"),
        (["runs", "--model", "x"], "unknown option --model"),
        (["watch"], "required: LOG"),
        (["watch", "no.csv"], "no.csv: there is no such file"),
        (["--no-ui"], "no model named"),
        (["demo", "--preset", "chat-8b-24gb", "--no-ui"], "the demo is a preset itself"),
        (["attach", "last"], "no run yet"),
        (["--resume", "last", "--no-ui"], "no run yet"),
        (["presets", "chat-8b-24g"], "did you mean chat-8b-24gb"),
        (["--preset", "dmeo", "--no-ui"], "did you mean demo?"),
        (["--config", "no.toml", "--no-ui"], "no.toml"),
        (["budget"], "no model named"),
        (["data"], "no data named"),
        (["data", "no.jsonl"], "no such file"),
        (["budget", "--model", "Qwen/Qwen3-8B", "--card", "RTX 409"], "no card called"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_sentence_and_exit_2(arguments: list[str], told: str, capsys: Capture, tmp_path: Path) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_all_faults_of_a_command_line_are_told_at_once(capsys: Capture) -> None:
    assert main(["--set", "lora_r=many", "--max-time", "soon", "--set", "lora_q=1", "--set", "seed"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4
    assert [part in line for part, line in zip(("lora_r", "max_time", "lora_q", "`=`"), told, strict=True)] == [True] * 4


def test_flags_name_keys_and_the_later_wins() -> None:
    _, options = parse(
        [
            "--model",
            "a",
            "--data",
            "x,y.jsonl",
            "--data",
            "z.jsonl",
            "--set",
            "lora_r=8",
            "--set",
            "model_name_or_path=b",
            "--max-time",
            "90m",
        ]
    )
    assert options.flags == {"model_name_or_path": "b", "data": ("x,y.jsonl", "z.jsonl"), "lora_r": 8, "max_time": 5400.0}
    with pytest.raises(ConfigError):
        parse(["--set", "nothing=1"])


def test_foreign_text_in_an_error_never_steers_the_terminal(capsys: Capture) -> None:
    for arguments in (
        ["\x1b]0;title\x07"],
        ["--\x1b[2J"],
        ["--no-ui", "--model", "./\x1b[2J", "--data", "\x1b[31m.jsonl"],
        ["data", "\x9b31m"],
    ):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert not {"\x1b", "\x9b", "\x07"} & set(out + err)


def test_without_a_terminal_a_wizard_is_refused_and_stdin_is_left_alone() -> None:
    done = program(stdin=subprocess.PIPE)
    assert done.returncode == 2
    assert "no terminal" in done.stderr
    assert "no model named" in done.stderr


def test_help_loads_nothing_heavy_and_no_metadata() -> None:
    code = """
import sys
from qlora_tui.tui.cli import main
assert main(["--help"]) == 0
heavy = {"torch", "textual", "rich", "numpy", "transformers", "importlib.metadata", "tomllib", "subprocess", "logging"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "command", [["budget", "--model", "Qwen/Qwen3-8B"], ["presets"], ["runs"], ["--dry-run", "--preset", "demo"]], ids=" ".join
)
def test_facts_load_no_torch_and_no_screen(command: list[str]) -> None:
    code = f"""
import sys
from qlora_tui.tui.cli import main
assert main({[*command, "--json"]!r}) == 0
assert not {{"torch", "textual", "rich"}} & set(sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    json.loads(out)


def test_a_budget_is_a_document_that_adds_up(capsys: Capture) -> None:
    assert main(["budget", "--model", "Qwen/Qwen3-8B", "--card", "RTX 4090", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"fits", "total_bytes", "margin_bytes", "device", "items", "phases", "fixes", "time"} <= set(found)
    assert found["total_bytes"] == sum(item["bytes"] for item in found["items"])
    assert found["time"] == {"step_seconds": None, "total_seconds": None}
    assert found["device"]["name"] == "RTX 4090"


def test_a_budget_that_is_too_large_says_what_to_change_and_exits_3(capsys: Capture) -> None:
    arguments = ["budget", "--model", "Qwen/Qwen3-8B", "--card", "RTX 3060", "--set", "per_device_train_batch_size=64"]
    assert main(arguments) == 3
    assert "does NOT fit" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["fixes"]


def test_a_budget_with_data_has_times(rows: str, tiny_model: Path, capsys: Capture) -> None:
    assert main(["budget", "--model", str(tiny_model), "--data", rows, "--set", "max_length=512", "--json"]) == 0
    time = json.loads(capsys.readouterr().out)["time"]
    assert len(time["step_seconds"]) == len(time["total_seconds"]) == 3
    assert main(["budget", "--model", str(tiny_model), "--data", rows, "--set", "max_length=512"]) == 0
    assert "looked at" in capsys.readouterr().out


@pytest.mark.parametrize("good", [0, 3])
def test_a_budget_says_which_rows_are_in_no_figure(good: int, tiny_model: Path, tmp_path: Path, capsys: Capture) -> None:
    path, bad = tmp_path / "rows.jsonl", {"input_ids": [1, 2, 3], "labels": [-100, 1, 3]}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*[{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}] * good, bad, bad]))
    assert (
        main(
            [
                "budget",
                "--model",
                str(tiny_model),
                "--data",
                str(path),
                "--set",
                "data_format=tokenized",
                "--set",
                "max_length=512",
                "--json",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["time"]["step_seconds"] is None) == (not good)
    (said,) = [remark for remark in found["remarks"] if "broken" in remark]
    assert f"2 of {good + 2} rows are broken" in said
    assert f"line {good + 1}: labels[1]: 1 is neither -100 nor its token id 2" in said


def test_data_are_described(rows: str, byte_tokenizer: Path, capsys: Capture) -> None:
    assert main(["data", rows, "--model", str(byte_tokenizer), "--examples", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["rows"], found["usable"]) == ("messages", 40, 40)
    assert len(found["examples"]) == 2
    assert main(["data", rows, "--model", str(byte_tokenizer), "--examples", "1"]) == 0
    text = capsys.readouterr().out
    assert "40 usable" in text
    assert "> abc" in text


def test_data_without_a_usable_row_exits_2_and_lists_them(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"odd": "\\u001b[2J"}\nnonsense\n')
    assert main(["data", str(path), "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)["refused"]) == 2
    assert main(["data", str(path)]) == 2
    out = capsys.readouterr().out
    assert "row 2, line 2" in out
    assert "\x1b" not in out


def test_presets_are_listed_and_shown(capsys: Capture, tmp_path: Path) -> None:
    assert main(["presets", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"demo", "chat-8b-24gb", "chat-4b-12gb"} <= {preset["name"] for preset in found}
    assert all({"name", "card", "why", "fits", "total_bytes"} <= set(preset) for preset in found)
    assert main(["presets"]) == 0
    capsys.readouterr()
    assert main(["presets", "demo"]) == 0
    shown = capsys.readouterr().out
    assert "# " in shown
    assert "why = " in shown
    (tmp_path / "again.toml").write_text(shown)
    assert main(["--dry-run", "--config", "again.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["model_name_or_path"] == "builtin:smollm2-135m"


def dry(model: Path, rows: str, *settings: str) -> list[str]:
    return ["--dry-run", "--model", str(model), "--data", rows, *(part for setting in settings for part in ("--set", setting))]


def test_a_dry_run_shows_all_and_makes_nothing(rows: str, tiny_model: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = dry(tiny_model, rows, "max_length=256", "gradient_checkpointing=false")
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["usable"] == 40
    assert found["budget"]["fits"]
    assert main(arguments) == 0
    assert "--set gradient_checkpointing=false" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "home" / "state").exists()


def test_a_dry_run_says_whether_rows_lie_end_to_end(rows: str, tiny_model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = dry(tiny_model, rows, "per_device_train_batch_size=8", "max_length=256", "packing=auto")
    assert main(arguments) == 0
    assert "packing=off  fused layers compute in bfloat16, on a CUDA card" in capsys.readouterr().out
    monkeypatch.setattr(machine, "look", lambda: machine.find_card("H100 80GB"))
    assert main(arguments) == 0
    assert "packing=on  padding would be " in capsys.readouterr().out


def test_the_equivalent_command_gives_the_same_config(rows: str, tiny_model: Path, capsys: Capture) -> None:
    arguments = [
        "--dry-run",
        "--model",
        str(tiny_model),
        "--data",
        rows,
        "--set",
        "max_length=256",
        "--set",
        "lora_target_modules=q_proj,v_proj",
    ]
    assert main([*arguments, "--skip-bad-rows", "--max-time", "2h", "--set", "learning_rate=3.17e-4", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main([*shlex.split(first["command"])[1:], "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"] == first["config"]


def test_a_dry_run_of_what_is_too_large_exits_3_with_the_budget(rows: str, tiny_model: Path, capsys: Capture) -> None:
    arguments = ["--dry-run", "--model", str(tiny_model), "--data", rows, "--set", "max_length=256", "--set", "memory_limit_gib=0.1"]
    assert main(arguments) == 3
    assert "does NOT fit" in capsys.readouterr().out


def test_a_closed_stdout_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = program("presets", "--json", stdout=write, capture_output=False, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    read, write = os.pipe()
    os.close(read)
    for option in ("--help", "--help-keys", "--version"):
        helped = program(option, stdout=write, capture_output=False, stderr=subprocess.PIPE)
        assert (helped.returncode, helped.stderr) == (0, "")
    os.close(write)


def test_the_version_is_printed() -> None:
    done = program("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "qlora-tui")


def test_no_runs_yet_is_no_error(capsys: Capture) -> None:
    assert main(["runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
