"""What the model answers to a prompt: token by token, always the likeliest one.

Greedy, so that it draws no random number and shows the same for the same adapter. What it needs of memory is the keys and values of
`MOST_TOKENS` tokens at most: 72 MiB for an 8 B model with grouped heads, 400 MiB for a 13 B one without. A training step keeps more for a
row of that length (inputs of all layers, the inside of one, logits, the adapter's gradients), so the budget has no line for it; where
rows are far shorter and memory is nearly full, it may lack, and that costs the sample alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from qlora_tui.engine.load import Loaded

MOST_TOKENS = 512
"""Of prompt and answer together."""
ANSWER_TOKENS = 64
"""Where an answer is cut off unless it ends by itself."""


@torch.no_grad()
def greedy(loaded: Loaded, prompt: Sequence[int], most: int, stops: Collection[int], look: Callable[[], None]) -> list[int]:
    """Return up to `most` tokens that follow `prompt`, without the one of `stops` that ends them.

    The caller has put the model into eval mode. `look` is called before each token and may raise. Nothing of the model's own
    ideas of how to generate is asked (penalties, chance): what shows is what was trained.
    """
    look()
    ids = torch.tensor([list(prompt)], device=loaded.device)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=most,
        eos_token_id=sorted(stops) or None,
        pad_token_id=min(stops, default=0),
        use_cache=True,
    )
    made: torch.Tensor = loaded.model.get_base_model().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([_Looking(look)]),
    )
    answer = made[0, len(prompt) :].tolist()
    return answer[:-1] if answer and answer[-1] in stops else answer


class _Looking(StoppingCriteria):  # type: ignore[misc]  # transformers has no types here
    """Ends nothing by itself; it is where somebody can look between two tokens."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._look()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
