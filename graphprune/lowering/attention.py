"""Attention modules written out as plain tensor operations.

``nn.MultiheadAttention`` is one opaque node to a symbolic tracer, although its projections and heads are what a
compiler wants to cut. The functions here compute the same from the same parameters (so names do not change), but as
operations that a graph shows, with the head sizes as literals:

    q, k, v = split(linear(x, in_proj_weight), [E, E, E])      one in-projection for self-attention
    q = q.view(B, T, heads, head_dim).transpose(1, 2)          B and T come from ``x.size``
    y = scaled_dot_product_attention(q, k, v, scale=head_dim ** -0.5)
    out_proj(y.transpose(1, 2).reshape(B, T, heads * head_dim))

The scale is a constant of the model: it keeps its value when channels of a head are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

__all__ = ["LOWERINGS", "attention_forward", "can_lower", "encoder_forward", "lowered_attention"]


def attention_forward(
    attention: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``attention(query, key, value, ...)`` of evaluation mode by traceable operations.

    Args:
        attention: The module, with extra rows of keys and values or without.
        query: Target sequence, three-dimensional.
        key: Source sequence.
        value: Source sequence.
        key_padding_mask: (batch, source), True or -inf where a source position is ignored.
        need_weights: Whether the attention weights are returned too.
        attn_mask: (target, source) or (batch * heads, target, source).
        average_attn_weights: Whether the weights are averaged over the heads.
        is_causal: A hint that `attn_mask` is causal; the mask says it all, so the hint is not used.

    Raises:
        fx.proxy.TraceError: A mask is a graph value whose kind is not known while tracing.
    """
    del is_causal
    is_self, shares_source = query is key and key is value, key is value
    if not attention.batch_first:
        query = query.transpose(0, 1)
        key = query if is_self else key.transpose(0, 1)
        value = key if shares_source else value.transpose(0, 1)
    heads, head_dim = attention.num_heads, attention.head_dim
    batch, target = query.size(0), query.size(1)
    source = target if is_self else key.size(1)
    q, k, v = _project(attention, query, key, value, is_self=is_self)
    mask = _merge_masks(attn_mask, key_padding_mask, attention, batch, target, source)
    if attention.bias_k is not None and attention.bias_v is not None:
        k = torch.cat([k, attention.bias_k.expand(batch, -1, -1)], dim=1)
        v = torch.cat([v, attention.bias_v.expand(batch, -1, -1)], dim=1)
    if attention.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    if extra := int(attention.bias_k is not None) + int(attention.add_zero_attn):
        source = source + extra
        mask = None if mask is None else F.pad(mask, (0, extra))
    q = q.view(batch, target, heads, head_dim).transpose(1, 2)
    k = k.view(batch, source, heads, head_dim).transpose(1, 2)
    v = v.view(batch, source, heads, head_dim).transpose(1, 2)
    scale = float(head_dim**-0.5)
    weights: Tensor | None = None
    if need_weights:
        scores = torch.matmul(q * scale, k.transpose(-2, -1))
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        mixed = torch.matmul(weights, v)
        if average_attn_weights:
            weights = weights.mean(dim=1)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    joined = mixed.transpose(1, 2).reshape(batch, target, heads * head_dim)
    output = attention.out_proj(joined)
    return (output if attention.batch_first else output.transpose(0, 1)), weights


def _project(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *, is_self: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the projected query, key and value, by as few linears as their sharing allows."""
    embed, bias = attention.embed_dim, attention.in_proj_bias
    sizes = [embed, embed, embed]
    if not attention._qkv_same_embed_dim:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    elif is_self:
        parts = F.linear(query, attention.in_proj_weight, bias).split(sizes, dim=-1)
        return (
            parts[0],
            parts[1],
            parts[2],
        )  # to unpack a proxy is slow: it reads the caller's bytecode
    else:
        q_weight, k_weight, v_weight = attention.in_proj_weight.split(sizes, dim=0)
        weights = (q_weight, k_weight, v_weight)
    if bias is None:
        biases: tuple[Tensor | None, ...] = (None, None, None)
    else:
        q_bias, k_bias, v_bias = bias.split(sizes, dim=0)
        biases = (q_bias, k_bias, v_bias)
    return (
        F.linear(query, weights[0], biases[0]),
        F.linear(key, weights[1], biases[1]),
        F.linear(value, weights[2], biases[2]),
    )


def _merge_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    attention: nn.MultiheadAttention,
    batch: int,
    target: int,
    source: int,
) -> Tensor | None:
    """Return one additive mask that broadcasts over (batch, heads, target, source), or None."""
    dtype = attention.out_proj.weight.dtype
    merged: Tensor | None = None
    if attn_mask is not None:
        merged = _additive(attn_mask, dtype)
        if merged.dim() == 3:
            merged = merged.view(batch, attention.num_heads, target, source)
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, dtype).view(batch, 1, 1, source)
        merged = padding if merged is None else merged + padding
    return merged


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(mask, fx.Proxy):
        raise fx.proxy.TraceError(
            f"attention mask {mask.node.name} is a graph value: its dtype and rank are not known"
        )
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    return mask.to(dtype)


def encoder_forward(
    encoder: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """Compute ``encoder(src, ...)`` of evaluation mode without the nested-tensor fast path."""
    output = src
    for layer in encoder.layers:
        output = layer(
            output,
            src_mask=mask,
            is_causal=bool(is_causal),
            src_key_padding_mask=src_key_padding_mask,
        )
    return output if encoder.norm is None else encoder.norm(output)


LOWERINGS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.MultiheadAttention: attention_forward,
    nn.TransformerEncoder: encoder_forward,
}
"""Module class -> function of (module, its forward arguments) that computes its forward by visible operations."""


def can_lower(module: nn.Module) -> bool:
    """Say whether `module` has a traceable form here."""
    return type(module) in LOWERINGS


@contextmanager
def lowered_attention() -> Iterator[None]:
    """Within the context, attention modules of every model run the traceable form; used around `torch.export`."""
    originals = {kind: kind.forward for kind in LOWERINGS}

    def patched(kind: type[nn.Module]) -> Callable[..., Any]:
        lowered, original = LOWERINGS[kind], originals[kind]

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else next(iter(kwargs.values()))
            is_batched = first.dim() == 3
            return (lowered if can_lower(self) and is_batched else original)(self, *args, **kwargs)

        return forward

    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for kind in LOWERINGS:
            kind.forward = patched(kind)
        yield
    finally:
        for kind, original in originals.items():
            kind.forward = original
        torch.backends.mha.set_fastpath_enabled(fast_path)
