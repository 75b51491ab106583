"""Residual blocks: which sums have one, what goes with it, and that what is left computes what it should."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphprune.capture import capture
from graphprune.errors import PlanError
from graphprune.groups import analyze
from graphprune.residual import (
    cost_of,
    find_residual_blocks,
    named_blocks,
    with_silent_blocks,
    without_blocks,
)
from graphprune.verify import assert_exact, verify_surgery
from tests import gate_networks
from tests.exactness import capture_as
from tests.models import resnet20, tiny_dense, tiny_inception, tiny_transformer

DIALECTS = ["fx", "export"]


def _trained_a_little(model: nn.Module) -> nn.Module:
    """Give norms statistics and scales of their own, so that a wrong shortcut shows."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(module.bias.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_resnets_blocks_are_called_as_its_modules(dialect: str) -> None:
    program = capture_as(resnet20().eval(), torch.randn(2, 3, 32, 32), dialect)
    groups = analyze(program)
    blocks = find_residual_blocks(program, groups)
    # Where the stride is, the shortcut is no tensor that the branch was computed from.
    assert [block.name for block in blocks] == [
        "layer1.0",
        "layer1.1",
        "layer1.2",
        "layer2.1",
        "layer2.2",
        "layer3.1",
        "layer3.2",
    ]
    assert blocks[0].macs == 2 * 9 * 16 * 16 * 32 * 32
    assert blocks[0].params == 2 * (9 * 16 * 16 + 2 * 16)
    assert str(blocks[-1]) == "layer3.2"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_left_is_the_model_whose_branches_are_zero(dialect: str) -> None:
    model = _trained_a_little(resnet20())
    program = capture_as(model, torch.randn(2, 3, 32, 32), dialect)
    groups = analyze(program)
    names = ["layer1.0", "layer1.1", "layer3.2"]
    blocks = named_blocks(program, groups, names)
    left = without_blocks(program, groups, blocks, step="three gone")
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(program.module(x), model(x)) or dialect == "export"
    assert not torch.allclose(left.module(x), model(x), atol=1e-2)
    for name in names:
        last = model.get_submodule(name).bn2
        assert isinstance(last, nn.BatchNorm2d)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    torch.testing.assert_close(left.module(x), model(x), rtol=1e-5, atol=1e-5)
    gone = {name for name, _ in program.named_tensors()} - {n for n, _ in left.named_tensors()}
    assert gone == {n for n in dict(program.named_tensors()) if n.startswith(tuple(names))}
    assert left.history == ("three gone",)
    assert left.origin is not None
    assert (left.origin.blocks, left.origin.macs) == (tuple(names), groups.cost.macs)
    assert analyze(left).cost.macs == groups.cost.macs - sum(block.macs for block in blocks)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("make", "shape", "names"),
    [
        (gate_networks.residual, (2, 1, 8, 8), ["left", "right"]),
        (gate_networks.depthwise, (2, 1, 8, 8), None),
        (gate_networks.transformer, (2, 1, 8, 8), None),
        (tiny_transformer, (2, 3, 16, 16), None),
    ],
)
def test_each_block_goes_alone_and_all_of_them_together(
    make: Callable[[], nn.Module], shape: tuple[int, ...], names: list[str] | None, dialect: str
) -> None:
    program = capture_as(_trained_a_little(make()), torch.randn(shape), dialect)
    groups = analyze(program)
    blocks = find_residual_blocks(program, groups)
    assert len({block.name for block in blocks}) == len(blocks) >= 2
    if names is not None:
        assert [block.name for block in blocks] == names
    before = str(program)
    for chosen in [*([block] for block in blocks), list(blocks)]:
        left = without_blocks(program, groups, chosen)
        left.module.graph.lint()
        assert_exact(program, left, with_silent_blocks(program, chosen))
        others = [b.sum for b in find_residual_blocks(left, analyze(left))]
        assert others == [b.sum for b in blocks if b not in chosen]
    assert str(program) == before


