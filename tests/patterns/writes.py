"""Writes in place and into tensors, sizes, and control flow."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Net, Pair, conv, lin, pattern, rand

# -- writes -----------------------------------------------------------------------------------------------------------


@pattern("a b")
def written_into_an_empty_tensor() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        out = x.new_empty(x.shape[0], 14, 6, 5)
        out[:, :6] = m.a(x)
        out[:, 6:] = m.b(x)
        return m.z(out)

    return Net(run, a=conv(3, 6), b=conv(3, 8), z=conv(14, 4))


@pattern("a")
def written_row_by_row() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        out = torch.zeros_like(y)
        for i in range(6):
            out[:, :, i] = y[:, :, 5 - i] * (i + 1)
        return m.z(out)

    return Net(run, a=conv(3, 6), z=conv(6, 4))


@pattern("a")
def accumulated_in_place() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        out = y.new_zeros(y.shape)
        out += y
        out[:, :, 1:].add_(y[:, :, :-1], alpha=0.5)
        out.mul_(2).clamp_(-3, 3)
        return m.z(out)

    return Net(run, a=conv(3, 6), z=conv(6, 4))


@pattern("a b")
def added_to_a_tensor_that_a_list_holds() -> Net:
    """The list sees the sum: ``+=`` is no new tensor."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        features = [y]
        y += m.b(y)
        return m.z(torch.cat([y, features[0]], 1).relu())

    return Net(run, a=conv(3, 8), b=conv(8, 8, 3), z=conv(16, 4))


@pattern("a")
def states_collected_of_one_tensor() -> Net:
    """Every entry of the list is the last state."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        states = []
        for layer in m.layers:
            y += layer(y).relu()
            states.append(y)
        return m.z(torch.cat(states, 1))

    layers = nn.ModuleList([conv(8, 8), conv(8, 8)])
    return Net(run, a=conv(3, 8), layers=layers, z=conv(16, 4))


@pattern("a")
def a_part_multiplied_in_place() -> Net:
    """A gate that writes into one half of what the other half came from."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x) + 0
        u, v = y.chunk(2, 1)
        u *= v.sigmoid()
        return m.z(y)

    return Net(run, a=conv(3, 12), z=conv(12, 4))


@pattern("a b")
def a_shortcut_taken_before_it_changes() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        out = m.b(y)
        out += y
        shortcut = out
        out += m.c(out)
        out *= 0.5
        return m.z(out.relu() + shortcut)

    return Net(run, a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), z=conv(8, 4))


@pattern("a")
def sizes_counted_in_place() -> Net:
    """Numbers have no memory to share: the old height stays what it was."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        height = y.shape[2]
        old = height
        height += 2
        height -= 1
        return m.z(F.pad(y, (0, 0, 0, height - old)))

    return Net(run, a=conv(3, 8), z=conv(8, 4))


@pattern("a b")
def tokens_put_where_a_mask_is() -> Net:
    """Masked autoencoders: a learned token where nothing is known."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        w = m.mask.view(1, 9, 1).type_as(y)
        return m.z(m.b(y * (1 - w) + m.token.expand(y.shape[0], 9, -1) * w))

    return Net(
        run,
        shape=(9, 5),
        a=lin(5, 6),
        token=rand(1, 1, 6),
        mask=torch.rand(9) > 0.5,
        b=lin(6, 8),
        z=lin(8, 4),
    )


@pattern("a b")
def tokens_written_by_index() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        y = y.index_add(1, m.rows, m.b(y)[:, :3], alpha=0.5)
        y = y.index_copy(1, m.rows, y[:, 3:6] * 2)
        return m.z(y.index_fill(1, m.rows[:1], 0.3))

    return Net(
        run, shape=(9, 5), a=lin(5, 6), b=lin(6, 6), rows=torch.tensor([4, 0, 2]), z=lin(6, 4)
    )


