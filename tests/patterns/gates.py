"""Gated units, squeeze and excitation, attention over channels and over space."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Net, conv, lin, pattern, rand

# -- gated linear units, in every spelling ----------------------------------------------------------------------------


@pattern("a")
def glu_module() -> Net:
    return Net(lambda m, x: m.z(m.glu(m.a(x))), a=conv(3, 12), glu=nn.GLU(dim=1), z=conv(6, 7))


@pattern("a")
def glu_functional_last_dim() -> Net:
    return Net(lambda m, x: m.z(F.glu(m.a(x))), shape=(9, 5), a=lin(5, 12), z=lin(6, 7))


@pattern("a")
def swiglu_chunk() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        gate, value = m.a(x).chunk(2, dim=-1)
        return m.z(F.silu(gate) * value)

    return Net(run, shape=(9, 5), a=lin(5, 12), z=lin(6, 7))


@pattern("gate up")
def swiglu_two_projections() -> Net:
    return Net(
        lambda m, x: m.z(F.silu(m.gate(x)) * m.up(x)),
        shape=(9, 5),
        gate=lin(5, 8, bias=False),
        up=lin(5, 8, bias=False),
        z=lin(8, 7),
    )


@pattern("a")
def geglu_split() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        value, gate = torch.split(m.a(x), 6, dim=-1)
        return m.z(value * F.gelu(gate, approximate="tanh"))

    return Net(run, shape=(9, 5), a=lin(5, 12), z=lin(6, 7))


@pattern("a")
def glu_split_computed_size() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        value, gate = y.split(y.shape[-1] // 2, dim=-1)
        return m.z(value * gate.sigmoid())

    return Net(run, shape=(9, 5), a=lin(5, 12), z=lin(6, 7))


@pattern("a")
def glu_tensor_split() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        value, gate = torch.tensor_split(m.a(x), 2, dim=1)
        return m.z(torch.tanh(value) * torch.sigmoid(gate))

    return Net(run, a=conv(3, 12), z=conv(6, 7))


@pattern("a")
def glu_hsplit() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        value, gate = torch.hsplit(m.a(x), 2)
        return m.z(value * torch.sigmoid(gate))

    return Net(run, a=conv(3, 12), z=conv(6, 7))


@pattern("a")
def glu_unbind() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        value, gate = m.a(x).unflatten(-1, (2, 6)).unbind(-2)
        return m.z(value * gate.sigmoid())

    return Net(run, shape=(9, 5), a=lin(5, 12), z=lin(6, 7))


@pattern("a")
def glu_interleaved_pairs() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x).view(-1, 9, 6, 2)
        return m.z(y[..., 0] * torch.sigmoid(y[..., 1]))

    return Net(run, shape=(9, 5), a=lin(5, 12), z=lin(6, 7))


@pattern("a")
def glu_strided_pairs() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.z(y[..., ::2] * torch.sigmoid(y[..., 1::2]))

    return Net(run, shape=(9, 5), a=lin(5, 12), z=lin(6, 7))


@pattern("a")
def glu_slices_of_half() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        half = y.size(1) // 2
        return m.z(y[:, :half] * torch.sigmoid(y[:, half:]))

    return Net(run, a=conv(3, 12), z=conv(6, 7))


@pattern("a")
def glu_narrow() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.z(y.narrow(1, 0, 6) * y.narrow(1, 6, 6).sigmoid())

    return Net(run, a=conv(3, 12), z=conv(6, 7))


@pattern("a")
def three_way_split_unequal() -> Net:
    """Mamba-like: one projection makes gate, value and two small parts that are used whole."""

    def run(m: Any, x: Tensor) -> Any:
        gate, value, small = torch.split(m.a(x), [8, 8, 3], dim=-1)
        return m.z(value * F.silu(gate) * small.mean(-1, keepdim=True))

    return Net(run, shape=(9, 5), a=lin(5, 19), z=lin(8, 7))


@pattern("a b")
def gated_convolution_of_split_channels() -> Net:
    """GSConv and gMLP: one half goes through a depthwise convolution and gates the other."""

    def run(m: Any, x: Tensor) -> Any:
        u, v = m.a(x).chunk(2, 1)
        return m.z(u * m.b(v))

    return Net(run, a=conv(3, 12), b=conv(6, 6, 3, groups=6), z=conv(6, 7))


@pattern("a b", zeros=False)
def spatial_gating_unit() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        u, v = F.gelu(m.a(x)).chunk(2, dim=-1)
        v = m.mix(m.norm(v).transpose(-1, -2)).transpose(-1, -2)
        return m.z(m.b(u * v))

    return Net(
        run,
        shape=(9, 5),
        a=lin(5, 12),
        norm=nn.LayerNorm(6),
        mix=lin(9, 9),
        b=lin(6, 8),
        z=lin(8, 4),
    )


@pattern("a")
def maxout_over_channel_pairs() -> Net:
    return Net(
        lambda m, x: m.z(m.a(x).view(-1, 6, 2, 6, 5).max(dim=2).values), a=conv(3, 12), z=conv(6, 7)
    )


@pattern("a")
def maxout_of_chunks() -> Net:
    """Light CNN: the larger of two halves."""

    def run(m: Any, x: Tensor) -> Any:
        left, right = torch.split(m.a(x), 6, 1)
        return m.z(torch.max(left, right))

    return Net(run, a=conv(3, 12), z=conv(6, 7))


@pattern("a b")
def highway() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        gate = torch.sigmoid(m.g(y))
        return m.z(gate * F.relu(m.b(y)) + (1 - gate) * y)

    return Net(run, shape=(9, 5), a=lin(5, 8), b=lin(8, 8), g=lin(8, 8), z=lin(8, 4))


# -- squeeze and excitation -------------------------------------------------------------------------------------------


def excitation(run: Any, **parts: Any) -> Net:
    return Net(run, a=conv(3, 8, 3), z=conv(8, 7), **parts)


@pattern("a f1 f2")
def squeeze_excite_linear_view() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        b, c, _, _ = y.size()
        s = m.pool(y).view(b, c)
        s = torch.sigmoid(m.f2(F.relu(m.f1(s)))).view(b, c, 1, 1)
        return m.z(y * s.expand_as(y))

    return excitation(run, pool=nn.AdaptiveAvgPool2d(1), f1=lin(8, 4), f2=lin(4, 8))


@pattern("a f1 f2")
def squeeze_excite_convolutions() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        s = F.adaptive_avg_pool2d(y, 1)
        return m.z(y * F.hardsigmoid(m.f2(F.relu(m.f1(s)))))

    return excitation(run, f1=conv(8, 4), f2=conv(4, 8))


@pattern("a f1 f2")
def squeeze_excite_mean_keepdim() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.z(y * m.f2(m.f1(y.mean((2, 3), keepdim=True)).relu_()).sigmoid_())

    return excitation(run, f1=conv(8, 4), f2=conv(4, 8))


@pattern("a f1 f2")
def squeeze_excite_none_index() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        s = torch.sigmoid(m.f2(torch.relu(m.f1(y.flatten(2).mean(-1)))))
        return m.z(y * s[:, :, None, None])

    return excitation(run, f1=lin(8, 4), f2=lin(4, 8))


@pattern("a f1 f2")
def squeeze_excite_channels_last() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x).permute(0, 2, 3, 1)
        s = torch.sigmoid(m.f2(torch.relu(m.f1(y.mean(dim=(1, 2), keepdim=True)))))
        return m.z((y * s).permute(0, 3, 1, 2))

    return excitation(run, f1=lin(8, 4), f2=lin(4, 8))


@pattern("a")
def effective_squeeze_excite() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.z(y * F.relu6(m.f(y.mean((2, 3), keepdim=True)) + 3.0) / 6.0)

    return excitation(run, f=conv(8, 8))


@pattern("", kept="a.weight", why="runs over it")
def efficient_channel_attention() -> Net:
    """ECA: a 1-D convolution runs over the channels, whose neighbours it mixes."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        s = m.f(y.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
        return m.z(y * s.sigmoid())

    return excitation(run, f=nn.Conv1d(1, 1, 3, padding=1, bias=False))