def test_a_block_that_goes_although_it_should_not_is_found_out() -> None:
    program = capture(_trained_a_little(gate_networks.residual()), torch.randn(2, 1, 8, 8))
    groups = analyze(program)
    left, right = find_residual_blocks(program, groups)
    wrong = without_blocks(program, groups, [left, right])
    check = verify_surgery(program, wrong, with_silent_blocks(program, [left]))
    assert not check.passed


class _Twice(nn.Module):
    """One module that holds two blocks, as the layers of a transformer do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)
        self.second = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        result: Tensor = x + self.second(self.norm(x))
        return result


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(_Twice(), _Twice())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_module_stands_for_all_blocks_that_it_holds(dialect: str) -> None:
    program = capture_as(_Layers().eval(), torch.randn(2, 8), dialect)
    groups = analyze(program)
    blocks = find_residual_blocks(program, groups)
    assert [block.name for block in blocks] == [
        "layers.0.first",
        "layers.0.second",
        "layers.1.first",
        "layers.1.second",
    ]
    # The norm goes with the branch that it is in; it is in no module of that branch.
    assert blocks[1].params == (8 + 1) * 12 + (12 + 1) * 8 + 2 * 8
    assert named_blocks(program, groups, ["layers.1.first", blocks[0].sum]) == (
        blocks[0],
        blocks[2],
    )
    assert named_blocks(program, groups, ["layers.0"]) == blocks[:2]
    assert named_blocks(program, groups, ["layers"]) == blocks
    message = "no residual block 'layers.7'; known: layers.0.first, layers.0.second"
    with pytest.raises(PlanError, match=message):
        named_blocks(program, groups, ["layers.0.first", "layers.7"])


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.a(x)
        inner = inner + self.b(inner)
        result: Tensor = x + self.c(inner)
        return result


def test_a_block_inside_a_branch_goes_with_it() -> None:
    program = capture(_Nested().eval(), torch.randn(2, 8))
    groups = analyze(program)
    inner, outer = find_residual_blocks(program, groups)
    assert inner.name == "b"
    assert inner.sum in outer.nodes
    for chosen in ([inner], [outer], [inner, outer]):
        left = without_blocks(program, groups, chosen)
        assert_exact(program, left, with_silent_blocks(program, chosen))
    assert not dict(left.named_tensors())


class _Sums(nn.Module):
    """Sums, none of which has a branch that could go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.offset = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        both = self.a(x) + self.b(x)  # neither comes from the other
        both = both + self.offset  # a parameter comes from nothing
        both = both.mean(1, keepdim=True) + self.a(both)  # not the shape of the sum
        both = both + both  # with itself
        both = both + torch.tanh(both)  # costs nothing
        more = self.b(both)
        total = both + more
        result: Tensor = total * more  # the branch is needed elsewhere
        return result


class _Writes(nn.Module):
    """A branch that writes into what stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        result: Tensor = x + self.a(torch.relu_(x))
        return result


@pytest.mark.parametrize("make", [_Sums, _Writes, tiny_dense, tiny_inception])
def test_other_sums_are_no_blocks(make: Callable[[], nn.Module]) -> None:
    shape = (2, 8) if make in (_Sums, _Writes) else (2, 3, 16, 16)
    program = capture(make().eval(), torch.randn(shape))
    assert find_residual_blocks(program, analyze(program)) == ()


class _WithIdentity(nn.Module):
    """Its shortcut is a module that does nothing; that of another size would project."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Identity()
        self.branch = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.branch(x) + self.shortcut(x)
        return result


def test_an_identity_is_a_shortcut() -> None:
    program = capture(_WithIdentity().eval(), torch.randn(2, 8))
    groups = analyze(program)
    (block,) = find_residual_blocks(program, groups)
    x = torch.randn(3, 8)
    assert torch.equal(without_blocks(program, groups, [block]).module(x), x)


