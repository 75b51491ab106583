"""Passes that look at a few training samples: of any task, and in batches that the program takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import graphprune as gp
from graphprune.contract import Context
from graphprune.data import DataSource, load_data
from graphprune.defaults import default_pipeline
from graphprune.errors import DataError, UsageError
from graphprune.pipeline import Pipeline, PipelineResult
from graphprune.program import Program
from graphprune.training.drawn_samples import DrawnSamples
from tests.training.masked_language import LENGTH, model

WORDS = "tests.training.masked_language"
CUT = 'choose-channels{target="macs=0.7"},remove-channels'


class Fours(nn.Module):
    """Takes four images at a time, and no other number."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map [4, 1, 8, 8] to [4, 3]."""
        y = self.norm(self.first(x)).relu()
        y = y + self.second(y).relu()
        logits: Tensor = self.head(y.mean((2, 3)).view(4, 12))
        return logits


@dataclass(frozen=True)
class Step:
    """What of a pass says which samples it wants."""

    name: ClassVar[str] = "step"
    num_samples: int
    batch_size: int = 8
    task: str = ""


def of_fours() -> Program:
    torch.manual_seed(0)
    return gp.capture(Fours().eval(), torch.zeros(4, 1, 8, 8), source="fours")


def noise(count: int) -> DataSource:
    torch.manual_seed(1)
    samples = TensorDataset(torch.randn(count, 1, 8, 8), torch.arange(count) % 3)
    return DataSource(name="noise", input_shape=(1, 8, 8), num_classes=3, split=lambda _: samples)


def drawn(program: Program, num_samples: int) -> DrawnSamples:
    context = Context(facts={}, dense=program, data=noise(30))
    return DrawnSamples.of(Step(num_samples), program, context)


def test_a_fixed_batch_is_filled() -> None:
    program = of_fours()
    assert program.fixed_batch == 4
    samples = drawn(program, 11)
    assert len(samples) == 2
    for _ in range(2):
        assert [x.shape for (x,) in samples] == [(4, 1, 8, 8)] * 2
    assert [len(batch[1]) for batch in samples.batches()] == [4, 4]
    with pytest.raises(
        DataError, match="fours takes batches of 4 samples only, and there are 3 to"
    ):
        drawn(program, 3)


def test_a_free_batch_is_what_was_asked_for() -> None:
    program = gp.capture(nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 8, 8))
    assert program.fixed_batch is None
    assert [len(x) for (x,) in drawn(program, 11)] == [8, 3]
    with pytest.raises(UsageError, match="at least one sample, found num_samples=0 batch_size=8"):
        drawn(program, 0)
    flat = gp.capture(nn.Linear(64, 2), torch.zeros(1, 64))
    with pytest.raises(DataError, match="takes samples of shape 64, the data gives 1x8x8"):
        list(drawn(flat, 11))


@pytest.mark.parametrize(
    "text",
    [
        f"activation,{CUT}",
        f"wanda,{CUT}",
        f"taylor,{CUT}",
        'obs{target="macs=0.7" probe_samples=6},remove-channels',
        "l-obs{keep=0.5}",
        f"magnitude,{CUT},reestimate-batch-norm",
        'choose-blocks{target="macs=0.7"},remove-blocks',
    ],
)
def test_methods_run_on_a_fixed_batch(text: str) -> None:
    result = Pipeline.parse(f"dependency-groups,{text}").run(of_fours(), data=noise(30))
    assert result.passed
    assert any(record.modified for record in result.records)


def test_single_samples_are_not_a_fixed_batch() -> None:
    with pytest.raises(
        UsageError, match="fisher takes gradients of single samples, and fours take"
    ):
        Pipeline.parse(f"dependency-groups,fisher,{CUT}").run(of_fours(), data=noise(30))


