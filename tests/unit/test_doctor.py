"""The doctor: every failing line ends with one command, and a broken kernel is a finding, not a crash."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_tui.engine import doctor
from qlora_tui.engine.child import Ended

NO_CARD = doctor.Driver()
H100 = doctor.Driver(cards=("NVIDIA H100 80GB HBM3, 79.6 GiB",), version="550.54", cuda=(12, 4))
TORCH = {"version": "2.13.0", "cuda": None, "usable": False, "device": "cpu", "threads": 2}


def child_says(monkeypatch: pytest.MonkeyPatch, *facts: dict[str, Any], code: int = 0, tail: str = "") -> None:
    talk = "a library prints this\n" + "".join(json.dumps(fact) + "\n" for fact in facts) + tail
    monkeypatch.setattr(doctor.child, "run", lambda *_, **__: Ended(code, talk))


def test_the_kernels_really_run_in_a_child_here() -> None:
    found = {check.check: check for check in doctor.compute(NO_CARD)}
    assert list(found) == ["torch", "4-bit kernels", "8-bit optimizer"]
    assert [check.found for check in found.values() if not check.ok] == []
    assert "are right" in found["4-bit kernels"].found


def test_a_kernel_that_ends_the_process_is_a_finding_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    child_says(monkeypatch, {"check": "torch", **TORCH}, code=-4, tail="illegal instruction\n")
    torch, kernels, optimizer = doctor.compute(NO_CARD)
    assert torch.ok
    assert (kernels.ok, optimizer.ok) == (False, False)
    assert "illegal instruction" in kernels.found
    assert kernels.mend.endswith("install -U 'bitsandbytes>=0.49'")


def test_a_kernel_with_wrong_results_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    child_says(monkeypatch, {"check": "torch", **TORCH}, {"check": "4-bit kernels", "ok": False, "error": "ArithmeticError: wrong results"})
    assert [check.found for check in doctor.compute(NO_CARD)][1] == "ArithmeticError: wrong results"


def test_layers_that_cannot_be_fused_are_told_and_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "off, so steps take longer: Triton cannot compile its kernels: Failed to find C compiler\n"
    child_says(monkeypatch, {"check": "torch", **TORCH}, {"check": "fused layers", "ok": True, "found": why})
    (told,) = [check for check in doctor.compute(NO_CARD) if check.check == "fused layers"]
    assert (told.ok, told.found) == (True, why.strip())


def test_torch_that_does_not_load_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    child_says(monkeypatch, code=1, tail="ImportError: libcudart.so.12: cannot open shared object file\n")
    (torch,) = doctor.compute(NO_CARD)
    assert (torch.ok, "libcudart.so.12" in torch.found) == (False, True)
    assert "--force-reinstall" in torch.mend


def test_a_cpu_build_beside_a_card_is_mended_by_the_newest_build_the_driver_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    child_says(monkeypatch, {"check": "torch", **TORCH})
    torch = next(doctor.compute(H100))
    assert not torch.ok
    assert torch.mend.endswith("--index-url https://download.pytorch.org/whl/cu118")
    newer = doctor.Driver(H100.cards, "580.1", (13, 0))
    assert next(doctor.compute(newer)).mend.endswith("/cu130")


def test_a_hidden_card_is_a_choice_and_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    child_says(monkeypatch, {"check": "torch", **TORCH})
    assert next(doctor.compute(H100)).ok
    assert "hidden" in doctor.gpu(H100).found


def test_a_card_whose_driver_is_silent_is_a_fault_and_no_card_is_none() -> None:
    assert doctor.gpu(NO_CARD).ok
    silent = doctor.gpu(doctor.Driver(fault="Driver/library version mismatch"))
    assert (silent.ok, silent.mend) == (False, "sudo reboot")


def test_old_and_missing_packages_are_mended_by_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_requirements", lambda: ["pytest>=1", "pytest>=9999,<10000", "no-such-package>=2"])
    (check,) = doctor.packages()
    assert not check.ok
    assert "no-such-package is missing" in check.found
    assert check.mend.endswith("'pytest>=9999,<10000' 'no-such-package>=2'")


@pytest.mark.parametrize(
    ("version", "bounds", "within"),
    [
        ("2.10.0", ">=2.10", True),
        ("2.9.1+cu128", ">=2.10", False),
        ("8.2.8", "<9,>=8.2", True),
        ("9.0.0", "<9,>=8.2", False),
        ("6.1.0", "<6,>=5.3.2", False),
        ("1.0.0rc1", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, bounds: str, within: bool) -> None:
    assert doctor._within(version, bounds) is within


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    assert doctor.disk("disk", tmp_path / "not" / "made", 1, "mend").ok
    assert not doctor.disk("disk", tmp_path, 1 << 60, "mend").ok
    (tmp_path / "file").write_text("")
    refused = doctor.disk("disk", tmp_path / "file" / "runs", 1, "mend it")
    assert (refused.ok, refused.mend) == (False, "mend it")
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("environment", "ok", "says"),
    [
        ({"TERM": "xterm-256color"}, True, "256"),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, True, "16 million"),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, "NO_COLOR"),
        ({"TERM": "dumb"}, False, "dumb"),
        ({}, False, "no screen"),
    ],
)
def test_colours_come_from_what_the_terminal_says(environment: dict[str, str], ok: bool, says: str) -> None:
    check = doctor.colours(environment)
    assert (check.ok, says in check.found) == (ok, True)


def test_a_small_terminal_over_ssh_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "get_terminal_size", lambda _: os.terminal_size((70, 20)))
    monkeypatch.setenv("SSH_TTY", "/dev/pts/0")
    monkeypatch.delenv("TMUX", raising=False)
    monkeypatch.delenv("STY", raising=False)
    found = {check.check: check for check in doctor.terminal()}
    assert (found["terminal size"].ok, "70x20" in found["terminal size"].found) == (False, True)
    assert "tmux" in found["SSH"].found
    monkeypatch.setenv("TMUX", "/tmp/tmux")
    assert "survives" in {check.check: check for check in doctor.terminal()}["SSH"].found


def test_without_a_terminal_only_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: int) -> os.terminal_size:
        raise OSError(25, "not a terminal")

    monkeypatch.setattr(doctor.os, "get_terminal_size", none)
    (check,) = doctor.terminal()
    assert check.ok
    assert "--no-ui" in check.found


def test_the_hub_is_not_asked_where_that_would_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> socket.socket:
        raise AssertionError("asked the network")

    monkeypatch.setattr(doctor.socket, "create_connection", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "not asked" in doctor.hub().found
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert "proxy" in doctor.hub().found


def test_a_hub_that_does_not_answer_fails_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    check = doctor.hub()
    assert (check.ok, check.mend) == (False, "export HF_HUB_OFFLINE=1")


def test_every_failing_check_ends_with_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    child_says(monkeypatch, code=1)
    monkeypatch.setattr(doctor, "look_at_driver", lambda: H100)
    monkeypatch.setattr(doctor, "_requirements", lambda: ["no-such-package>=2"])
    monkeypatch.setattr(doctor.os, "get_terminal_size", lambda _: os.terminal_size((10, 5)))
    monkeypatch.setattr(doctor.sys, "stdout", SimpleNamespace(encoding="ascii"))
    monkeypatch.setenv("TERM", "dumb")
    found = list(doctor.checks())
    failed = [check for check in found if not check.ok]
    assert len(failed) >= 5
    assert {check.mend for check in found if check.ok} == {""}
    assert [check.check for check in failed if not check.mend or "\n" in check.mend] == []


def test_uv_is_named_where_the_environment_has_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/uv")
    assert doctor.install("peft>=0.18") == f"uv pip install --python {sys.executable} 'peft>=0.18'"