class _Written(nn.Module):
    """What a removed sum was written into later, or its shortcut, must still be a tensor of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.kind == "the caller's":
            return (self.g(torch.relu_(x + self.f(x))),)
        a = self.stem(x)
        b = a + self.f(a)
        if self.kind == "a sum after it":
            b += self.g(b)
            return (self.stem(a + torch.tanh(b)),)
        if self.kind == "returned beside it":
            return a, torch.relu_(b)
        if self.kind == "a part of it":
            b[:, :2] = 0.5
            return (self.stem(a + b),)
        if self.kind == "the shortcut":
            a.mul_(2)
            return (self.stem(b - a),)
        assert self.kind == "nobody's"
        return (self.g(torch.relu_(b)),)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "kind",
    [
        "the caller's",
        "a sum after it",
        "returned beside it",
        "a part of it",
        "the shortcut",
        "nobody's",
    ],
)
def test_writes_into_a_sum_do_not_reach_its_shortcut(kind: str, dialect: str) -> None:
    program = capture_as(_Written(kind).eval(), torch.randn(2, 8), dialect)
    groups = analyze(program)
    block = find_residual_blocks(program, groups)[0]
    assert block.name == "f"
    left = without_blocks(program, groups, [block])
    assert_exact(program, left, with_silent_blocks(program, [block]))
    x = torch.randn(2, 8)
    before = x.clone()
    left.module(x)
    assert torch.equal(x, before)
    copies = [node for node in left.module.graph.nodes if node.target is torch.clone]
    assert len(copies) == (kind != "nobody's")


class _Types(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.f, self.leave = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).bfloat16()
        result: Tensor = self.leave(x + self.f(x.float()))
        return result


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_shortcut_of_another_type_cannot_stand_for_its_sum(dialect: str) -> None:
    program = capture_as(_Types().eval(), torch.randn(2, 8), dialect)
    assert find_residual_blocks(program, analyze(program)) == ()


class _Shared(nn.Module):
    """Two blocks that share a layer, a third that is the first again, and a weight that an embedding has too."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 8)
        self.f, self.g, self.h = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        both = torch.relu(self.f(x))
        x = x + torch.tanh(self.g(x)) * both
        x = x + torch.sigmoid(self.h(x)) @ self.words.weight * both
        result: Tensor = x + self.g(x)
        return result


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_blocks_share_goes_with_the_last_of_them(dialect: str) -> None:
    program = capture_as(_Shared().eval(), torch.tensor([[1, 2], [3, 4]]), dialect)
    groups = analyze(program)
    first, second, third = find_residual_blocks(program, groups)
    assert (first.params, second.params, third.params) == (0, 8 * 5 + 5, 0)
    for chosen in ([first], [second], [first, third], [first, second], [first, second, third]):
        left = without_blocks(program, groups, chosen)
        assert_exact(program, left, with_silent_blocks(program, chosen))
        assert cost_of(left.module, groups) == analyze(left).cost.total()
    assert [name for name, _ in left.named_tensors()] == ["words.weight"]


def test_a_branch_that_knows_the_size_alone_is_none() -> None:
    class Position(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.head = nn.Embedding(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            places = self.places(torch.arange(x.size(1))).expand(x.size(0), -1, -1)
            result: Tensor = self.head(x + places)
            return result

    program = capture(Position().eval(), torch.randn(2, 6, 8))
    assert find_residual_blocks(program, analyze(program)) == ()


def test_names_are_those_of_blocks_before_those_of_sums() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.add = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(x)
            result: Tensor = x + self.add(x)
            return result

    program = capture(Named().eval(), torch.randn(2, 8))
    groups = analyze(program)
    first, second = find_residual_blocks(program, groups)
    assert (first.name, first.sum, second.name) == ("first", "add", "add")
    assert named_blocks(program, groups, ["add"]) == (second,)
    with pytest.raises(PlanError, match="has no residual block ''; known: first, add"):
        named_blocks(program, groups, ["first", ""])
