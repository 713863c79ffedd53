"""Attention whose scores are squashed, cap * tanh(score / cap), without the square of the length: Gemma 2's.

The flash kernel has no cap, so torch's flexible one is compiled: it makes scores a tile at a time and skips tiles that nobody
sees. Rows of a batch always lie end to end in it, padded ones too, and a window is a number on the card: so one program serves
every layer and every batch of a run. Tiles are found by arithmetic on their corners; torch's own search makes the square.

Off a card scores are made whole, in 32 bits: the same numbers, for tests.

Shapes: B rows, T tokens, A heads, D size of a head, N tiles along the rows; keys and values may have fewer heads.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from qlora_tui.engine.batches import Blocks
from qlora_tui.engine.fast.blocks import even_bounds
from qlora_tui.engine.meter import out_of_memory
from qlora_tui.engine.text import one_line

TILE = 128
"""Tokens of a tile's side, as the kernel counts them by default."""
_FEWEST = 2 * TILE  # one tile alone would be a program of its own
_PROBED = (2 * TILE, 3 * TILE)  # at the second length the compiler learns that lengths differ

Seen = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""Row, head, places of queries and of keys in; which of them see each other out."""


def attend(
    query_BTAD: torch.Tensor,
    key_BTAD: torch.Tensor,
    value_BTAD: torch.Tensor,
    blocks: Blocks | None,
    window: int | None,
    scale: float,
    cap: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return causal attention [B, T, A, D] with capped scores; a token sees `window` tokens with itself, or all before it in its row.

    Args:
        query_BTAD: queries.
        key_BTAD: keys.
        value_BTAD: values.
        blocks: where rows lie that go end to end, as `blocks.attend` has it.
        window: how many tokens a token sees, itself included; None: all.
        scale: what scores are multiplied by before the cap.
        cap: no score is larger.
        mask: what is added to scores [B, 1, T, T] in place of all that; scores are then made whole.
    """
    rows, length = query_BTAD.shape[:2]
    device = query_BTAD.device
    if mask is not None or not query_BTAD.is_cuda:
        if mask is None:
            bounds = even_bounds(1, length, device) if blocks is None else blocks.bounds
            places = torch.arange(length, device=device)
            mask = torch.zeros(length, length, device=device)
            mask.masked_fill_(~_seen(bounds, length, window)(0, 0, places[:, None], places[None]), float("-inf"))
        return _whole(query_BTAD, key_BTAD, value_BTAD, mask, scale, cap)
    tokens = rows * length
    if blocks is None:
        tiles = _tiles_of_rows(rows, length, max(tokens, _FEWEST), window, device)
    else:
        tiles = _tiles_of_blocks(blocks, max(tokens, _FEWEST), window)
    parts = (part.flatten(0, 1) for part in (query_BTAD, key_BTAD, value_BTAD))
    if tokens < _FEWEST:
        parts = (pad(part, (0, 0, 0, 0, 0, _FEWEST - tokens)) for part in parts)
    out = _compiled(scale, cap)(*(part.transpose(0, 1)[None] for part in parts), tiles)
    attended: torch.Tensor = out[0].transpose(0, 1)[:tokens].unflatten(0, (rows, length))
    return attended


def tiles_of(bounds: torch.Tensor, length: int, window: int | None) -> BlockMask:
    """Return which tiles of `length` by `length` anybody sees, and which are seen whole; nothing waits for the device.

    Rows lie in order, so of a tile before the diagonal the pair nearest to each other decides whether any is seen, and the
    pair farthest apart whether all are.
    """
    seen = _seen(bounds, length, window)
    starts_N = torch.arange(0, length, TILE, device=bounds.device)
    ends_N = (starts_N + TILE - 1).clamp(max=length - 1)
    rows, columns = (starts_N[:, None], ends_N[:, None]), (starts_N[None], ends_N[None])
    diagonal_NN = rows[0] == columns[0]
    before_NN = columns[0] < rows[0]
    any_NN = diagonal_NN | (before_NN & seen(0, 0, rows[0], columns[1]))
    filled_N = starts_N + TILE <= length
    all_NN = before_NN & seen(0, 0, rows[1], columns[0]) & filled_N[:, None] & filled_N[None]
    some, whole = _listed(any_NN & ~all_NN), _listed(all_NN)
    return BlockMask.from_kv_blocks(*some, *whole, BLOCK_SIZE=TILE, mask_mod=seen, seq_lengths=(length, length))


