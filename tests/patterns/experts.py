"""Mixtures of experts: weights stacked or apart, chosen by gathering, sorting, masking or mixing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import Net, lin, pattern, rand

TOKENS = 9


def _experts(run: Any, **parts: Any) -> Net:
    """Return a net over tokens: a is their width, g chooses among three experts, z reads what comes out."""
    return Net(run, shape=(TOKENS, 5), a=lin(5, 8), g=lin(8, 3), z=lin(8, 4), **parts)


@pattern("a up[1]")
def experts_gathered_for_each_token() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x).flatten(0, 1)
        weight, chosen = m.g(x).softmax(-1).max(-1)
        hidden = F.relu(torch.bmm(m.up[chosen], x.unsqueeze(-1)))
        y = torch.bmm(m.down[chosen], hidden).squeeze(-1)
        return m.z(x + y * weight[:, None])

    return _experts(run, up=rand(3, 10, 8), down=rand(3, 8, 10))


@pattern("a up[1]")
def experts_all_computed_and_mixed() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        hidden = F.gelu(torch.einsum("btd,ehd->bteh", x, m.up))
        y = torch.einsum("bteh,edh->bted", hidden, m.down)
        return m.z((y * m.g(x).softmax(-1).unsqueeze(-1)).sum(2))

    return _experts(run, up=rand(3, 10, 8), down=rand(3, 8, 10))


@pattern("a e0.0 e1.0")
def experts_apart_under_a_mask() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        chosen = m.g(x).argmax(-1)
        return m.z(sum((chosen == i).unsqueeze(-1) * e(x) for i, e in enumerate((m.e0, m.e1))))

    def expert(width: int) -> nn.Module:
        return nn.Sequential(lin(8, width), nn.ReLU(), lin(width, 8))

    return _experts(run, e0=expert(10), e1=expert(14))


@pattern("a up[1]")
def experts_of_the_two_best() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        scores = m.g(x).softmax(-1)
        best, chosen = scores.topk(2, -1)
        gates = torch.zeros_like(scores).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
        hidden = F.silu(torch.einsum("btd,ehd->bteh", x, m.up))
        return m.z(torch.einsum("bteh,edh,bte->btd", hidden, m.down, gates))

    return _experts(run, up=rand(3, 10, 8), down=rand(3, 8, 10))


@pattern("a up[1]")
def experts_over_sorted_tokens() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x).flatten(0, 1)
        chosen = m.g(x).argmax(-1)
        order = chosen.argsort(stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        rows, experts = x[order], chosen[order]
        hidden = F.relu(torch.einsum("td,thd->th", rows, m.up[experts]))
        return m.z(x + torch.einsum("th,tdh->td", hidden, m.down[experts])[back])

    return _experts(run, up=rand(3, 10, 8), down=rand(3, 8, 10))


@pattern("a up[1]")
def experts_that_choose_their_tokens() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x).flatten(0, 1)
        weight, chosen = m.g(x).softmax(-1).t().topk(4, -1)  # experts, tokens of each
        hidden = F.relu(torch.bmm(x[chosen], m.up.transpose(1, 2)))
        y = torch.bmm(hidden, m.down) * weight.unsqueeze(-1)
        return m.z(x.index_add(0, chosen.flatten(), y.flatten(0, 1)))

    return _experts(run, up=rand(3, 10, 8), down=rand(3, 10, 8))


@pattern("a up[2]")
def experts_with_soft_slots() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x)
        scores = torch.einsum("btd,esd->btes", x, m.slots)
        inputs = torch.einsum("btd,btes->besd", x, scores.softmax(1))
        hidden = F.gelu(inputs @ m.up)
        back = scores.flatten(2).softmax(-1).view_as(scores)
        return m.z(torch.einsum("besd,btes->btd", hidden @ m.down, back))

    return _experts(run, slots=rand(3, 2, 8), up=rand(3, 8, 10), down=rand(3, 10, 8))


@pattern("b", kept="a", why="multiples of 16 bytes", zeros=False)
def experts_by_a_product_of_groups() -> Net:
    def run(m: Any, x: Tensor) -> Any:
        x = m.a(x).flatten(0, 1)
        chosen = m.g(x).argmax(-1)
        order = chosen.argsort(stable=True)
        ends = torch.bincount(chosen, minlength=3).cumsum(0).to(torch.int32)
        hidden = F.relu(F.grouped_mm(x[order], m.up, offs=ends))
        y = torch.zeros_like(x).index_copy(0, order, F.grouped_mm(hidden, m.down, offs=ends))
        return m.z(F.relu(m.b(y)))

    net = _experts(run, up=rand(3, 8, 12), down=rand(3, 12, 8), b=lin(8, 14))
    net.z = lin(14, 4)
    return net
