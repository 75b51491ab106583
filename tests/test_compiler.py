"""compile and apply from Python: what they return, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import graphprune as gp
from graphprune.compiler import default_pipeline, replay_pipeline
from graphprune.data import DataSource
from graphprune.errors import (
    ApplyError,
    DataError,
    OutputError,
    PlanError,
    TargetError,
    UsageError,
)
from tests import gate_networks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 32)
        self.b = nn.Linear(32, 32)
        self.c = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        out: Tensor = self.c(h + torch.relu(self.b(h)))
        return out


X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    return Net().eval()


def test_the_default_pipeline_is_one_line() -> None:
    assert default_pipeline(has_data=True) == (
        'dependency-groups,magnitude,choose-channels{target="macs=0.5"},remove-channels,clean-up,'
        "reestimate-batch-norm,export-onnx,export-program"
    )
    assert default_pipeline(
        target="ratio=0.3",
        method="magnitude{norm=1}",
        granularity="heads",
        round_to=8,
        export=False,
    ) == (
        "dependency-groups,magnitude{norm=1},"
        'choose-channels{target="ratio=0.3" round_to="8" granularity=heads},remove-channels,clean-up'
    )
    assert replay_pipeline("a b.json", export=False) == (
        'dependency-groups,load-plan{path="a b.json"},remove-channels,clean-up'
    )


def test_the_default_pipelines_round_trip() -> None:
    for text in (default_pipeline(), default_pipeline(round_to=8, has_data=True)):
        assert gp.Pipeline.parse(str(gp.Pipeline.parse(text))) == gp.Pipeline.parse(text)


def test_compile_returns_a_smaller_program_and_leaves_the_model_alone(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = gp.compile(model, X, export=False)
    assert result.passed
    assert result.files == ()
    assert result.plan is not None
    report = result.report
    assert report.after.macs is not None
    assert report.before.macs == 6 * 32 + 32 * 32 + 32 * 4
    assert report.after.macs <= 0.5 * report.before.macs
    assert report.after.params == sum(p.numel() for p in result.program.module.parameters())
    assert report.before.accuracy is None
    assert result.program.module(X).shape == (2, 4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_apply_to_returns_the_users_own_class(model: nn.Module) -> None:
    result = gp.compile(model, X, export=False)
    smaller = result.apply_to(model)
    assert isinstance(smaller, Net)
    assert torch.allclose(smaller(X), result.program.module(X))
    assert smaller.a.out_features < 32


def test_a_plan_is_replayed_from_a_file_and_from_an_object(
    model: nn.Module, tmp_path: Path
) -> None:
    result = gp.compile(model, X, export=False, out=tmp_path)
    assert result.plan is not None
    for plan in (result.plan, tmp_path / "plan.json"):
        again = gp.apply(plan, model, X, export=False)
        assert torch.equal(again.program.module(X), result.program.module(X))
        assert again.report.method == "magnitude"


def test_a_captured_program_can_be_compiled(model: nn.Module) -> None:
    program = gp.capture(model, X)
    result = gp.compile(program, export=False)
    assert result.dense is program
    with pytest.raises(UsageError, match="give example_inputs=, outputs= and weights= to capture"):
        gp.compile(program, X, export=False)


def test_a_pipeline_of_ones_own_has_no_target(model: nn.Module) -> None:
    result = gp.compile(model, X, passes="dependency-groups")
    assert result.plan is None
    assert result.report.target is None
    with pytest.raises(PlanError, match="made none"):
        result.apply_to(model)
    with pytest.raises(UsageError, match="passes= stands in place of"):
        gp.compile(model, X, passes="dependency-groups", method="taylor")


@pytest.mark.parametrize("name", ["dependency-groups", "remove-channels", "magnitude,magnitude"])
def test_what_is_no_method_is_refused(model: nn.Module, name: str) -> None:
    with pytest.raises(UsageError, match="no method is called"):
        gp.compile(model, X, method=name)


def test_an_error_leaves_no_file_and_no_folder(model: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(TargetError):
        gp.compile(model, X, target="macs=0.00001", out=out)
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_earlier_files_alone(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("mine")
    with pytest.raises(TargetError):
        gp.compile(model, X, target="macs=0.00001", out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    model: nn.Module, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        gp.compile("torchvision:never-loaded", out=tmp_path / "file")


def _noise(*shape: int) -> DataSource:
    """Return a data set of noise."""

    def split(name: str) -> TensorDataset:
        generator = torch.Generator().manual_seed(len(name))
        return TensorDataset(torch.randn(64, *shape, generator=generator), torch.arange(64) % 10)

    return DataSource(name="noise", input_shape=shape, num_classes=10, split=split)


@pytest.mark.parametrize("granularity", ["blocks", "channels,blocks"])
def test_residual_blocks_go_and_the_plan_replays_them(granularity: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    image = torch.zeros(1, 3, 32, 32)
    result = gp.compile(
        model,
        image,
        target="macs=0.7",
        granularity=granularity,
        data=_noise(3, 32, 32),
        export=False,
        out=tmp_path,
    )
    assert result.passed
    assert result.plan is not None
    assert result.plan.blocks == result.report.removed.blocks
    assert result.plan.blocks
    # The first block of the later stages has a stride: its shortcut is no tensor that the branch was computed from.
    names = {"layer1.0", *(f"layer{stage}.1" for stage in (1, 2, 3, 4))}
    assert set(result.plan.blocks) <= names
    assert (result.report.removed.channels > 0) == (granularity != "blocks")
    assert result.report.after.macs is not None
    assert result.report.before.macs is not None
    assert result.report.after.macs <= 0.7 * result.report.before.macs
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["removed"]["blocks"] == list(result.plan.blocks)

    again = gp.apply(tmp_path / "plan.json", model, image, export=False)
    assert again.passed
    assert again.report.removed == result.report.removed
    shapes = [{n: t.shape for n, t in r.program.named_tensors()} for r in (again, result)]
    assert shapes[0] == shapes[1]

    smaller = result.apply_to(model)
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(smaller(x), result.program.module(x), rtol=1e-4, atol=1e-5)
    assert all(isinstance(smaller.get_submodule(name), nn.Identity) for name in result.plan.blocks)
    assert sum(p.numel() for p in smaller.parameters()) == result.report.after.params


def test_a_class_that_cannot_do_without_a_block_is_refused() -> None:
    model = gate_networks.residual()  # x + left(x): without left, it would add x to itself
    result = gp.compile(
        model,
        torch.zeros(2, 1, 8, 8),
        passes='dependency-groups,choose-blocks{target="macs=0.8"},remove-blocks',
        data=_noise(1, 8, 8),
    )
    with pytest.raises(
        ApplyError, match="no module that is the residual block (left|right), shortcut and"
    ):
        result.apply_to(model)


def test_granularity_blocks_says_what_does_not_go_with_it(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="chooses no channels.* found method=wanda round_to=auto"):
        gp.compile(model, X, method="wanda", granularity="blocks")
    with pytest.raises(DataError, match="choose-blocks expected training data"):
        gp.compile(model, X, granularity="channels,blocks")
    with pytest.raises(TargetError, match="expected a target of macs= or params=, found 'ratio"):
        gp.compile(model, X, granularity="channels,blocks", target="ratio=0.5")
    with pytest.raises(
        UsageError, match="known: channels, widths, .* for a whole compilation blocks"
    ):
        gp.compile(model, X, granularity="atoms")


def test_each_compilation_is_about_the_model_that_it_is_given() -> None:
    data, image = _noise(1, 8, 8), torch.zeros(2, 1, 8, 8)
    first = gp.compile(
        gate_networks.residual(), image, target="macs=0.6", granularity="blocks", data=data
    )
    second = gp.compile(first.program, target="macs=0.7", export=False)
    assert first.plan is not None
    assert second.plan is not None
    assert (len(first.plan.blocks), second.plan.blocks) == (1, ())
    assert second.report.before.macs == first.report.after.macs
    assert second.report.after.macs is not None
    assert second.report.before.macs is not None
    assert second.report.after.macs <= 0.7 * second.report.before.macs
    assert gp.apply(second.plan, first.program, export=False).passed


CUT = 'dependency-groups,magnitude,choose-channels{target="%s"},remove-channels,clean-up'


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        (f"{CUT % 'macs=0.7'},{CUT % 'macs=0.4'}", ()),
        (f"{CUT % 'macs=0.8'},dependency-groups,remove-blocks{{names=(left)}}", ("left",)),
        (f"dependency-groups,remove-blocks{{names=(left)}},{CUT % 'macs=0.4'}", ("left",)),
    ],
)
def test_a_plan_says_all_that_went_in_whatever_order(
    text: str, blocks: tuple[str, ...], tmp_path: Path
) -> None:
    model, x = gate_networks.residual(), torch.zeros(2, 1, 8, 8)
    result = gp.compile(model, x, passes=text, export=False, out=tmp_path)
    assert result.passed
    assert result.plan is not None
    assert result.plan.blocks == blocks
    before, after = result.report.before.macs, result.report.after.macs
    assert before is not None
    assert after is not None
    if text.endswith(CUT % "macs=0.4"):
        assert 0.3 * before < after <= 0.4 * before  # of the model that came in
        assert result.report.target == "macs=0.4"
    tensors = dict(result.program.named_tensors())
    for name, tensor in result.dense.named_tensors():
        kept = result.plan.slices.get(name, {})
        if name in tensors:
            for dim, indices in kept.items():
                tensor = tensor.index_select(dim, torch.tensor(indices))
            assert torch.equal(tensor, tensors[name])
    again = gp.apply(tmp_path / "plan.json", model, x, export=False)
    assert again.passed
    y = torch.randn(3, 1, 8, 8)
    assert torch.equal(again.program.module(y), result.program.module(y))
    assert again.report.after == result.report.after
    if not blocks:
        torch.testing.assert_close(result.apply_to(model)(y), result.program.module(y))


def test_what_went_without_a_plan_has_one_all_the_same(tmp_path: Path) -> None:
    model, x = gate_networks.residual(), torch.zeros(2, 1, 8, 8)
    text = "dependency-groups,remove-blocks{names=(right)}"
    result = gp.compile(model, x, passes=text, seed=7, out=tmp_path)
    assert result.plan is not None
    assert (result.plan.blocks, dict(result.plan.slices)) == (("right",), {})
    assert (result.plan.method, result.plan.seed) == ("", 7)
    assert result.report.method is None
    again = gp.apply(tmp_path / "plan.json", model, x, export=False)
    assert again.report.removed.blocks == ("right",)
    assert again.report.after.params == result.report.after.params


def test_a_model_without_residual_blocks_says_so() -> None:
    result = gp.compile(
        gate_networks.branches(),
        torch.zeros(2, 1, 8, 8),
        target="macs=0.8",
        granularity="channels,blocks",
        data=_noise(1, 8, 8),
        export=False,
    )
    assert result.report.after.macs is not None
    reasons = {kept.what: kept.why for kept in result.report.kept}
    assert reasons["residual blocks"].startswith("no residual block: no sum of a tensor and")