def why_not(device: torch.device, heads: tuple[int, int], size: int, scale: float, cap: float) -> str:
    """Return why the kernel cannot run for such heads on `device`, or an empty text; all that a run needs is compiled here.

    What was compiled before is forgotten: the compiler would take other heads for a number that changes, and it stops after
    eight programs. Off a card nothing is compiled, so nothing stands against it.

    Raises:
        torch.OutOfMemoryError: there is no room for a few hundred tokens.
    """
    if device.type != "cuda":
        return ""
    torch.compiler.reset()
    try:
        with warnings.catch_warnings(action="ignore"):  # the compiler reads gradients of tensors that have none, and warns of itself
            for trained, length in itertools.product((True, False), _PROBED):
                _try(device, (heads[0], heads[1], heads[1]), size, length, scale, cap, trained=trained)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever the compiler lacks, the plain way is left and the reason is told
        if out_of_memory(error):
            raise
        return f"attention with capped scores cannot be compiled: {one_line(error, limit=200)}"
    return ""


def _try(device: torch.device, heads: Sequence[int], size: int, length: int, scale: float, cap: float, *, trained: bool) -> None:
    """Attend once, and go back if `trained`."""
    parts = [torch.zeros(1, length, number, size, device=device, dtype=torch.bfloat16, requires_grad=trained) for number in heads]
    with torch.set_grad_enabled(trained):
        out = attend(parts[0], parts[1], parts[2], None, None, scale, cap)
        if trained:
            out.sum().backward()


def _seen(bounds: torch.Tensor, length: int, window: int | None) -> Seen:
    """Return who sees whom among `length` tokens; what lies after the last bound is a row too."""
    places = torch.arange(length, device=bounds.device, dtype=bounds.dtype)
    row_T = torch.searchsorted(bounds, places, right=True, out_int32=True)
    reach = torch.full((), length if window is None else window, device=bounds.device)  # a number of the card: one program for all

    def seen(_row: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (query - key < reach) & (row_T[query] == row_T[key])

    return seen


def _listed(tiles_NN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many tiles each row of tiles has, and their columns, those that it has first."""
    order = torch.argsort(tiles_NN.int(), dim=-1, descending=True, stable=True)
    return tiles_NN.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


@functools.lru_cache(maxsize=4)
def _tiles_of_rows(rows: int, length: int, tokens: int, window: int | None, device: torch.device) -> BlockMask:
    """Return the tiles of padded rows: the same in every layer with that window, so they are found once a batch."""
    return tiles_of(even_bounds(rows, length, device), tokens, window)


@functools.lru_cache(maxsize=4)
def _tiles_of_blocks(blocks: Blocks, tokens: int, window: int | None) -> BlockMask:
    """Return the tiles of rows that lie end to end, likewise; blocks are told apart by which they are, not by what is in them."""
    return tiles_of(blocks.bounds, tokens, window)


def forget_tiles() -> None:
    """Let go of the tiles that were found: a recorded batch may read none that it did not find itself, and none outlives it.

    Its tensors lie in memory that the next one uses, and are made anew whenever it is replayed.
    """
    _tiles_of_rows.cache_clear()
    _tiles_of_blocks.cache_clear()


@functools.cache
def _compiled(scale: float, cap: float) -> Callable[..., torch.Tensor]:
    """Return the kernel, compiled at its first call, and once more when lengths begin to differ.

    A whole graph or none: what is not compiled would hold all scores and say nothing.
    """

    def capped(score: torch.Tensor, _row: Any, _head: Any, _query: Any, _key: Any) -> torch.Tensor:
        return cap * torch.tanh(score / cap)

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: BlockMask) -> torch.Tensor:
        out = flex_attention(query, key, value, score_mod=capped, block_mask=tiles, scale=scale, enable_gqa=True)
        assert isinstance(out, torch.Tensor)  # what else it gives is not asked for
        return out

    return torch.compile(attention, fullgraph=True)


def _whole(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float, cap: float) -> torch.Tensor:
    """Return the same from scores that are made whole, in 32 bits."""
    groups = query.shape[2] // key.shape[2]
    query, key, value = (part.transpose(1, 2) for part in (query, key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)))
    scores = cap * torch.tanh((query @ key.transpose(2, 3)).float() * (scale / cap)) + mask
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)
