"""The driver: order, facts, what each kind of pass may do, and what it is told when it does more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from graphprune import registry
from graphprune.capture import capture
from graphprune.check import Check
from graphprune.contract import (
    Artifacts,
    Context,
    Facts,
    Pass,
    PassResult,
    SurgeryResult,
    TrainingResult,
)
from graphprune.errors import ExportError, PassError, TargetError
from graphprune.outcome import Kept, Removed
from graphprune.pipeline import Pipeline
from graphprune.program import Program
from tests.third_party.install import install_count_nodes


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x))


@pytest.fixture
def program() -> Program:
    module = fx.symbolic_trace(Small().eval())
    inputs = (torch.randn(2, 3),)
    return Program(
        module=module, example_inputs=inputs, dialect="fx", dynamic_batch=True, source="small"
    )


def weight_of(program: Program) -> torch.Tensor:
    return program.module.get_parameter("fc.weight")


@dataclass(frozen=True)
class Note(Facts):
    text: str


@dataclass(frozen=True, kw_only=True)
class Find(Pass):
    """Find something out."""

    name: ClassVar[str] = "find"
    text: str = "found"

    def run(self, program: Program, context: Context) -> Note:
        return Note(self.text)


@dataclass(frozen=True, kw_only=True)
class Need(Pass):
    """Need what `Find` finds."""

    name: ClassVar[str] = "need"
    requires: ClassVar[tuple[type[Facts], ...]] = (Note,)

    def run(self, program: Program, context: Context) -> PassResult:
        return Artifacts(measurements={"note": context.need(Note).text})


@dataclass(frozen=True, kw_only=True)
class Double(Pass):
    """Double the output: a surgery that verification can be asked about."""

    name: ClassVar[str] = "double"
    times: int = 1

    def run(self, program: Program, context: Context) -> SurgeryResult:
        kept = (Kept("input", "pinned"),)
        if not self.times:
            return SurgeryResult(program=program, modified=False, kept=kept)
        clone = program.clone()
        output = next(n for n in clone.module.graph.nodes if n.op == "output")
        for _ in range(self.times):
            with clone.module.graph.inserting_before(output):
                doubled = clone.module.graph.call_function(torch.mul, (output.args[0], 2))
            output.args = (doubled,)
        return SurgeryResult(
            program=clone.evolve(clone.module, step=self.spec()),
            modified=True,
            removed=Removed(channels=self.times, layers=("fc",)),
            kept=kept,
        )


@dataclass(frozen=True, kw_only=True)
class Behave(Pass):
    """Do what the option says, much of it forbidden."""

    name: ClassVar[str] = "behave"
    how: str = ""

    def run(self, program: Program, context: Context) -> Any:
        graph = program.module.graph
        match self.how:
            case "analysis edits":
                next(iter(graph.nodes)).name = "renamed"
                return Note("")
            case "analysis writes":
                with torch.no_grad():
                    weight_of(program).add_(1)
                return Note("")
            case "surgery in place":
                return SurgeryResult(program=program, modified=True)
            case "surgery edits input":
                next(iter(graph.nodes)).name = "renamed"
                return SurgeryResult(program=program.clone(), modified=True)
            case "surgery breaks":
                clone = program.clone()
                nodes = list(clone.module.graph.nodes)
                nodes[1].append(nodes[0])
                return SurgeryResult(program=clone, modified=True)
            case "training":
                with torch.no_grad():
                    weight_of(program).add_(1)
                return TrainingResult(program=program, modified=True, metrics={"loss": 0.5})
            case "training edits":
                return TrainingResult(program=Double().run(program, context).program, modified=True)
            case "target":
                raise TargetError("cannot reach it")
            case "export":
                raise ExportError("cannot write it")
        return 3


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Check]]:
    """Answers of a verifier that stands in for the real one, used from the front."""
    checks: list[Check] = []
    monkeypatch.setattr("graphprune.pipeline.verify_surgery", lambda *_, **__: checks.pop(0))
    yield checks
    assert not checks, "the verifier was not asked as often as the test says"


def check(error: float, *, passed: bool = True) -> Check:
    return Check(max_abs_err=error, tolerance=1.0, passed=passed)


def test_facts_reach_later_passes_and_records_are_kept(program: Program) -> None:
    result = Pipeline([Find(text="hello"), Need()]).run(program)
    assert result.measurements == {"note": "hello"}
    assert result.facts == {Note: Note("hello")}
    assert [(r.name, r.modified) for r in result.records] == [
        ("find{text=hello}", False),
        ("need", False),
    ]
    assert all(r.seconds >= 0 for r in result.records)


def test_a_missing_fact_is_an_error_that_names_pass_and_fact(program: Program) -> None:
    with pytest.raises(PassError, match="^need: needs Note, found none"):
        Pipeline([Need()]).run(program)


def test_a_missing_fact_names_the_pass_that_provides_it(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_count_nodes(tmp_path, monkeypatch)
    kind = registry.load("count-nodes").run.__globals__["NodeCount"]
    context = Context(facts={Note: Note("")}, dense=program)
    with pytest.raises(PassError, match="needs NodeCount, found Note .*put count-nodes before it"):
        context.need(kind)


def test_a_third_partys_pass_is_run(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_count_nodes(tmp_path, monkeypatch)
    result = Pipeline.parse("count-nodes{inputs-too=false}").run(program)
    (fact,) = result.facts.values()
    assert fact.count == 3  # type: ignore[attr-defined]


def test_surgery_changes_the_program_and_leaves_the_callers_alone(
    program: Program, verdicts: list[Check]
) -> None:
    verdicts.append(check(0.1))
    before = str(program)
    result = Pipeline([Double()]).run(program)
    x = program.example_inputs[0]
    assert str(program) == before
    assert torch.equal(result.program.module(x), 2 * program.module(x))
    assert result.removed == Removed(channels=1, layers=("fc",))
    assert result.kept == (Kept("input", "pinned"),)
    assert result.checks == {"surgery": check(0.1)}
    assert result.program.history == ("double",)
    assert result.records[0].modified


def test_facts_go_stale_when_the_program_changes(program: Program, verdicts: list[Check]) -> None:
    verdicts.append(check(0.1))
    with pytest.raises(PassError, match="^need: needs Note, found none"):
        Pipeline([Find(), Double(), Need()]).run(program)


def test_facts_survive_a_surgery_that_did_nothing(program: Program) -> None:
    result = Pipeline([Find(), Double(times=0), Need()]).run(program)
    assert result.measurements == {"note": "found"}
    assert not result.records[1].modified
    assert result.kept == (Kept("input", "pinned"),)
    assert result.checks == {}


def test_verification_can_be_left_out(program: Program, verdicts: list[Check]) -> None:
    assert Pipeline([Double()]).run(program, verify=False).checks == {}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([check(0.1), check(0.5)], check(0.5)),
        ([check(0.5), check(0.1)], check(0.5)),
        ([check(0.5), check(2.0, passed=False)], check(2.0, passed=False)),
        ([check(2.0, passed=False), check(0.5)], check(2.0, passed=False)),
        ([check(float("nan"), passed=False), check(9.0)], None),
    ],
)
def test_of_several_surgeries_the_worst_check_stays(
    program: Program, verdicts: list[Check], given: list[Check], expected: Check | None
) -> None:
    verdicts += given
    result = Pipeline([Double(), Double()]).run(program)
    assert result.checks["surgery"] == (expected or given[0])
    assert result.passed == all(c.passed for c in given)
    assert result.removed == Removed(channels=2, layers=("fc", "fc"))


def test_training_changes_values_of_a_clone(program: Program) -> None:
    weight = weight_of(program).detach().clone()
    result = Pipeline([Behave(how="training")]).run(program)
    assert torch.equal(weight_of(program), weight)
    assert torch.equal(weight_of(result.program), weight + 1)
    assert result.measurements == {"loss": 0.5}
    assert result.records[0].modified


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("analysis edits", "must leave its input as it was, but the graph changed; line 1 was '%x"),
        ("analysis writes", "must leave its input as it was, but wrote into fc.weight"),
        ("surgery in place", "a surgery must return a new module"),
        ("surgery edits input", "must leave its input as it was, but the graph changed"),
        ("surgery breaks", "the new graph does not lint"),
        ("training edits", "a training pass may change values only, found another graph"),
        ("nonsense", "must return Facts, SurgeryResult, TrainingResult or Artifacts, found int"),
    ],
)
def test_a_pass_that_breaks_its_promise_is_told(program: Program, how: str, message: str) -> None:
    with pytest.raises(PassError, match=f"to the author of Behave: .*{message}"):
        Pipeline([Behave(how=how)]).run(program)


class _Fading(nn.Module):
    """Halves its own weights whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.fc.weight.div_(2)
        y: Tensor = self.fc(x)
        return y


