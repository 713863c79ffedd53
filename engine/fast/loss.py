"""Cross-entropy of supervised tokens only, straight from hidden states, a chunk of logits at a time.

For a vocabulary of 128,256 the logits of 4,096 tokens in float32 take 2 GiB, and autograd keeps several
copies; a chunk takes a fixed part of that. The head is frozen, so the gradient of the hidden states is all
that the backward pass needs: it is computed while a chunk's logits exist, and the logits are dropped.

Shapes: N supervised tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qlora_tui.engine.fast import compiled

LOGITS_PER_CHUNK = 1 << 26
"""Most logits held at once unless a chunk is asked for: 256 MiB in float32, so 523 tokens at a vocabulary of 128,256."""


@dataclass(frozen=True, slots=True)
class Head:
    """The frozen output layer: `softcap` * tanh(logits / softcap) where a family caps them, logits / `divisor` where one divides them."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    softcap: float | None = None
    divisor: float = 1.0

    def divided(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Return the hidden states as the product reads them: dividing them divides the logits, and costs a vocabulary less."""
        return hidden_NH if self.divisor == 1 else hidden_NH / self.divisor

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [N, V]."""
        return self.of_divided(self.divided(hidden_NH))

    def of_divided(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [N, V] of hidden states that were divided."""
        logits_NV = torch.nn.functional.linear(hidden_NH, self.weight_VH, self.bias_V).float()
        return logits_NV if self.softcap is None else logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)


def token_losses(hidden_NH: torch.Tensor, head: Head, labels_N: torch.Tensor, chunk: int = 0) -> torch.Tensor:
    """Return the negative log-likelihood of each label in float32 nats [N], differentiable in `hidden_NH`.

    Args:
        hidden_NH: last hidden states of the positions that predict something.
        head: the output layer.
        labels_N: the tokens that follow.
        chunk: tokens whose logits are held at once; 0: as many as `LOGITS_PER_CHUNK` allows. Fewer take less memory and
            more kernel launches; the losses differ by rounding at most.
    """
    losses: torch.Tensor = _ChunkedCrossEntropy.apply(head.divided(hidden_NH), labels_N, head, chunk)  # type: ignore[no-untyped-call]  # torch leaves it bare
    return losses


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The hidden gradient is made in the forward pass; the backward pass only scales its rows."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: torch.Tensor, labels_N: torch.Tensor, head: Head, chunk: int) -> torch.Tensor:
        losses_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_NH.device)
        grad_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        rows = chunk or max(1, LOGITS_PER_CHUNK // head.weight_VH.shape[0])
        for start in range(0, len(labels_N), rows):
            part = slice(start, start + rows)
            _chunk(hidden_NH[part], labels_N[part], head, losses_N[part], None if grad_NH is None else grad_NH[part])
        if grad_NH is not None:
            ctx.save_for_backward(grad_NH)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        # In place: a step goes back once. Autograd counts changes of what it saved, so going back twice raises.
        (grad_NH,) = ctx.saved_tensors
        return grad_NH.mul_(grads[0][:, None].to(grad_NH.dtype)), None, None, None


def _chunk(hidden_nH: torch.Tensor, labels_n: torch.Tensor, head: Head, losses_n: torch.Tensor, grad_nH: torch.Tensor | None) -> None:
    """Write a chunk's losses, and its hidden gradient where one is wanted; its logits are gone before the next chunk's are made."""
    if hidden_nH.dtype != torch.float32 and not compiled.why_not(hidden_nH.device):
        from qlora_tui.engine.fast import kernels  # imports Triton

        logits_nV = torch.nn.functional.linear(hidden_nH, head.weight_VH, head.bias_V)
        losses_n.copy_(kernels.cross_entropy_(logits_nV, labels_n, head.softcap, gradient=grad_nH is not None))
        if grad_nH is not None:
            torch.mm(logits_nV, head.weight_VH, out=grad_nH)
        return
    logits_nV = head.of_divided(hidden_nH)
    lse_n = torch.logsumexp(logits_nV, dim=-1)
    losses_n.copy_(lse_n - logits_nV.gather(1, labels_n[:, None]).squeeze(1))
    if grad_nH is not None:
        grad_nH.copy_(_hidden_gradient(logits_nV, lse_n, labels_n, head))


def _hidden_gradient(logits_nV: torch.Tensor, lse_n: torch.Tensor, labels_n: torch.Tensor, head: Head) -> torch.Tensor:
    """Return d loss / d hidden of a chunk, overwriting its logits to save a copy of them."""
    slope_nV = None if head.softcap is None else logits_nV.div(head.softcap).square_().neg_().add_(1)
    grad_nV = logits_nV.sub_(lse_n[:, None]).exp_()
    grad_nV.scatter_add_(1, labels_n[:, None], torch.full_like(lse_n, -1.0)[:, None])
    if slope_nV is not None:
        grad_nV.mul_(slope_nV)
    del slope_nV  # as large as the logits, and a narrow copy of those comes next
    return grad_nV.to(head.weight_VH.dtype) @ head.weight_VH