@pattern("a b")
def messages_scattered_over_a_graph() -> Net:
    """Message passing over a fixed edge list."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        messages = m.b(y[:, m.source])
        out = torch.zeros(y.shape[0], 9, 8).index_add(1, m.target, messages)
        return m.z(out)

    edges = torch.randint(0, 9, (2, 14))
    return Net(
        run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), source=edges[0], target=edges[1], z=lin(8, 4)
    )


@pattern("a b")
def messages_scattered_with_expanded_index() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        messages = m.b(m.a(x)[:, m.source])
        index = m.target.view(1, -1, 1).expand_as(messages)
        out = messages.new_zeros(messages.shape[0], 9, messages.shape[2])
        return m.z(out.scatter_add(1, index, messages))

    edges = torch.randint(0, 9, (2, 14))
    return Net(
        run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), source=edges[0], target=edges[1], z=lin(8, 4)
    )


@pattern("a")
def vector_quantised_codes() -> Net:
    """The nearest code of a table takes the place of what was computed."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x))
        d = (y.unsqueeze(2) - m.codes).pow(2).sum(-1)
        q = F.embedding(d.argmin(-1), m.codes)
        return m.z(y + (q - y).detach())

    return Net(run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), codes=rand(11, 8), z=lin(8, 4))


# -- sizes and control flow -------------------------------------------------------------------------------------------


@pattern("a b")
def sizes_computed_from_shapes() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(x))
        b, c, h, w = y.shape
        y = y.view(b, -1, h * w) if h * w > 1 else y
        y = y.reshape(y.shape[0], y.shape[1], h, w)
        return m.z(y.view(*y.shape[:2], -1).mean(-1).reshape(-1, c))

    return Net(run, a=conv(3, 6), b=conv(6, 8), z=lin(8, 4))


@pattern("a b")
def branch_on_sizes() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        if y.shape[1] != 8:
            y = m.b(y)
        pad = (-y.shape[2]) % 4
        if pad > 0:
            y = F.pad(y, (0, 0, 0, pad))
        assert y.dim() == 4
        return m.z(y)

    return Net(run, a=conv(3, 6), b=conv(6, 8), z=conv(8, 4))


@pattern("a b")
def scale_by_width() -> Net:
    """A factor computed from a channel count keeps its value."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        y = y * (y.shape[-1] ** -0.5)
        y = m.b(y)
        return m.z(y / y.size(2))

    return Net(run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), z=lin(8, 4))


@pattern("a b")
def flattened_into_linear() -> Net:
    return Net(
        lambda m, x: m.z(m.b(torch.flatten(F.max_pool2d(m.a(x).relu(), 2), 1))),
        shape=(3, 6, 4),
        a=conv(3, 6),
        b=lin(36, 8),
        z=lin(8, 4),
    )


@pattern("a b")
def flattened_channels_last() -> Net:
    return Net(
        lambda m, x: m.z(m.b(m.a(x).permute(0, 2, 3, 1).reshape(x.size(0), -1))),
        shape=(3, 3, 2),
        a=conv(3, 6),
        b=lin(36, 8),
        z=lin(8, 4),
    )


@pattern("a b", zeros=False)
def casts_and_devices() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x.to(m.a.weight.dtype)).double().float()
        return m.z(m.b(y.to(memory_format=torch.channels_last)).contiguous().type(x.dtype))

    return Net(run, a=conv(3, 6), b=conv(6, 8), z=conv(8, 4))


@pattern("a b")
def time_distributed() -> Net:
    """Video: frames are folded into the batch and back."""

    def run(m: Any, x: Tensor) -> Any:
        b, t, c, h, w = x.shape
        y = m.b(m.a(x.view(b * t, c, h, w)).relu())
        return m.z(y.view(b, t, *y.shape[1:]).mean(1))

    return Net(run, shape=(4, 3, 6, 5), a=conv(3, 6), b=conv(6, 8), z=conv(8, 5))


@pattern("a b")
def temporal_shift_module() -> Net:
    """TSM: a part of the channels moves by one frame."""

    def run(m: Any, x: Tensor) -> Any:
        b, t, c, h, w = x.shape
        y = m.a(x.reshape(-1, c, h, w))
        y = y.view(b, t, 8, h, w)
        out = torch.zeros_like(y)
        out[:, :-1, :2] = y[:, 1:, :2]
        out[:, 1:, 2:4] = y[:, :-1, 2:4]
        out[:, :, 4:] = y[:, :, 4:]
        return m.z(m.b(out.view(b * t, 8, h, w)).view(b, t, -1).mean(1))

    return Net(run, shape=(4, 3, 6, 5), a=conv(3, 8), b=conv(8, 7), z=lin(210, 5))


@pattern("a b")
def capsules() -> Net:
    """Vectors of channels, squashed by their own length."""

    def run(m: Any, x: Tensor) -> Any:
        u = m.b(m.a(x)).view(x.size(0), 4, 3, -1)
        square = (u**2).sum(2, keepdim=True)
        return m.z((u * square / (1 + square) / (square + 1e-6).sqrt()).flatten(1, 2))

    return Net(run, a=conv(3, 6), b=conv(6, 12), z=nn.Conv1d(12, 5, 1))


@pattern("a mu logvar")
def variational_bottleneck() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        mu, logvar = m.mu(y), m.logvar(y).clamp(-4, 4)
        return m.z(mu + torch.exp(0.5 * logvar) * m.noise), -0.5 * (
            1 + logvar - mu**2 - logvar.exp()
        ).sum(1)

    return Net(
        run,
        shape=(5,),
        a=lin(5, 6),
        mu=lin(6, 8),
        logvar=lin(6, 8),
        noise=torch.randn(1, 8),
        z=lin(8, 4),
    )


@pattern("a")
def soft_argmax_of_heatmaps() -> Net:
    """Key points: every output channel is a heat map, whose expectation is read."""

    def run(m: Any, x: Tensor) -> Any:
        y = m.z(m.a(x)).flatten(2).softmax(-1).view(x.shape[0], 4, 6, 5)
        return torch.stack([(y.sum(2) * m.xs).sum(-1), (y.sum(3) * m.ys).sum(-1)], -1)

    return Net(
        run, a=conv(3, 6), xs=torch.linspace(0, 1, 5), ys=torch.linspace(0, 1, 6), z=conv(6, 4)
    )


@pattern("a b")
def correlation_of_two_images() -> Net:
    """RAFT's volume: features are summed over, so they go together."""

    def run(m: Any, x: Tensor, y: Tensor) -> Any:
        p, q = (m.b(m.a(v)).flatten(2) for v in (x, y))
        return torch.matmul(p.transpose(1, 2), q).view(-1, 6, 5, 30) / 8**0.5

    return Pair(run, a=conv(3, 6), b=conv(6, 8)).on(
        torch.randn(1, 3, 6, 5), torch.randn(1, 3, 6, 5)
    )


