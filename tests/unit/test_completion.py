"""Tab offers every command, option, key and run there is, and nothing that would not be understood."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_run import RUN

from qlora_tui.engine import preset, queue
from qlora_tui.engine.spec import KEYS
from qlora_tui.tui import completing
from qlora_tui.tui.arguments import ARGUMENTS
from qlora_tui.tui.cli import COMMANDS, PARTS, build, main
from qlora_tui.tui.commands import ANSWERER, CHILD, SCORER

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for name in ARGUMENTS if name not in (ANSWERER, CHILD, SCORER)]
Ask = Callable[[str], list[str]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ask:
    """Ask as bash does, what may stand at the end of a line."""
    monkeypatch.chdir(tmp_path)

    def answers(line: str) -> list[str]:
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        monkeypatch.setenv("_ARGCOMPLETE", "1")
        monkeypatch.setenv("_ARGCOMPLETE_IFS", "\n")
        monkeypatch.setenv("_ARGCOMPLETE_SUPPRESS_SPACE", "1")
        monkeypatch.setattr("argcomplete.finders.CompletionFinder._init_debug_stream", lambda self: None)
        stream, left = io.StringIO(), []
        completing.answer(stream, left.append)
        assert left == [0]
        return stream.getvalue().split("\n") if stream.getvalue() else []

    return answers


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_every_command_is_offered(name: str, ask: Ask) -> None:
    wanted = {text for action in build(name)._actions for text in action.option_strings}
    assert set(ask(f"qlora-tui {name} -".replace("  ", " "))) == wanted


def test_commands_are_offered_first_and_their_second_words_after_them(ask: Ask) -> None:
    assert set(ask("qlora-tui ")) == set(COMMANDS)
    assert ask("qlora-tui bud") == ["budget"]
    assert set(ask("qlora-tui queue ")) == set(PARTS["queue"])
    assert ask("qlora-tui runs del") == ["delete"]
    assert ask("qlora-tui --no-ui bud") == []  # a command stands first
    assert {f"{first} {second}" for first, parts in PARTS.items() for second in parts} <= set(ARGUMENTS)


def test_every_key_and_its_values_are_offered(ask: Ask) -> None:
    assert {text.rstrip("=") for text in ask("qlora-tui --set ")} == set(KEYS)
    assert ask("qlora-tui queue add --set lora_r") == ["lora_r="]
    for name, key in KEYS.items():
        if key.choices:
            assert ask(f"qlora-tui --set {name}=") == [f"{name}={choice}" for choice in key.choices]
    assert ask("qlora-tui --set use_dora=t") == ["use_dora=true"]
    assert ask("qlora-tui --set report_to=w") == ["report_to=wandb"]
    assert ask("qlora-tui --set nothing=") == []


def test_presets_runs_models_cards_and_numbers_are_offered(ask: Ask, tmp_path: Path) -> None:
    for name in ("20261125-164012-chat", "20261126-090000-code", "odd\x1b[2J"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.toml").touch()
    queue.add(replace(RUN), "first")
    assert set(ask("qlora-tui --preset ")) == set(preset.names())
    assert set(ask("qlora-tui presets ")) == set(preset.names())
    assert set(ask("qlora-tui runs compare ")) == {"last", "20261125-164012-chat", "20261126-090000-code"}
    assert ask("qlora-tui --resume 20261126") == ["20261126-090000-code"]
    assert ask("qlora-tui attach 20261125") == ["20261125-164012-chat"]
    assert ask("qlora-tui queue remove ") == ["1"]
    assert "builtin:smollm2-135m" in ask("qlora-tui --model b")
    assert "Qwen/Qwen3-8B" in ask("qlora-tui --model Qwen/")
    assert any("4090" in card for card in ask("qlora-tui budget --card RTX"))
    assert ask("qlora-tui completion z") == ["zsh"]
    assert ask("qlora-tui --max-steps ") == []


def test_a_script_is_printed_and_help_loads_none_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert "qlora-tui" in capsys.readouterr().out
    assert main(["completion", "csh"]) == 2
    code = 'import sys\nfrom qlora_tui.tui.cli import main\nmain(["--help"])\nassert "argcomplete" not in sys.modules'
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


BASH = """
eval "$(qlora-tui completion bash)"
COMP_LINE="qlora-tui --set method="; COMP_POINT=${#COMP_LINE}; COMP_TYPE=9
_python_argcomplete qlora-tui
echo "${COMPREPLY[@]}"
"""
FISH = 'qlora-tui completion fish | source; complete -C "qlora-tui --set method="'


@pytest.mark.parametrize(
    ("shell", "script", "told"),
    [("bash", BASH, "qlora lora-8bit lora auto"), ("fish", FISH, "method=auto\nmethod=lora\nmethod=lora-8bit\nmethod=qlora")],
)
def test_the_shells_themselves_are_answered(shell: str, script: str, told: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    program = tmp_path / "qlora-tui"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m qlora_tui.tui "$@"\n')
    program.chmod(0o700)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / ".pkg"), "HOME": str(tmp_path)}
    ended = subprocess.run([shell, "-c", script], capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert ended.stdout.strip() == told, ended.stderr