@pattern("a f1 f2")
def convolutional_block_attention() -> Net:
    """CBAM: a shared perceptron over mean and maximum, then a map from statistics over channels."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        mean, high = F.adaptive_avg_pool2d(y, 1), F.adaptive_max_pool2d(y, 1)
        y = y * torch.sigmoid(m.f2(F.relu(m.f1(mean))) + m.f2(F.relu(m.f1(high))))
        return m.z(y * torch.sigmoid(m.g(y)))

    return excitation(run, f1=conv(8, 4), f2=conv(4, 8), g=conv(8, 1, 3))


@pattern("f1", kept="a.weight", why="statistic")
def spatial_attention_by_statistics() -> Net:
    """The other half of CBAM: mean and maximum over channels change with their number."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(m.f1(x))
        s = torch.cat([y.mean(1, keepdim=True), y.max(1, keepdim=True)[0]], dim=1)
        return m.z(y * torch.sigmoid(m.g(s)))

    return excitation(run, f1=conv(3, 3), g=conv(2, 1, 3))


@pattern("a f")
def coordinate_attention() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        h = y.mean(3, keepdim=True)
        w = y.mean(2, keepdim=True).permute(0, 1, 3, 2)
        s = F.hardswish(m.f(torch.cat([h, w], dim=2)))
        h, w = torch.split(s, [6, 5], dim=2)
        return m.z(y * m.gh(h).sigmoid() * m.gw(w.permute(0, 1, 3, 2)).sigmoid())

    return excitation(run, f=conv(8, 4), gh=conv(4, 8), gw=conv(4, 8))


