from __future__ import annotations

import gc
import logging
import sys
import warnings
import weakref

import pytest
import torch
from torch import Tensor, fx, nn

from graphprune.errors import ExportError
from graphprune.exported import export_program, exporter_quiet, first_line, flat_outputs
from graphprune.program import Program
from tests.models import tiny_residual


def _program(module: nn.Module, shape: tuple[int, ...]) -> Program:
    return Program(
        module=fx.symbolic_trace(module.eval()),
        example_inputs=(torch.randn(shape),),
        dialect="fx",
        dynamic_batch=True,
        source="test",
    )


def _tiny() -> Program:
    return _program(tiny_residual(), (1, 3, 16, 16))


def test_a_program_is_exported_once() -> None:
    program = _tiny()
    first = export_program(program)
    assert export_program(program) is first
    assert export_program(program.evolve(program.module, step="x")) is first
    assert export_program(program.clone()) is not first


def test_a_changed_graph_or_tensor_is_exported_anew() -> None:
    program = _tiny()
    first = export_program(program)
    name, parameter = next(iter(program.module.named_parameters()))
    owner, _, leaf = name.rpartition(".")
    setattr(program.module.get_submodule(owner), leaf, nn.Parameter(parameter * 2))
    assert export_program(program) is not first


def test_the_cache_keeps_no_program_alive() -> None:
    program = _tiny()
    export_program(program)
    watched = weakref.ref(program.module)
    del program
    gc.collect()
    assert watched() is None


def test_any_batch_goes_even_if_the_example_has_one_sample() -> None:
    program = _tiny()
    module = export_program(program).module()
    assert [len(module(*program.batch(size))) for size in (1, 2, 7)] == [1, 2, 7]


def test_no_node_tells_where_it_was_made() -> None:
    for node in export_program(_tiny()).graph.nodes:
        assert "stack_trace" not in node.meta


def test_a_refusal_quotes_torch() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[: int(x.sum().item())]

    module = Counts()
    graph = fx.Graph()
    x = graph.placeholder("x")
    total = graph.call_method("item", (graph.call_method("sum", (x,)),))
    count = graph.call_function(int, (total,))
    graph.output(graph.call_function(torch.narrow, (x, 1, 0, count)))
    program = Program(
        module=fx.GraphModule(module, graph),
        example_inputs=(torch.ones(2, 3),),
        dialect="fx",
        dynamic_batch=True,
        source="counts",
    )
    with pytest.raises(
        ExportError, match=r"torch.export refused counts \(dynamic batch, inputs \[\[2, 3\]\]\): \S"
    ):
        export_program(program)


def test_first_line_finds_something_to_say() -> None:
    assert first_line(ValueError("\n\n  what  \nwhere")) == "what"
    assert first_line(ValueError()) == "ValueError"


def test_flat_outputs_follow_the_tree() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    assert [t.item() for t in flat_outputs({"x": a, "y": (b, None, [c])})] == [0.0, 1.0, 2.0]


def test_quiet_is_quiet_and_comes_back(capfd: pytest.CaptureFixture[str]) -> None:
    with exporter_quiet():
        print("out")
        print("err", file=sys.stderr)
        warnings.warn("warning", UserWarning, stacklevel=1)
        logging.getLogger("torch.onnx").error("log")
    assert capfd.readouterr() == ("", "")
    print("again")
    assert capfd.readouterr().out == "again\n"
    assert logging.root.manager.disable == logging.NOTSET
