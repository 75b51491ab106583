"""Convolutions of every kind."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.patterns.base import Net, conv, lin, pattern, rand


@pattern("a b")
def convolution_1d() -> Net:
    return Net(
        lambda m, x: m.z(m.b(m.a(x)).mean(-1)),
        shape=(3, 9),
        a=nn.Conv1d(3, 6, 3),
        b=nn.Conv1d(6, 8, 3, stride=2),
        z=lin(8, 4),
    )


@pattern("a b")
def convolution_3d() -> Net:
    return Net(
        lambda m, x: m.z(m.b(m.n(m.a(x))).flatten(1)),
        shape=(3, 4, 5, 6),
        a=nn.Conv3d(3, 6, 3, padding=1),
        n=nn.BatchNorm3d(6),
        b=nn.Conv3d(6, 8, 3, stride=2),
        z=lin(32, 4),
    )


@pattern("a b")
def convolution_one_spatial_dimension_of_2d() -> Net:
    return Net(
        lambda m, x: m.z(m.b(m.a(x))),
        a=nn.Conv2d(3, 6, (3, 1), padding=(1, 0)),
        b=nn.Conv2d(6, 8, (1, 3), padding="same"),
        z=conv(8, 4),
    )


@pattern("a b c")
def transposed_convolutions_1d() -> Net:
    return Net(
        lambda m, x: m.z(m.c(m.b(m.a(x)))),
        shape=(3, 9),
        a=nn.Conv1d(3, 6, 1),
        b=nn.ConvTranspose1d(6, 8, 4, 2, 1),
        c=nn.ConvTranspose1d(8, 10, 3, groups=2),
        z=nn.Conv1d(10, 4, 1),
    )


@pattern("a b.weight[1] c.weight[1]")
def transposed_convolutions_3d() -> Net:
    return Net(
        lambda m, x: m.z(m.c(F.relu(m.b(m.a(x))))),
        shape=(3, 2, 3, 4),
        a=nn.Conv3d(3, 6, 1),
        b=nn.ConvTranspose3d(6, 8, 2, 2),
        c=nn.ConvTranspose3d(8, 10, 3, groups=2),
        z=nn.Conv3d(10, 4, 1),
    )


@pattern("a")
def transposed_depthwise() -> Net:
    return Net(
        lambda m, x: m.z(m.b(m.a(x))),
        a=conv(3, 6),
        b=nn.ConvTranspose2d(6, 6, 4, 2, 1, groups=6),
        z=conv(6, 4),
    )


@pattern("a")
def transposed_depthwise_with_multiplier() -> Net:
    return Net(
        lambda m, x: m.z(m.b(m.a(x))),
        a=conv(3, 6),
        b=nn.ConvTranspose2d(6, 12, 2, 2, groups=6),
        z=conv(12, 4),
    )


@pattern("a b")
def depthwise_with_multiplier() -> Net:
    return Net(
        lambda m, x: m.z(m.b(m.a(x)).relu()),
        a=conv(3, 6),
        b=conv(6, 18, 3, groups=6),
        z=conv(18, 4),
    )


@pattern("a b c")
def grouped_convolutions() -> Net:
    return Net(
        lambda m, x: m.z(m.c(m.b(m.a(x)).relu())),
        a=conv(3, 12),
        b=conv(12, 9, 3, groups=3),
        c=conv(9, 6, groups=3),
        z=conv(6, 4),
    )


@pattern("a", kept="b", why="group stays")
def grouped_convolution_with_one_input_of_many() -> Net:
    return Net(
        lambda m, x: m.z(m.b(m.a(x)).relu()), a=conv(3, 8), b=conv(8, 4, 3, groups=4), z=conv(4, 5)
    )


@pattern("a b")
def functional_convolution_of_parameters() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = F.conv2d(x, m.a, m.bias, padding=1)
        return m.z(F.conv2d(x, m.b, stride=1, groups=2))

    return Net(run, a=rand(8, 3, 3, 3), bias=rand(8), b=rand(6, 4, 1, 1), z=conv(6, 4))


@pattern("a")
def blur_pool_with_expanded_buffer() -> Net:
    """Antialiasing: a fixed filter is expanded to one per channel."""

    def run(m: Any, x: Tensor) -> Any:
        y = F.pad(m.a(x), (1, 1, 1, 1), mode="reflect")
        return m.z(F.conv2d(y, m.filter.expand(y.shape[1], 1, 3, 3), stride=2, groups=y.shape[1]))

    return Net(run, a=conv(3, 6), z=conv(6, 4), filter=torch.rand(1, 1, 3, 3))


@pattern("a")
def blur_pool_with_repeated_buffer() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        return m.z(F.conv2d(m.a(x), m.filter, stride=2, groups=6))

    return Net(run, a=conv(3, 6), z=conv(6, 4), filter=torch.rand(1, 1, 3, 3).repeat(6, 1, 1, 1))


@pattern("a b")
def convolution_of_padded_modes() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = F.pad(m.a(x), (1, 1, 0, 2), mode="replicate")
        y = F.pad(m.b(y), (0, 1, 1, 0), mode="circular")
        return m.z(m.border(m.frame(y)))

    return Net(
        run,
        a=conv(3, 6),
        b=conv(6, 8),
        border=nn.ReflectionPad2d(1),
        frame=nn.ConstantPad2d((0, 1, 2, 0), 0.5),
        z=conv(8, 4),
    )


@pattern("a")
def padded_channels() -> Net:
    return Net(
        lambda m, x: m.z(F.pad(m.a(x), (0, 0, 0, 0, 2, 1), value=0.25)), a=conv(3, 6), z=conv(9, 4)
    )


@pattern("b", kept="a", why="statistic")
def weight_standardised_convolution() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        w = m.b
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return m.z(F.conv2d(m.a(x), w))

    return Net(run, shape=(3, 6, 5), a=conv(3, 6), b=rand(8, 6, 1, 1), z=conv(8, 4))


@pattern("a b b[1]", zeros=False)
def weight_standardised_by_batch_norm() -> Net:
    """As timm does it: a batch norm over the weight, which takes its statistics over what is kept, like other norms."""

    def run(m: Any, x: Tensor) -> Any:
        w = F.batch_norm(m.b.reshape(1, 8, -1), None, None, training=True).reshape_as(m.b)
        return m.z(F.conv2d(m.a(x), w))

    return Net(run, a=conv(3, 6), b=rand(8, 6, 3, 3), z=conv(8, 4))


@pattern("a b.parametrizations.weight.original1", zeros=False)
def weight_norm() -> Net:
    return Net(
        lambda m, x: m.z(m.b(m.a(x))),
        a=conv(3, 6),
        b=parametrizations.weight_norm(conv(6, 8, 3)),
        z=conv(8, 4),
    )


@pattern("b.weight_v", zeros=False)
def weight_norm_of_old() -> Net:
    with torch.no_grad():
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            part = nn.utils.weight_norm(conv(6, 8, 3))
    return Net(lambda m, x: m.z(m.b(m.a(x))), a=conv(3, 6), b=part, z=conv(8, 4))


@pattern("a")
def spectral_norm() -> Net:
    """The norm divides by a singular value, which every entry of the weight moves."""
    return Net(
        lambda m, x: m.z(m.c(m.b(m.a(x)))),
        shape=(9, 5),
        a=lin(5, 6),
        b=lin(6, 7),
        c=parametrizations.spectral_norm(lin(7, 8)),
        z=lin(8, 4),
    )


class _Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


class _LowRank(nn.Module):
    def __init__(self, outs: int, ins: int) -> None:
        super().__init__()
        self.down, self.up = rand(3, ins), rand(outs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up @ self.down


@pattern("a b.parametrizations.weight.original")
def parametrized_weight() -> Net:
    part = lin(6, 8)
    parametrize.register_parametrization(part, "weight", _Positive())
    return Net(lambda m, x: m.z(m.b(m.a(x))), shape=(9, 5), a=lin(5, 6), b=part, z=lin(8, 4))


@pattern("a b.parametrizations.weight.original")
def low_rank_adapter() -> Net:
    part = lin(6, 8)
    parametrize.register_parametrization(part, "weight", _LowRank(8, 6))
    return Net(lambda m, x: m.z(m.b(m.a(x))), shape=(9, 5), a=lin(5, 6), b=part, z=lin(8, 4))


@pattern("a b down")
def low_rank_branch() -> Net:
    return Net(
        lambda m, x: m.z(m.b(m.a(x)) + 0.5 * m.up(m.down(m.a(x)))),
        shape=(9, 5),
        a=lin(5, 6),
        b=lin(6, 8),
        down=lin(6, 3),
        up=lin(3, 8),
        z=lin(8, 4),
    )


@pattern("a b")
def weight_masked_by_buffer() -> Net:
    return Net(
        lambda m, x: m.z(F.linear(m.a(x), m.b * m.mask)),
        shape=(9, 5),
        a=lin(5, 6),
        b=rand(8, 6),
        mask=(torch.rand(8, 6) > 0.3).float(),
        z=lin(8, 4),
    )


@pattern("a b")
def convolution_and_batch_norm_fused_branches() -> Net:
    """RepVGG: three branches are added, one of them a batch norm alone."""
    return Net(
        lambda m, x: m.z(m.n1(m.b(m.a(x))) + m.n2(m.c(m.a(x))) + m.n3(m.a(x))),
        a=conv(3, 6),
        b=conv(6, 6, 3),
        n1=nn.BatchNorm2d(6),
        c=conv(6, 6),
        n2=nn.BatchNorm2d(6),
        n3=nn.BatchNorm2d(6),
        z=conv(6, 4),
    )


# -- kernels that are read as numbers, too ----------------------------------------------------------------------------


@pattern("a c a.weight c.weight[1]")
def central_difference_convolution() -> Net:
    """Yu et al. 2020: a convolution minus a share of what its summed kernel gives."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        summed = m.c.weight.sum(2).sum(2)[:, :, None, None]
        return m.z(m.c(y) - 0.7 * F.conv2d(y, summed))

    return Net(run, a=conv(3, 8), c=conv(8, 10, 3, bias=False), z=conv(10, 4))


