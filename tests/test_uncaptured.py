"""Models that no tracer captures whole: labelled by running, cut in place, proven by running both."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.cut import cut_program
from graphprune.errors import UsageError
from graphprune.groups import analyze
from graphprune.labels.whole import NUMBERS, OWN_OPERATORS
from graphprune.program import Program, WholeModel
from graphprune.runtime import open_session
from graphprune.verify import Masked, verify_surgery
from tests.detectors import images, tiny_detector
from tests.strategies import randomize

CUT = 'dependency-groups,magnitude,choose-channels{target="ratio=0.4" round_to="1"},remove-channels'


class Branching(nn.Module):
    """Branches on a value of its input."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.parts = nn.ModuleList(parts)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 1e6:
            x = x.flip(1)
        x = F.relu(self.first(x))
        for part in self.parts:
            x = part(x)
        out: Tensor = self.last(x)
        return out


class Squeeze(nn.Module):
    """Reads sizes off the tensor: nothing stands in its way."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 5), nn.Linear(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        gate: Tensor = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return x * gate.view(n, c, 1, 1)


class Literal(nn.Module):
    """Holds the number of channels as a number."""

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        return x.reshape(n, 8, h * w).reshape(n, 8, h, w)


class Scaled(nn.Module):
    """Computes a scale from a width, which a graph would keep at its old value."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mix(x)
        return x + y / math.sqrt(y.shape[1])


