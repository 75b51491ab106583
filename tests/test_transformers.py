"""Models of transformers: captured by name, cut in every part, proven, and put back into their own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.groups import DependencyGroups
from graphprune.inputs import infer_inputs
from graphprune.program import Program
from graphprune.units import find_units, parse_granularity
from graphprune.zoo import select
from graphprune.zoo.more_transformers import more_transformers_models
from graphprune.zoo.transformers import FAST, TransformersModel, transformers_models
from tests.exactness import assert_cut_is_exact, random_scores

pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'graphprune[transformers]'"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

GRANULARITY = {"heads": "heads", "feed-forward": "widths", "embedding": "widths"}


def _model(name: str) -> TransformersModel:
    (found,) = select(transformers_models(), [name])
    assert isinstance(found, TransformersModel)
    return found


def _half_of(groups: DependencyGroups, place: str, granularity: str) -> np.ndarray:
    """Return the choice without half of the units of a parameter dimension."""
    units = find_units(groups, random_scores(groups, 0), granularity=parse_granularity(granularity))
    wanted = next(p for p in groups.places if str(p) == place)
    inside = np.zeros(groups.num_channels, np.bool_)
    inside[groups.channels_of(wanted)] = True
    mine = [u for u in range(len(units)) if inside[units.members(u)].any()]
    assert len(mine) > 1, f"{place} is one piece"
    removed = np.zeros(len(units), np.bool_)
    removed[mine[: len(mine) // 2]] = True
    return groups.close(units.without(removed, groups.num_channels))


@pytest.mark.parametrize("name", FAST)
def test_every_part_goes_alone_and_exactly(name: str) -> None:
    model = _model(name)
    program = gp.capture(model.build(), model.example(), outputs=model.outputs)
    groups = gp.analyze(program)
    for part, place in model.parts.items():
        tensor, dim = place[:-1].rsplit("[", 1)
        keep = _half_of(groups, place, GRANULARITY[part])
        cut = assert_cut_is_exact(program, groups, keep)
        before, after = (dict(p.named_tensors())[tensor].shape[int(dim)] for p in (program, cut))
        assert after < before, f"{part}: {place} stays"


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Program]:
    """A decoder of two layers with grouped queries, and its program."""
    model = _model("llama")
    module = model.build()
    return module, gp.capture(module, model.example(), outputs=model.outputs)


def test_a_cut_decoder_generates_with_its_cache(llama: tuple[Any, Program]) -> None:
    module, program = llama
    result = gp.compile(
        program, target="ratio=0.5", granularity="widths,heads", export=False, round_to=1
    )
    assert result.passed
    smaller: Any = result.apply_to(module)
    assert type(smaller) is type(module)
    assert smaller.model.layers[0].self_attn.k_proj.out_features == 16  # one head of two
    assert smaller.model.embed_tokens.embedding_dim == 32
    assert smaller.config.use_cache
    tokens = torch.randint(2, 128, (2, 11), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        smaller(tokens).logits, result.program.module(tokens)["logits"], rtol=1e-4, atol=1e-5
    )
    cached, fresh = (
        smaller.generate(
            tokens, max_new_tokens=12, do_sample=False, use_cache=use_cache, pad_token_id=0
        )
        for use_cache in (True, False)
    )
    assert torch.equal(cached, fresh)


def test_query_heads_that_share_a_key_head_go_together(llama: tuple[Any, Program]) -> None:
    _, program = llama
    groups = gp.analyze(program)
    units = find_units(groups, random_scores(groups, 0), granularity=("heads",))
    assert len(units) == 2 * 2
    keys = groups.channels_of(
        next(p for p in groups.places if str(p) == "model.layers.0.self_attn.k_proj.weight[0]")
    )
    queries = groups.channels_of(
        next(p for p in groups.places if str(p) == "model.layers.0.self_attn.q_proj.weight[0]")
    )
    first = units.members(0)
    assert int(np.isin(keys, first).sum()) == 16
    assert int(np.isin(queries, first).sum()) == 32


def test_a_decoder_without_data_is_analysed() -> None:
    from graphprune.bench.scale import build

    program = gp.capture(build("qwen", 1), torch.arange(9).view(1, 9))
    groups = gp.analyze(program)
    pinned = {g.name for g in groups if g.pinned}
    assert pinned == {"lm_head.weight[0]"}
    assert groups.cost.total().params > 1.3e9


def test_models_state_their_own_inputs() -> None:
    module = _model("t5").build()
    inputs = infer_inputs(module)
    assert {name: tuple(t.shape) for name, t in inputs.items()} == {
        "input_ids": (1, 16),
        "decoder_input_ids": (1, 16),
    }
    assert int(inputs["input_ids"].max()) < 128
    vision = infer_inputs(_model("vit").build())
    assert tuple(vision["pixel_values"].shape) == (1, 3, 32, 32)


def test_more_models_are_those_of_the_library() -> None:
    import transformers

    models = more_transformers_models()
    assert len({m.name for m in models} | {m.name for m in transformers_models()}) == 27 + len(
        models
    )
    assert all(hasattr(transformers, m.architecture) for m in models)


@pytest.mark.parametrize("name", ["xlnet", "mamba2", "olmoe", "swinv2", "siglip", "patchtst"])
def test_one_more_of_each_kind(name: str) -> None:
    (model,) = select(more_transformers_models(), [name])
    module = model.build()
    result = gp.compile(
        module, model.example(), outputs=model.outputs, target="macs=0.5", export=False
    )
    assert result.passed
    before, after = (gp.analyze(program).cost.macs for program in (result.dense, result.program))
    assert after <= 0.5 * before


def test_a_mixture_of_experts_is_exported_and_read_again(tmp_path: Path) -> None:
    """An expert's hidden unit goes from all experts; products of groups are written in ONNX's own operators."""
    model = _model("mixtral")
    result = gp.compile(
        model.build(), model.example(), outputs=model.outputs, target="macs=0.5", out=tmp_path
    )
    assert {name for name, check in result.report.checks.items() if check and check.passed} == {
        *("capture", "surgery", "onnx", "exported_program")
    }
    again = gp.capture(str(tmp_path / "model.pt2"))
    tokens = torch.randint(2, 128, (2, 11), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        again.module(tokens)["logits"], result.program.module(tokens)["logits"], rtol=0, atol=0
    )