def test_a_program_that_writes_into_itself_is_told(tmp_path: Path) -> None:
    with torch.no_grad():
        program = capture(_Fading(), torch.randn(2, 4))
    expected = (
        r"export-onnx.*: _Fading writes into its own fc.weight whenever it runs, so two runs differ"
    )
    with pytest.raises(PassError, match=expected):
        Pipeline.parse("export-onnx").run(program, out=tmp_path)


def test_an_error_of_a_pass_names_the_pass(program: Program) -> None:
    with pytest.raises(PassError, match="^behave{how=export}: cannot write it") as caught:
        Pipeline([Behave(how="export")]).run(program)
    assert isinstance(caught.value.__cause__, ExportError)


def test_an_error_about_what_the_user_gave_keeps_its_class(program: Program) -> None:
    with pytest.raises(TargetError, match="^cannot reach it") as caught:
        Pipeline([Behave(how="target")]).run(program)
    assert caught.value.__notes__ == ["raised by the pass behave{how=target}"]


def test_callbacks_see_every_gap(program: Program, verdicts: list[Check]) -> None:
    verdicts.append(check(0.1))
    seen: list[tuple[str | None, int, str | None]] = []

    def callback(previous: Pass | None, current: Program, following: Pass | None) -> None:
        nodes = len(current.module.graph.nodes)
        names = [step.name if step else None for step in (previous, following)]
        seen.append((names[0], nodes, names[1]))

    Pipeline([Find(), Double()]).run(program, callbacks=[callback])
    assert seen == [(None, 4, "find"), ("find", 4, "double"), ("double", 5, None)]


def test_pipelines_compare_and_print_by_their_passes() -> None:
    pipeline = Pipeline([Find(text="a b"), Double(times=2)])
    assert str(pipeline) == 'find{text="a b"},double{times=2}'
    assert repr(pipeline) == """Pipeline.parse('find{text="a b"},double{times=2}')"""
    assert pipeline == Pipeline([Find(text="a b"), Double(times=2)])
    assert pipeline != Pipeline([Find()])
    assert len({pipeline, Pipeline([Find(text="a b"), Double(times=2)])}) == 1