class Attention(nn.Module):
    """Attention over places; sizes of heads are numbers inside torch's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mixed: Tensor = self.attention(tokens, tokens, tokens)[0]
        return x + mixed.transpose(1, 2).reshape(x.shape)


class Norms(nn.Module):
    """Statistics over channels: the proof takes them over those that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(8, 12, 1)
        self.group = nn.GroupNorm(3, 12)
        self.narrow = nn.Conv2d(12, 8, 1)
        self.layer = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(F.relu(self.group(self.wide(x))))
        out: Tensor = self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class Peaks(nn.Module):
    """Where each map is largest, looked for where there is less in them than there was on the example inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1))
        self.much = math.inf

    def forward(self, x: Tensor) -> Tensor:
        maps = self.maps(x)
        peaks = torch.zeros(len(maps), maps.shape[1], dtype=x.dtype)
        for i in range(len(maps) if float(maps.sum()) < self.much else 0):
            peaks[i, :] = maps[i].flatten(1).argmax(1).to(x.dtype)
        return peaks


def whole(model: nn.Module) -> Program:
    torch.manual_seed(0)
    randomize(model)
    program = gp.capture(model.eval(), torch.randn(2, 3, 6, 7))
    assert program.dialect == "module"
    assert len(program.untraced) >= 3
    return program


def cut_and_prove(program: Program) -> nn.Module:
    result = gp.Pipeline.parse(CUT).run(program)
    check = result.checks["surgery"]
    assert check.passed, check.detail
    assert "module by module" in check.detail
    return result.program.module.get_submodule(WholeModel.CHILD)


def test_a_model_that_branches_is_cut() -> None:
    smaller: Any = cut_and_prove(whole(Branching(Squeeze())))
    assert smaller.first.out_channels == smaller.last.in_channels < 8
    assert smaller.first.weight.shape[0] == smaller.first.out_channels


def test_statistics_over_channels_are_taken_over_those_that_stay() -> None:
    smaller: Any = cut_and_prove(whole(Branching(Norms())))
    part = smaller.parts[0]
    assert part.group.num_channels == part.wide.out_channels < 12
    assert part.group.num_groups == 3


@pytest.mark.parametrize("part", [Literal, Scaled])
def test_a_size_as_a_number_is_found_by_trial_and_pinned(part: type[nn.Module]) -> None:
    program = whole(Branching(part(), Squeeze()))
    assert program.fixed
    groups = analyze(program)
    reasons = [g.pinned for g in groups if g.name == "first.weight[0]" or "mix" in g.name]
    assert any(r is not None and NUMBERS in r for r in reasons)
    smaller: Any = cut_and_prove(program)
    assert smaller.parts[1].down.out_features < 5


def test_a_branch_that_the_example_inputs_do_not_take_is_found_by_trial() -> None:
    model: Any = Peaks()
    x = torch.randn(2, 3, 6, 7)
    randomize(model)
    with torch.no_grad():
        model.maps[2].weight.abs_()  # the less channels, the less there is in the maps
        model.much = 0.99 * float(model.maps(x).sum())
    program = gp.capture(model.eval(), x)
    assert ("", OWN_OPERATORS, 0) in program.fixed
    smaller: Any = cut_and_prove(program)
    assert smaller.maps[2].out_channels == 6
    assert smaller.maps[2].in_channels < 8


def test_attention_stays_and_what_is_around_it_goes() -> None:
    smaller: Any = cut_and_prove(whole(Branching(Norms(), Attention())))
    assert smaller.parts[0].wide.out_channels < 12
    smaller(torch.randn(1, 3, 6, 7))


def test_the_proof_finds_a_wrong_cut() -> None:
    program = whole(Branching(Squeeze()))
    groups = analyze(program)
    keep = groups.cost.everything()
    keep[groups[0].channels[1]] = False
    right = cut_program(program, groups, keep).program
    assert verify_surgery(program, right, Masked(groups, keep)).passed
    keep[groups[0].channels[1]], keep[groups[0].channels[2]] = True, False
    check = verify_surgery(program, right, Masked(groups, keep))
    assert not check.passed
    assert "module first is the first that differs" in check.detail
    broken: Any = right.module.get_submodule(WholeModel.CHILD)
    broken.first.weight = nn.Parameter(broken.first.weight[1:])
    check = verify_surgery(program, right, Masked(groups, keep))
    assert not check.passed
    assert "the cut model does not run" in check.detail
    assert "first" in check.detail


def test_one_wrong_output_is_found_at_its_place(detector: Program) -> None:
    groups = analyze(detector)
    same = cut_program(detector, groups, groups.cost.everything()).program
    model: Any = same.module.get_submodule(WholeModel.CHILD)
    model.transform.postprocess = lambda result, *_: [
        {**r, "boxes": r["boxes"] + 1} for r in result
    ]
    check = verify_surgery(detector, same, Masked(groups, groups.cost.everything()))
    assert not check.passed
    assert "boxes" in check.detail


@pytest.fixture(scope="module")
def detector() -> Program:
    return gp.capture(tiny_detector(), images())


def test_a_detector_takes_its_images_as_a_list(detector: Program) -> None:
    assert detector.dialect == "module"
    assert detector.calling is not None
    assert detector.calling.as_list
    assert len(detector.example_inputs) == 2
    names = {g.name for g in analyze(detector) if g.pinned is None}
    assert "backbone.stem.0.weight[0]" in names
    assert "backbone.low.weight[0]" in names  # through region pooling into the box head
    assert analyze(detector).labels.unknown == {}


def test_a_detector_is_compiled(tmp_path: Path) -> None:
    model = tiny_detector()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = gp.compile(model, images(), target="macs=0.5", round_to=1, out=tmp_path)
    assert result.passed
    assert result.report.after.macs is not None
    assert result.report.before.macs is not None
    assert result.report.after.macs <= 0.5 * result.report.before.macs
    smaller = result.apply_to(model)
    assert type(smaller) is type(model)
    found = smaller(images())
    assert [set(one) for one in found] == [{"boxes", "labels", "scores"}] * 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["whole"]["exported"]["backbone"] == "model.backbone.onnx"
    assert report["whole"]["untraced"]
    session = open_session(tmp_path / "model.backbone.onnx", "cpu")
    shape = [1 if size is None else size for size in session.input_shapes[0]]
    assert session.run(torch.randn(shape))[0].shape[0] == shape[0]
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    for a, b in zip(again(images()), found, strict=True):
        assert torch.equal(a["boxes"], b["boxes"])
    plan = json.loads((tmp_path / "plan.json").read_text())
    state = smaller.state_dict()
    for name, dims in plan["slices"].items():
        kept = before[name]
        for dim, indices in dims.items():
            kept = kept.index_select(int(dim), torch.tensor(indices))
        assert torch.equal(kept, state[name])


def test_a_size_that_cannot_be_measured_is_refused(detector: Program) -> None:
    with pytest.raises(
        UsageError, match="runs whole, so that it cannot be exported; give a target of macs="
    ):
        gp.Pipeline.parse("dependency-groups,measure-costs{latency=false}").run(detector)


def test_a_plan_is_replayed_on_a_detector(detector: Program) -> None:
    groups = analyze(detector)
    scores = np.random.default_rng(0).random(groups.num_channels)
    assert len(scores)
    first = gp.Pipeline.parse(CUT).run(detector)
    again = gp.Pipeline.parse(CUT).run(detector)
    for (name, a), (_, b) in zip(
        first.program.named_tensors(), again.program.named_tensors(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_clone_shares_nothing(detector: Program) -> None:
    clone = detector.clone()
    ids = {id(t) for _, t in detector.named_tensors()}
    assert not ids & {id(t) for _, t in clone.named_tensors()}
    assert [n for n, _ in clone.named_tensors()] == [n for n, _ in detector.named_tensors()]
    assert isinstance(clone.module, WholeModel)
    assert str(clone) == str(detector)