@pattern("a b")
def cost_volume_by_shifts() -> Net:
    def run(m: Any, x: Tensor, y: Tensor) -> Any:
        p, q = m.b(m.a(x)), m.b(m.a(y))
        return torch.stack([(p * torch.roll(q, s, 3)).sum(1) for s in range(3)], 1)

    return Pair(run, a=conv(3, 6), b=conv(6, 8)).on(
        torch.randn(1, 3, 6, 5), torch.randn(1, 3, 6, 5)
    )


@pattern("a b")
def text_convolution() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.emb(x).transpose(1, 2)
        pooled = [F.max_pool1d(F.relu(c(y)), c(y).shape[2]).squeeze(2) for c in (m.a, m.b)]
        return m.z(torch.cat(pooled, 1))

    net = Net(
        run, emb=nn.Embedding(20, 7), a=nn.Conv1d(7, 6, 2), b=nn.Conv1d(7, 8, 3), z=lin(14, 4)
    )
    return net.on(torch.randint(0, 20, (1, 9)))


@pattern("a b")
def deep_set_masked_mean() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        y = m.b(F.relu(m.a(x)))
        mask = (x.abs().sum(-1, keepdim=True) > 0.5).to(y.dtype)
        return m.z((y * mask).sum(1) / mask.sum(1).clamp(min=1))

    return Net(run, shape=(9, 5), a=lin(5, 6), b=lin(6, 8), z=lin(8, 4))


@pattern("a b")
def point_cloud_maximum() -> Net:
    """PointNet: the global feature goes back to every point."""

    def run(m: Any, x: Tensor) -> Any:
        y = F.relu(m.n(m.a(x)))
        g = torch.max(m.b(y), 2, keepdim=True)[0]
        return m.z(torch.cat([y, g.view(-1, 8, 1).repeat(1, 1, 9)], 1))

    return Net(
        run,
        shape=(3, 9),
        a=nn.Conv1d(3, 6, 1),
        n=nn.BatchNorm1d(6),
        b=nn.Conv1d(6, 8, 1),
        z=nn.Conv1d(14, 4, 1),
    )
