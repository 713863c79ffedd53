"""Whether this machine can run the Triton kernels: asked once, by compiling and running the smallest one."""

from __future__ import annotations

import functools
import importlib.util

import torch

from qlora_tui.engine.text import one_line

NO_BFLOAT16 = "cards before Ampere compute no bfloat16"


@functools.cache
def why_not(device: torch.device) -> str:
    """Return why kernels cannot run on `device`, or an empty text.

    Triton comes with PyTorch's CUDA builds and needs a C compiler at its first use. It names no card before Ampere, and on Turing it
    works all the same as a rule: there each kernel's numbers are compared with plain torch first, in float16.
    """
    if device.type != "cuda":
        return "there is no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; PyTorch's CUDA builds for Linux bring it"
    if torch.cuda.get_device_capability(device) < (7, 5):
        return "Triton has no kernels for cards before Turing"
    from qlora_tui.engine.fast import kernels, proof  # import Triton

    try:
        if not has_bfloat16(device):
            wrong = proof.wrong(device, torch.float16)
            return f"Triton's {wrong} computes something else on this card" if wrong else ""
        ones = torch.ones(1, 16, device=device, dtype=torch.bfloat16)
        kernels.rms_norm(ones, ones[0], 1e-6)
        torch.cuda.synchronize(device)
    except Exception as error:  # noqa: BLE001  whatever its compiler lacks, the plain way is left and the reason is told
        return f"Triton cannot compile its kernels: {one_line(error, limit=200)}"
    return ""


def has_bfloat16(device: torch.device) -> bool:
    """Say whether `device` is a card that computes in bfloat16, as fused layers do."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
