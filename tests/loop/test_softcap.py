"""Attention with capped scores: tiles against torch's own search, and outputs against one mask over everything, on a processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused import IDS, gradients, in_32_bits, loaded_from, write
from test_packing import LAID, parts_of, seen_by
from torch.nn.attention.flex_attention import create_block_mask

from qlora_tui.engine.batches import blocks_of
from qlora_tui.engine.fast import softcap

CPU = torch.device("cpu")


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 500),
    beyond=st.integers(0, 200),
)
def test_tiles_are_those_that_a_search_of_every_pair_finds(lengths: list[int], window: int | None, beyond: int) -> None:
    """What lies after the last row, in batches of a rounded length, is one more row."""
    length = sum(lengths) + beyond
    ours = softcap.tiles_of(blocks_of(lengths, CPU).bounds, length, window)
    row = torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([*lengths, beyond]))

    def seen(_row: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (query - key < (window or length)) & (row[query] == row[key])

    searched = create_block_mask(seen, None, None, length, length, device="cpu")
    pairs = torch.arange(length)
    assert torch.equal(ours.mask_mod(0, 0, pairs[:, None], pairs), seen(0, 0, pairs[:, None], pairs))
    for number, columns in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        expected = vars(searched)[number]
        assert torch.equal(vars(ours)[number], expected)
        for mine, theirs, size in zip(vars(ours)[columns][0, 0], vars(searched)[columns][0, 0], expected[0, 0], strict=True):
            assert torch.equal(mine[:size], theirs[:size])


@given(**LAID)
def test_attention_is_that_of_one_mask_over_all(lengths: list[int], window: int | None, heads: tuple[int, int]) -> None:
    query, key, value = parts_of(lengths, heads)
    ours, seen = softcap.attend(query, key, value, blocks_of(lengths, CPU), window, 0.3, 0.5), seen_by(lengths, window)
    key, value = (part.repeat_interleave(heads[0] // heads[1], dim=2) for part in (key, value))
    scores = torch.einsum("bqad,bkad->baqk", query, key) * 0.3
    weights = (torch.tanh(scores / 0.5) * 0.5).masked_fill(~seen, float("-inf")).softmax(-1)
    torch.testing.assert_close(ours, torch.einsum("baqk,bkad->bqad", weights, value), rtol=1e-4, atol=1e-5)


def test_the_cap_is_felt(tmp_path: Path, fused_on_cpu: None) -> None:
    """Else the comparisons with transformers' layers would hold without one."""
    write(tmp_path, "gemma2")
    fused = in_32_bits(loaded_from(tmp_path, fused=True))
    capped, _ = gradients(fused)
    for layer in fused.decoder.layers:  # type: ignore[union-attr]
        layer.forward.cap = 1e6  # type: ignore[union-attr]
    assert (gradients(fused)[0] - capped).norm() > 1e-2 * capped.norm()


def test_a_mask_that_somebody_gives_is_obeyed(tmp_path: Path, fused_on_cpu: None) -> None:
    write(tmp_path, "gemma2")
    plain, fused = (in_32_bits(loaded_from(tmp_path, fused=way)) for way in (False, True))
    given = torch.ones_like(IDS)
    given[0, :5] = 0  # padded on the left
    with torch.no_grad():
        ours, theirs = (
            loaded.model.get_base_model().model(input_ids=IDS, attention_mask=given, use_cache=False)[0] for loaded in (fused, plain)
        )
    torch.testing.assert_close(ours[:, 5:], theirs[:, 5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "values", "why"),
    [
        ({}, {"attn_implementation": "eager"}, "holds its scores"),
        ({"attn_logit_softcapping": None}, {}, "capped attention without its cap"),
        ({"attention_dropout": 0.1}, {}, "dropout of attention"),
    ],
    ids=str,
)
def test_what_stays_plain(tmp_path: Path, fused_on_cpu: None, config: dict[str, Any], values: dict[str, Any], why: str) -> None:
    from transformers import AutoConfig

    write(tmp_path, "gemma2")
    said = AutoConfig.from_pretrained(tmp_path)
    said.update(config)
    said.save_pretrained(tmp_path)
    loaded = loaded_from(tmp_path, fused=True, **values)
    assert why in loaded.why_plain
    assert not loaded.caps_scores


def test_a_kernel_that_cannot_be_compiled_leaves_the_plain_way_and_says_so(
    tmp_path: Path, fused_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "gemma2")
    hidden, _ = gradients(in_32_bits(loaded_from(tmp_path, fused=False)))
    monkeypatch.setattr(softcap, "why_not", lambda *_: "attention with capped scores cannot be compiled: no room")
    loaded = loaded_from(tmp_path, fused=True)
    assert loaded.why_plain == "attention with capped scores cannot be compiled: no room"
    torch.testing.assert_close(gradients(in_32_bits(loaded))[0], hidden)


def test_tiles_are_found_once_a_batch_and_again_after_they_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded batch makes its tiles anew whenever it is replayed, so nobody else may read them."""
    found = list[torch.Tensor]()
    real = softcap.tiles_of
    monkeypatch.setattr(softcap, "tiles_of", lambda bounds, *rest: found.append(bounds) or real(bounds, *rest))
    softcap.forget_tiles()
    one, other = blocks_of([200, 300], CPU), blocks_of([200, 300], CPU)
    for blocks in (one, one, other):
        softcap._tiles_of_blocks(blocks, 500, None)
    assert [bounds is blocks.bounds for bounds, blocks in zip(found, (one, other), strict=True)] == [True, True]
    softcap._tiles_of_rows(2, 250, 500, None, CPU)
    softcap._tiles_of_rows(2, 250, 500, None, CPU)
    assert len(found) == 3
    softcap.forget_tiles()
    softcap._tiles_of_blocks(one, 500, None)
    softcap._tiles_of_rows(2, 250, 500, None, CPU)
    assert len(found) == 5
