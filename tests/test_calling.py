"""Models that are called by keyword and answer by name."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.calling import Calling, calling_of
from graphprune.errors import InputError
from graphprune.inputs import parse_inputs

EXACT = "dependency-groups,magnitude,choose-channels{target=ratio=0.5},remove-channels"


class Pair(nn.Module):
    """Takes two tensors by name and answers with a mapping that holds more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 12)
        self.wide = nn.Linear(12, 20)
        self.head = nn.Linear(20, 5)

    def forward(
        self, tokens: Tensor | None = None, *, weight: Tensor | None = None, scale: float = 1.0
    ) -> OrderedDict[str, Any]:
        hidden = torch.relu(self.wide(self.table(tokens)))
        if weight is not None:
            hidden = hidden * weight.unsqueeze(-1) * scale
        return OrderedDict(logits=self.head(hidden), hidden=hidden, state=(None, "cache"))


INPUTS = {"tokens": torch.arange(7).view(1, 7), "weight": torch.ones(1, 7), "scale": 0.5}


def test_a_mapping_calls_by_name_and_outputs_pick_what_counts() -> None:
    model = Pair().eval()
    program = gp.capture(model, INPUTS, outputs=["logits"])
    assert [n.name for n in program.module.graph.nodes if n.op == "placeholder"] == [
        "tokens",
        "weight",
    ]
    assert len(program.example_inputs) == 2
    found = program.module(INPUTS["tokens"], INPUTS["weight"])
    assert list(found) == ["logits"]
    torch.testing.assert_close(found["logits"], model(**INPUTS)["logits"])


def test_channels_of_outputs_that_do_not_count_may_go() -> None:
    whole = gp.analyze(gp.capture(Pair(), INPUTS))
    picked = gp.analyze(gp.capture(Pair(), INPUTS, outputs=["logits"]))

    def reason(groups: gp.DependencyGroups) -> str | None:
        return next(g.pinned for g in groups if g.name == "wide.weight[0]")

    assert reason(whole) is not None
    assert reason(picked) is None


def test_the_users_class_is_called_the_same_way_when_it_is_cut() -> None:
    model = Pair().eval()
    result = gp.compile(model, INPUTS, target="ratio=0.5", outputs=["logits"], export=False)
    smaller = result.apply_to(model)
    assert type(smaller) is Pair
    assert smaller.wide.out_features < 20
    expected = result.program.module(INPUTS["tokens"], INPUTS["weight"])["logits"]
    torch.testing.assert_close(smaller(**INPUTS)["logits"], expected)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match=r"Pair takes no input 'ids': it takes tokens, weight"):
        gp.capture(Pair(), {"ids": INPUTS["tokens"]})
    with pytest.raises(InputError, match=r"no output 'loss': it has logits, hidden, state"):
        gp.capture(Pair(), INPUTS, outputs=["loss"])


def test_a_model_that_is_called_as_it_is_needs_no_calling() -> None:
    calling, inputs = calling_of(nn.Linear(3, 4), torch.ones(2, 3))
    assert calling is None
    assert torch.equal(inputs, torch.ones(2, 3))


def test_outputs_are_picked_by_position_too() -> None:
    pair = (torch.zeros(1), [torch.ones(2), "text"])
    assert Calling(outputs=("1",)).select(pair)[0][0].shape == (2,)
    assert Calling().select({"a": None, "b": 3}) is None


def test_inputs_with_names_and_limits() -> None:
    inputs = parse_inputs(["ids=2x300:int64:7", "mask=2x300:bool", "x=2x3"])
    assert list(inputs) == ["ids", "mask", "x"]
    assert int(inputs["ids"].max()) == 6
    assert int(inputs["ids"].min()) == 0
    with pytest.raises(InputError, match="only ids have names"):
        parse_inputs(["ids=1x3:int64", "1x3"])
    with pytest.raises(InputError, match="limit 5: expected one of at least 1, of an integer type"):
        parse_inputs("1x3:float32:5")