@pattern("a c", zeros=False)
def outputs_divided_by_the_length_of_their_kernels() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        lengths = m.c.weight.pow(2).sum((2, 3)).sqrt().sum(1)
        return m.z(m.c(m.a(x)) / (lengths[:, None, None] + 0.1))

    return Net(run, a=conv(3, 8), c=conv(8, 10, 3), z=conv(10, 4))


@pattern("a s w w[1]")
def demodulated_by_its_scales() -> Net:
    """StyleGAN2, with the scales at the activations in place of the kernel."""

    def run(m: Any, x: Tensor) -> Any:
        scales = m.s(x.mean((2, 3)))
        y = F.conv2d(m.a(x) * scales[:, :, None, None], m.w, padding=1)
        squares = m.w.square().sum((2, 3))[None] * scales.square()[:, None]
        return m.z(y * torch.rsqrt(squares.sum(2) + 1e-8)[:, :, None, None])

    return Net(run, a=conv(3, 8), s=lin(3, 8), w=rand(10, 8, 3, 3), z=conv(10, 4))


@pattern("a w[1]")
def transposed_kernel_that_is_summed() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = F.conv_transpose1d(m.a(x), m.w, stride=2)
        return m.z(y * m.w.abs().sum((0, 2))[:, None])

    return Net(run, shape=(3, 8), a=nn.Conv1d(3, 8, 1), w=rand(8, 10, 2), z=nn.Conv1d(10, 4, 1))


