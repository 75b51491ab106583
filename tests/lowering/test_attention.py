"""Lowered attention computes what the module computes, and a graph of it shows heads as literals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphprune import capture
from graphprune.lowering.attention import attention_forward, lowered_attention

TOLERANCE = 1e-6


def _assert_equal(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_self_attention_is_equal(
    batch_first: bool, bias: bool, need_weights: bool, average: bool
) -> None:
    attention = nn.MultiheadAttention(12, 3, batch_first=batch_first, bias=bias).eval()
    x = torch.randn(4, 5, 12)
    options: dict[str, Any] = {"need_weights": need_weights, "average_attn_weights": average}
    expected, weights = attention(x, x, x, **options)
    found, found_weights = attention_forward(attention, x, x, x, **options)
    _assert_equal(found, expected)
    assert (found_weights is None) == (weights is None)
    torch.testing.assert_close(found_weights, weights)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 7, "vdim": 9}])
def test_cross_attention_is_equal(sizes: dict[str, int]) -> None:
    attention = nn.MultiheadAttention(12, 4, batch_first=True, **sizes).eval()
    query, key = torch.randn(2, 5, 12), torch.randn(2, 6, sizes.get("kdim", 12))
    value = torch.randn(2, 6, sizes.get("vdim", 12))
    _assert_equal(
        attention_forward(attention, query, key, value)[0], attention(query, key, value)[0]
    )


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("is_bool", [True, False])
@pytest.mark.parametrize("rank", [2, 3])
def test_masks_are_equal(need_weights: bool, is_bool: bool, rank: int) -> None:
    attention = nn.MultiheadAttention(12, 3, batch_first=True).eval()
    x = torch.randn(2, 5, 12)
    mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), diagonal=1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    attn_mask = mask if is_bool else torch.zeros(5, 5).masked_fill(mask, float("-inf"))
    if rank == 3:
        attn_mask = attn_mask.expand(6, 5, 5)
    key_padding = padding if is_bool else torch.zeros(2, 5).masked_fill(padding, float("-inf"))
    options: dict[str, Any] = {
        "key_padding_mask": key_padding,
        "attn_mask": attn_mask,
        "need_weights": need_weights,
    }
    _assert_equal(
        attention_forward(attention, x, x, x, **options)[0], attention(x, x, x, **options)[0]
    )


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}],
)
def test_extra_rows_of_keys_and_values(
    options: dict[str, bool], batch_first: bool, need_weights: bool
) -> None:
    attention = nn.MultiheadAttention(12, 3, batch_first=batch_first, **options).eval()
    x = torch.randn(2, 5, 12)
    mask = torch.triu(torch.ones(5, 5).bool(), 1)
    given = x if batch_first else x.transpose(0, 1)
    masks = {
        "attn_mask": mask,
        "key_padding_mask": torch.arange(5)[None] > torch.tensor([[3], [4]]),
    }
    for one in ({}, masks):
        arguments: dict[str, Any] = {"need_weights": need_weights, **one}
        found = attention_forward(attention, given, given, given, **arguments)
        expected = attention(given, given, given, **arguments)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                _assert_equal(a, b)


def test_classes_get_their_forward_back() -> None:
    original = nn.MultiheadAttention.forward
    with lowered_attention():
        assert nn.MultiheadAttention.forward is not original
    assert nn.MultiheadAttention.forward is original
    assert torch.backends.mha.get_fastpath_enabled()


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3)
        self.register_buffer("mask", torch.triu(torch.ones(5, 5, dtype=torch.bool), diagonal=1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, attn_mask=self.mask)[0]
        return y


def test_graph_shows_the_heads() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    model = nn.Sequential(
        nn.Linear(8, 12), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    )
    model.eval()
    program = capture(model, torch.randn(2, 5, 8))
    text = str(program)
    assert program.dialect == "fx"
    assert ", 3, 4)" in text
    assert "[12, 12, 12]" in text
    assert "1.layers.0.self_attn.in_proj_weight : float32[36, 12]" in text
    x = torch.randn(3, 5, 8)
    _assert_equal(program.module(x), model(x))


def test_mask_buffer_of_a_module() -> None:
    model = _Masked().eval()
    program = capture(model, torch.randn(5, 2, 12))
    x = torch.randn(5, 2, 12)
    _assert_equal(program.module(x), model(x))


def test_attention_with_extra_rows_is_captured_too() -> None:
    model = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True).eval()
    model.self_attn = nn.MultiheadAttention(12, 3, batch_first=True, add_bias_kv=True).eval()
    program = capture(model, torch.randn(2, 5, 12))
    x = torch.randn(3, 5, 12)
    _assert_equal(program.module(x), model(x))
