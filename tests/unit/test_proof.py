"""The comparison of kernels with plain torch before they are trusted on a card that Triton does not name."""

from __future__ import annotations

import importlib

import plain_kernels
import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def proof(monkeypatch: pytest.MonkeyPatch):
    plain_kernels.stand_in(monkeypatch)
    found = importlib.reload(importlib.import_module("qlora_tui.engine.fast.proof"))
    monkeypatch.setattr(found, "kernels", plain_kernels)
    monkeypatch.setattr(found, "widths", plain_kernels)
    return found


def test_kernels_that_are_right_pass(proof):
    assert proof.wrong(CPU, torch.float16) == ""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("dequantize", "widening of 4 bits"),
        ("scaled", "widening of 8 bits"),
        ("turned", "turning of 8 bits"),
        ("summed", "scaling of sums"),
        ("cross_entropy_", "loss"),
    ],
)
def test_a_number_that_is_off_by_a_hundredth_is_found_and_named(proof, monkeypatch, name, told):
    right = vars(plain_kernels)[name]

    def wrong(*given, **more):
        found = right(*given, **more).clone()
        found.view(-1)[3] += torch.ones((), dtype=found.dtype) if not found.is_floating_point() else 0.01 * found.abs().max()
        return found

    monkeypatch.setattr(plain_kernels, name, wrong)
    assert proof.wrong(CPU, torch.float16) == told


def test_a_byte_that_is_rounded_the_other_way_is_found(proof, monkeypatch):
    right = plain_kernels.quantize

    def wrong(*given):
        held, scales = right(*given)
        held[5, 6] += 1
        return type(right(*given))(held, scales)

    monkeypatch.setattr(plain_kernels, "quantize", wrong)
    assert proof.wrong(CPU, torch.float16) == "rounding to 8 bits"
