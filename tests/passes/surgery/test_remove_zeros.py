"""Remove-zeros: channels without effect go, outputs stay, and whatever is not certain stays too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from graphprune import registry
from graphprune.capture import capture
from graphprune.contract import Context, SurgeryResult
from graphprune.groups import analyze
from graphprune.pipeline import Pipeline, PipelineResult
from graphprune.program import Program
from tests.exactness import capture_as, outputs_of
from tests.models import CifarResNet, resnet20, tiny_transformer


class _Net(nn.Module):
    """Two convolutions, a batch norm between them, and a linear layer behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.fc1 = nn.Linear(6 * 4, 10)
        self.fc2 = nn.Linear(10, 5)
        nn.init.normal_(self.bn1.weight)
        nn.init.normal_(self.bn1.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.max_pool2d(torch.relu(self.conv2(y)), 4).flatten(1)
        out: Tensor = self.fc2(torch.relu(self.fc1(y)))
        return out


def _run(program: Program) -> PipelineResult:
    result = Pipeline.parse("dependency-groups,remove-zeros").run(program)
    assert result.passed, result.checks
    for old, new in zip(outputs_of(program), outputs_of(result.program), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)
    again = Pipeline.parse("dependency-groups,remove-zeros").run(result.program)
    assert not again.records[-1].modified
    assert str(again.program) == str(result.program)
    return result


def _sizes(program: Program) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in program.module.named_parameters()}


@pytest.mark.parametrize("dialect", ["fx", "export"])
def test_channels_that_only_zero_weights_read_go(dialect: str) -> None:
    model = _Net().eval()
    with torch.no_grad():
        model.conv2.weight[:, [1, 6]] = 0
        model.fc1.weight[:, 8:12] = 0  # the four places of channel 2
        model.fc1.weight[:, 13] = 0  # one place of channel 3: not enough
        model.fc2.weight[:, 9] = 0
    program = capture_as(model, torch.randn(2, 3, 8, 8), dialect)
    result = _run(program)
    assert result.removed.channels == 4
    sizes = _sizes(result.program)
    assert sizes["conv1.weight"] == (6, 3, 3, 3)
    assert sizes["bn1.weight"] == (6,)
    assert sizes["conv2.weight"] == (5, 6, 3, 3)
    assert sizes["fc1.weight"] == (9, 20)
    assert sizes["fc2.weight"] == (5, 9)


@pytest.mark.parametrize("dialect", ["fx", "export"])
def test_channels_whose_value_is_zero_go(dialect: str) -> None:
    model = _Net().eval()
    with torch.no_grad():
        assert model.conv2.bias is not None
        model.conv2.weight[[0, 3]] = 0
        model.conv2.bias[[0, 3]] = torch.tensor([0.0, -1.0])  # ReLU makes both zero
        model.fc1.weight[4] = 0
        model.fc1.bias[4] = 0.5  # a constant, not zero
        model.bn1.weight[5] = 0
        model.bn1.bias[5] = 0
    program = capture_as(model, torch.randn(2, 3, 8, 8), dialect)
    sizes = _sizes(_run(program).program)
    assert sizes["conv1.weight"][0] == 7
    assert sizes["conv2.weight"][:2] == (4, 7)
    assert sizes["fc1.weight"] == (10, 16)


def test_a_channel_that_only_seems_dead_stays() -> None:
    model = _Net().eval()
    with torch.no_grad():
        model.bn1.bias[2] = -1e6  # ReLU never lets it through, but an input may exist that does
    result = _run(capture(model, torch.randn(2, 3, 8, 8)))
    assert not result.records[-1].modified
    assert result.removed.channels == 0


def test_a_coupled_channel_must_be_unread_everywhere() -> None:
    model = resnet20().eval()
    program = capture(model, torch.randn(2, 3, 32, 32))
    with torch.no_grad():
        weights = dict(program.module.named_parameters())
        weights["layer1.0.conv1.weight"][:, 3] = 0
        weights["layer1.1.conv2.weight"][:, [2, 5]] = 0
    before = _sizes(program)
    sizes = _sizes(_run(program).program)
    changed = {name for name, size in sizes.items() if size != before[name]}
    assert changed == {
        f"layer1.1.{n}" for n in ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight")
    }
    assert sizes["layer1.1.conv2.weight"] == (16, 14, 3, 3)


def test_statistics_over_channels_keep_them() -> None:
    program = capture(tiny_transformer().eval(), *_transformer_input())
    groups = analyze(program)
    norms = [c for c in groups.labels.consumers if "norm" in c.operator]
    assert norms
    with torch.no_grad():
        for name, parameter in program.module.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                parameter[:, 0] = 0
    _run(program)


def _transformer_input() -> tuple[Tensor]:
    return (torch.randn(2, 3, 16, 16),)


def test_groups_keep_equal_counts() -> None:
    def remove(*unread: int) -> PipelineResult:
        conv, fc = nn.Conv2d(4, 6, 3, groups=2), nn.Linear(6, 3)
        model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), fc)
        with torch.no_grad():
            fc.weight[:, unread] = 0
        return _run(capture(model.eval(), torch.randn(2, 4, 8, 8)))

    one = remove(1)
    assert one.removed.channels == 0
    reasons = {k.what: k.why for k in one.kept}
    assert reasons["1 channels of zeros"] == "blocks keep equal counts, and nothing becomes empty"
    assert remove(1, 5).removed.channels == 2
    assert _sizes(remove(0, 1, 3).program)["0.weight"][0] == 4


def test_a_layer_of_zeros_keeps_one_channel() -> None:
    last = nn.Linear(6, 3)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), last).eval()
    nn.init.zeros_(last.weight)
    result = _run(capture(model, torch.randn(2, 4)))
    assert _sizes(result.program)["0.weight"] == (1, 4)


def test_the_input_stays_as_it_was() -> None:
    model = _Net().eval()
    with torch.no_grad():
        model.conv2.weight[:, 1] = 0
    program = capture(model, torch.randn(2, 3, 8, 8))
    text = str(program)
    groups = analyze(program)
    context = Context(facts={type(groups): groups}, dense=program)
    result = registry.load("remove-zeros")().run(program, context)
    assert isinstance(result, SurgeryResult)
    assert result.modified
    assert str(program) == text
    assert result.program.history == ("remove-zeros: 1 channels",)


def test_a_network_trained_with_group_lasso_shrinks_and_answers_the_same(
    shared_data: Path,
) -> None:
    """69 input channels of its second convolutions are exactly zero."""
    path = shared_data / "weights" / "resnet20proj_cifar10_ssl_zeroed.safetensors"
    state = {name.replace("fc.", "linear."): t for name, t in load_file(path).items()}
    model = CifarResNet((3, 3, 3), projected=True)
    model.load_state_dict(state)
    result = _run(capture(model.eval(), torch.randn(1, 3, 32, 32)))
    assert result.checks["surgery"].passed
    assert result.removed.channels == 69
    assert sum(p.numel() for p in model.parameters()) == 272_474
    assert sum(p.numel() for p in result.program.module.parameters()) == 229_280
    images = torch.randn(8, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(
            result.program.module(images), model(images), rtol=1e-4, atol=1e-4
        )