@pytest.mark.parametrize("task", ["dicts", "tuples"])
@pytest.mark.parametrize(
    "text",
    [
        f"activation{{TASK}},{CUT}",
        f"wanda{{TASK}},{CUT}",
        f"taylor{{TASK}},{CUT}",
        f"fisher{{num_samples=16 TASK}},{CUT}",
        'obs{target="macs=0.7" TASK},remove-channels',
        "l-obs{keep=0.5 TASK}",
    ],
)
def test_methods_read_samples_as_a_task_does(text: str, task: str) -> None:
    inputs = torch.ones(2, LENGTH, dtype=torch.int64), torch.ones(2, LENGTH)
    text = text.replace("TASK", f'task="{WORDS}:task_of_{task}"')
    result = _run(text, gp.capture(model(), inputs), task)
    assert result.passed
    assert any(record.modified for record in result.records)


def test_a_task_is_handed_to_the_method() -> None:
    text = default_pipeline(
        method="wanda", granularity="channels,blocks", has_data=True, task="a:b", export=False
    )
    assert text.startswith(
        'dependency-groups,choose-blocks{target="macs=0.5" share=0.5 task=a:b},remove-blocks,'
        "reestimate-batch-norm{task=a:b},dependency-groups,wanda{task=a:b},choose-channels"
    )


def _run(text: str, program: Program, task: str) -> PipelineResult:
    data = load_data(f"{WORDS}:{task}", is_classification=False)
    return Pipeline.parse(f"dependency-groups,{text}").run(program, data=data)


def test_samples_without_a_label_or_with_more_than_one() -> None:
    program = gp.capture(nn.Linear(8, 2), torch.zeros(1, 8))
    x = torch.randn(6, 8)
    for fields in ((x,), (x, x[:, 0], x[:, 1])):
        split = dict.fromkeys(("train", "test"), TensorDataset(*fields)).__getitem__
        data = DataSource(name="n", input_shape=(8,), num_classes=0, split=split)
        drawn_ones = DrawnSamples.of(
            Step(6), program, Context(facts={}, dense=program, data=data), shuffle=False
        )
        ((inputs,),) = drawn_ones
        assert torch.equal(inputs, x)


def test_mistakes_are_told_before_the_first_pass() -> None:
    program = of_fours()
    for text, message in (
        ("wanda{num_samples=0}", "wanda needs at least one sample, found num_samples=0"),
        ('obs{task="nope"}', "expected package.module:name, found 'nope'"),
    ):
        with pytest.raises((DataError, UsageError), match=message):
            Pipeline.parse(f"fine-tune{{batch_size=4}},dependency-groups,{text}").run(
                program, data=noise(30)
            )
    empty = DataSource(
        name="empty",
        input_shape=(1, 8, 8),
        num_classes=3,
        split=lambda _: TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0)),
    )
    with pytest.raises(DataError, match="wanda: cannot draw from the training set of 'empty'"):
        Pipeline.parse("dependency-groups,wanda").run(program, data=empty)


@pytest.mark.parametrize(
    "text", ["wanda", "activation", 'obs{target="macs=0.7"}', "l-obs{keep=0.5}"]
)
def test_samples_of_another_size_are_told(text: str) -> None:
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(49, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    program = gp.capture(flat, torch.zeros(1, 1, 7, 7))
    with pytest.raises(DataError, match="takes samples of shape 1x7x7, the data gives 1x8x8"):
        Pipeline.parse(f"dependency-groups,{text}").run(program, data=noise(30))


def test_statistics_stay_where_samples_come_one_by_one() -> None:
    class Ones(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(64, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.layer(x.view(1, 64)))
            return y

    program = gp.capture(Ones().eval(), torch.zeros(1, 1, 8, 8))
    assert program.fixed_batch == 1
    result = Pipeline.parse("reestimate-batch-norm").run(program, data=noise(30))
    assert [kept.what for kept in result.kept] == ["statistics of batch norms"]
    assert not result.records[0].modified
