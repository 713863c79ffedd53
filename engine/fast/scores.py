"""The mask of attention that holds its scores, made on the card alone, so that such batches can be recorded as CUDA graphs too."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def mask_on_device(*, dtype: torch.dtype, **how: Any) -> torch.Tensor:
    """Return what is added to scores [B, 1, T, T]: nothing where a token is seen, the least number of `dtype` elsewhere.

    transformers' own has the same numbers, but brings the least one from the host as a tensor, which no recording can hold.

    Args:
        dtype: the type of the scores.
        how: what transformers describes a mask by, passed on to its mask of truths.
    """
    seen_B1TT = sdpa_mask(**how | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})  # else it may be left out
    return torch.full(seen_B1TT.shape, torch.finfo(dtype).min, dtype=dtype, device=seen_B1TT.device).masked_fill_(seen_B1TT, 0)


def settle_masks() -> None:
    """Have transformers make the masks of `eager` attention in this way, in this process."""
    AttentionMaskInterface.register("eager", mask_on_device)
