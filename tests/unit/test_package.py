"""The wheel: built without a network, it holds our rooms alone and answers with nothing but the standard library."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path | None = None, code: int = 0) -> str:
    ended = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False, timeout=180)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=ROOT)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone, without its dependencies, into an environment of its own."""
    home = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home)
    run(sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--quiet", "--no-deps", "--no-index", wheel)
    return home / "bin" / "qlora-tui"


def test_the_wheel_holds_our_rooms_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    roots = {"/".join(name.split("/")[:2]) for name in names if ".dist-info/" not in name}
    assert roots == {"qlora_tui/engine", "qlora_tui/tui", "qlora_tui/presets"}
    assert {name.rpartition(".")[2] for name in names if ".dist-info/" not in name} <= {
        "py",
        "toml",
        "json",
        "md",
        "tcss",
        "html",
        "css",
        "js",
    }
    for needed in ("qlora_tui/presets/demo.toml", "qlora_tui/engine/catalogue.json", "qlora_tui/engine/smollm2-135m/config.json"):
        assert needed in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_version_help_and_presets_need_only_the_standard_library(program: Path, tmp_path: Path) -> None:
    assert run(program, "--version", cwd=tmp_path).split()[-1].count(".") == 2
    assert "demo" in run(program, "--help", cwd=tmp_path)
    presets = json.loads(run(program, "presets", "--json", cwd=tmp_path))
    assert "demo" in {preset["name"] for preset in presets}
    assert run(program, "presets", cwd=tmp_path).strip()
    assert list(tmp_path.glob("runs")) == []


def test_a_fault_of_usage_is_one_sentence_and_exit_2(program: Path, tmp_path: Path) -> None:
    ended = subprocess.run([program, "--set", "lora_rank=8"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "did you mean lora_r?" in ended.stderr
    assert "Traceback" not in ended.stderr