@pattern("a f")
def selective_kernels() -> Net:
    """SK: branches weighted by a softmax over branches, a channel at a time."""

    def run(m: Any, x: Tensor) -> Any:
        branches = torch.stack([m.a(x), m.b(x)], dim=1)
        s = m.f(branches.sum(1).mean((2, 3), keepdim=True))
        weights = m.g(s).view(-1, 2, 8, 1, 1).softmax(dim=1)
        return m.z((branches * weights).sum(1))

    return excitation(run, b=conv(3, 8, 5), f=conv(8, 4), g=conv(4, 16))


@pattern("a")
def split_attention_radix() -> Net:
    """ResNeSt: radix softmax over splits of a grouped convolution."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x).reshape(-1, 2, 8, 6, 5)
        s = m.g(F.relu(m.f(y.sum(1).mean((2, 3), keepdim=True))))
        s = F.softmax(s.view(-1, 1, 2, 8).transpose(1, 2), dim=1).reshape(-1, 2, 8, 1, 1)
        return m.z((y * s).sum(dim=1))

    return Net(run, a=conv(3, 16), f=conv(8, 4), g=conv(4, 16), z=conv(8, 7))


@pattern("a")
def gather_excite() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        s = F.interpolate(m.f(y), size=y.shape[-2:], mode="nearest")
        return m.z(y * s.sigmoid())

    return excitation(run, f=nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8))


@pattern("a f")
def global_context() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        b, c, h, w = y.shape
        weights = m.k(y).view(b, 1, h * w).softmax(2).unsqueeze(-1)
        context = torch.matmul(y.view(b, c, h * w).unsqueeze(1), weights).view(b, c, 1, 1)
        return m.z(y + m.g(m.f(context).relu()))

    return excitation(run, k=conv(8, 1), f=conv(8, 4), g=conv(4, 8))


@pattern("a")
def simam_energy() -> Net:
    """SimAM: parameter-free statistics over space."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        d = (y - y.mean(dim=[2, 3], keepdim=True)).pow(2)
        v = d.sum(dim=[2, 3], keepdim=True) / (y.shape[2] * y.shape[3] - 1)
        return m.z(y * torch.sigmoid(d / (4 * (v + 1e-4)) + 0.5))

    return excitation(run)


@pattern("a")
def global_response_norm() -> Net:
    """ConvNeXt V2 divides by a mean over channels, which changes with their number."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        g = y.norm(p=2, dim=(2, 3), keepdim=True)
        return m.z(m.w * (y * (g / (g.sum(1, keepdim=True) + 1e-6))) + y)

    return excitation(run, w=rand(1, 8, 1, 1))


@pattern("a")
def layer_scale_and_drop_path() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.z(y + F.dropout(m.gamma.view(-1, 1, 1) * m.f(y), 0.1, m.training))

    return excitation(run, f=conv(8, 8, 3), gamma=rand(8))


@pattern("a b")
def feature_wise_modulation() -> Net:
    """FiLM: scale and shift of channels from a condition."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        scale, shift = m.b(x.mean((2, 3))).chunk(2, dim=1)
        return m.z(y * (1 + scale[..., None, None]) + shift[..., None, None])

    return excitation(run, b=lin(3, 16))


@pattern("a b", zeros=False)
def modulation_with_unsqueezed_embedding() -> Net:
    """Diffusion U-Nets add a time embedding to channels, and adaptive layer norm splits six ways."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        s1, b1, g1 = m.b(F.silu(x.mean(1))).unsqueeze(1).chunk(3, dim=-1)
        return m.z(y + g1 * (m.norm(y) * (1 + s1) + b1))

    return Net(
        run,
        shape=(9, 5),
        a=lin(5, 8),
        b=lin(5, 24),
        norm=nn.LayerNorm(8, elementwise_affine=False),
        z=lin(8, 4),
    )
