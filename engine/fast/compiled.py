"""Whether this machine can run the Triton kernels: asked once, by compiling and running the smallest one."""

from __future__ import annotations

import functools
import importlib.util

import torch

from qlora_tui.engine.text import one_line


@functools.cache
def why_not(device: torch.device) -> str:
    """Return why kernels cannot run on `device`, or an empty text.

    Triton comes with PyTorch's CUDA builds and needs a C compiler at its first use; cards before Ampere compute no bfloat16.
    """
    if device.type != "cuda":
        return "there is no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; PyTorch's CUDA builds for Linux bring it"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "cards before Ampere compute no bfloat16"
    from qlora_tui.engine.fast import kernels  # imports Triton

    try:
        ones = torch.ones(1, 16, device=device, dtype=torch.bfloat16)
        kernels.rms_norm(ones, ones[0], 1e-6)
        torch.cuda.synchronize(device)
    except Exception as error:  # noqa: BLE001  whatever its compiler lacks, the plain way is left and the reason is told
        return f"Triton cannot compile its kernels: {one_line(error, limit=200)}"
    return ""