@pattern("w[1] z[1]", kept="a", why="meets a dimension whose size cannot change")
def kernels_mixed_for_each_sample() -> Net:
    """Dynamic convolution, the samples as groups of one image."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        b, c, h, w = y.shape
        attention = m.f(y.mean((2, 3))).softmax(-1)
        kernels = (attention @ m.w.view(3, -1)).view(b * 10, c, 3, 3)
        out = F.conv2d(y.reshape(1, b * c, h, w), kernels, padding=1, groups=b)
        return m.z(out.view(b, 10, h, w).relu())

    return Net(run, a=conv(3, 8), f=lin(8, 3), w=rand(3, 10, 8, 3, 3), z=conv(10, 4))


@pattern("a p d")
def signs_of_activations() -> Net:
    """Binary activations: one of two numbers, by a comparison."""

    def run(m: Any, x: Tensor) -> Any:
        signs = torch.where(m.p(m.a(x).relu()) > 0, 1.0, -1.0)
        return m.z(m.d(signs).relu())

    return Net(run, a=conv(3, 8), p=conv(8, 6), d=conv(6, 10), z=conv(10, 4))


@pattern("a p")
def a_mask_times_a_number() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return m.z((m.p(y) > 0) * 0.5)

    return Net(run, a=conv(3, 8), p=conv(8, 6), z=conv(6, 4))
