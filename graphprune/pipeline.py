"""Pipelines, and the driver that runs their passes one after the other.

The driver does what no pass (`graphprune.contract`) has to do for itself: it checks that the facts a pass needs are
there, times it, holds it to what its return type promises, lints and recompiles a new graph, drops facts that a change
made stale, and proves every surgery exact (`graphprune.verify`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphprune import options, registry, textform
from graphprune.check import Check
from graphprune.contract import (
    Artifacts,
    Context,
    Facts,
    Pass,
    SurgeryResult,
    TrainingResult,
)
from graphprune.devices import pick_device
from graphprune.errors import (
    CheckpointError,
    DataError,
    GraphpruneError,
    OutputError,
    PassError,
    PlanError,
    TargetError,
    UsageError,
)
from graphprune.outcome import Kept, Removed
from graphprune.program import Program
from graphprune.progress import Progress, SilentProgress
from graphprune.verify import verify_surgery

if TYPE_CHECKING:
    from graphprune.data import DataSource

__all__ = ["Callback", "PassRecord", "Pipeline", "PipelineResult"]


Callback = Callable[[Pass | None, Program, Pass | None], None]
"""Called between passes with (previous, program, next), and before the first and after the last with None."""


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What the report says about one pass that ran."""

    name: str
    """Text form of the pass."""
    seconds: float
    """Wall time of the pass, without the driver's own checks."""
    modified: bool
    """Whether it changed the program."""


@dataclass(frozen=True, kw_only=True)
class PipelineResult:
    """Everything that a pipeline brought about."""

    program: Program
    """The program as the last pass left it."""
    facts: Mapping[type[Facts], Facts]
    """The last fact of each class, those included that a later change made stale."""
    removed: Removed
    """What all surgeries together removed."""
    kept: tuple[Kept, ...]
    """What could have gone and did not."""
    checks: Mapping[str, Check]
    """The worst outcome of each comparison, by name; ``surgery`` is the driver's own."""
    files: tuple[Path, ...]
    """Files that were written."""
    measurements: Mapping[str, Any]
    """Numbers from training and export passes, by name."""
    records: tuple[PassRecord, ...]
    """Every pass that ran, in order."""

    @property
    def passed(self) -> bool:
        """Whether no check fell short."""
        return all(check.passed for check in self.checks.values())


class Pipeline:
    """A sequence of passes; ``Pipeline.parse(str(pipeline)) == pipeline`` for registered passes."""

    def __init__(self, passes: Iterable[Pass]) -> None:
        """Take the passes in the order in which they run."""
        self.passes = tuple(passes)

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read the text form, ``a,b{x=1}``.

        Raises:
            UsageError: The text cannot be read, or names a pass or an option that does not exist.
        """
        passes = []
        for part in textform.parse(text):
            kind = registry.load(part.name)
            passes.append(kind(**options.convert_options(kind, part.options)))
        return cls(passes)

    def __str__(self) -> str:
        """Return the text form."""
        return ",".join(step.spec() for step in self.passes)

    def __repr__(self) -> str:
        """Return the text form in a call."""
        return f"Pipeline.parse({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        """Compare the passes with their options."""
        return isinstance(other, Pipeline) and self.passes == other.passes

    def __hash__(self) -> int:
        """Hash the passes with their options."""
        return hash(self.passes)

    def run(
        self,
        program: Program,
        *,
        data: DataSource | None = None,
        device: str = "auto",
        seed: int = 0,
        out: str | Path | None = None,
        verify: bool = True,
        callbacks: Sequence[Callback] = (),
        progress: Progress | None = None,
        checkpoints: str | Path | None = None,
        resume: bool = False,
    ) -> PipelineResult:
        """Run every pass on a clone of `program`, which stays as it is.

        Args:
            program: What to compile.
            data: The user's data, for passes that score, train or re-estimate.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            seed: Seed of everything random.
            out: Folder for export passes; it must exist.
            verify: Prove every surgery exact, and whatever else a pass promises.
            callbacks: Called between passes with (previous, program, next).
            progress: Where long work is shown; nowhere unless given.
            checkpoints: Folder in which passes that train or measure keep their state; none unless given. It is left
                as it is.
            resume: Go on from the states in that folder.

        Raises:
            PassError: A pass failed, lacks a fact, or broke what its return type promises.
            TargetError, PlanError, DataError, OutputError, UsageError, CheckpointError: As a pass raised them, with a
                note.
        """
        context = Context(
            facts={},
            dense=program,
            data=data,
            device=pick_device(device),
            seed=seed,
            verify=verify,
            out=None if out is None else Path(out),
            progress=progress or SilentProgress(),
            resume=resume,
        )
        for step in self.passes:
            with _named(step):
                step.check(context)
        start = program.clone()
        if start.origin is not None:  # targets and plans are about the program that comes in
            start = dataclasses.replace(start, origin=None)
        driver = _Driver(program=start, context=context)
        previous: Pass | None = None
        for number, step in enumerate(self.passes, 1):
            for callback in callbacks:
                callback(previous, driver.program, step)
            if checkpoints is not None:
                folder = Path(checkpoints) / f"{number}-{step.name}"
                driver.context = dataclasses.replace(driver.context, checkpoint=folder)
            driver.step(step)
            previous = step
        for callback in callbacks:
            callback(previous, driver.program, None)
        return driver.result()


_OWN_CLASS = (TargetError, PlanError, DataError, OutputError, UsageError, CheckpointError)
"""Errors about what the user gave: their class says more than PassError would."""


class _Driver:
    """State of one run."""

    def __init__(self, *, program: Program, context: Context) -> None:
        self.program = program
        self.context = context
        self.facts: dict[type[Facts], Facts] = {}
        self.removed = Removed()
        self.kept: list[Kept] = []
        self.checks: dict[str, Check] = {}
        self.files: list[Path] = []
        self.measurements: dict[str, Any] = {}
        self.records: list[PassRecord] = []

    def result(self) -> PipelineResult:
        return PipelineResult(
            program=self.program,
            facts=dict(self.facts),
            removed=self.removed,
            kept=tuple(dict.fromkeys(self.kept)),
            checks=dict(self.checks),
            files=tuple(self.files),
            measurements=dict(self.measurements),
            records=tuple(self.records),
        )

    def step(self, step: Pass) -> None:
        with _named(step):
            for kind in step.requires:
                self.context.need(kind)
        text, versions = str(self.program), _versions(self.program)
        started = time.perf_counter()
        with _named(step):
            result: object = step.run(self.program, self.context)
        seconds = time.perf_counter() - started
        match result:
            case SurgeryResult():
                modified = result.modified
                self.must_be_untouched(step, text, versions)
                self.operate(step, result)
            case TrainingResult():
                modified = result.modified
                self.train(step, result, text)
            case Artifacts():
                modified = False
                self.must_be_untouched(step, text, versions)
                self.files += result.files
                self.measurements.update(result.measurements)
                self.record_checks(result.checks)
            case Facts():
                modified = False
                self.must_be_untouched(step, text, versions)
                self.learn(result)
            case _:
                raise PassError(
                    f"{step.spec()}: to the author of {type(step).__qualname__}: run() must return Facts, "
                    f"SurgeryResult, TrainingResult or Artifacts, found {type(result).__name__}"
                )
        self.records.append(PassRecord(name=step.spec(), seconds=seconds, modified=modified))

    def learn(self, fact: Facts) -> None:
        self.facts[type(fact)] = fact
        self.context = dataclasses.replace(
            self.context, facts={**self.context.facts, type(fact): fact}
        )

    def operate(self, step: Pass, result: SurgeryResult) -> None:
        self.kept += result.kept
        if not result.modified:
            return
        if result.program.module is self.program.module:
            raise PassError(
                f"{step.spec()}: to the author of {type(step).__qualname__}: a surgery must return a new module and "
                "leave its input as it was; found the input module in a result with modified=True"
            )
        before = self.program
        self.removed += result.removed
        self.replace(step, result.program)
        if self.context.verify:
            check = verify_surgery(
                before, self.program, result.reference, is_rounded=result.is_rounded
            )
            self.record_checks({"surgery": check})

    def train(self, step: Pass, result: TrainingResult, text: str) -> None:
        self.measurements.update(result.metrics)
        after = str(dataclasses.replace(result.program, history=self.program.history))
        if after != text:
            raise PassError(
                f"{step.spec()}: to the author of {type(step).__qualname__}: a training pass may change values only, "
                f"found another graph; {_first_difference(text, after)}"
            )
        self.kept += result.kept
        self.record_checks(result.checks)
        if result.modified:
            self.replace(step, result.program)
        for fact in result.facts:
            self.learn(fact)

    def replace(self, step: Pass, program: Program) -> None:
        """Take a changed program: lint it, recompile it, and forget every fact about the old one."""
        try:
            program.module.graph.lint()
        except RuntimeError as error:
            raise PassError(
                f"{step.spec()}: to the author of {type(step).__qualname__}: the new graph does not lint: {error}"
            ) from error
        program.module.recompile()
        self.program = program
        self.context = dataclasses.replace(self.context, facts={})

    def must_be_untouched(self, step: Pass, text: str, versions: Mapping[str, int]) -> None:
        """Check that neither the graph nor a parameter or buffer of the pass's input changed."""
        after = str(self.program)
        if after != text:
            raise PassError(
                f"{step.spec()}: to the author of {type(step).__qualname__}: the pass must leave its input as it was, "
                f"but the graph changed; {_first_difference(text, after)}"
            )
        changed = [
            name
            for name, version in _versions(self.program).items()
            if versions.get(name) != version
        ]
        if not changed:
            return
        names = f"{', '.join(changed[:3])}{' and others' if len(changed) > 3 else ''}"
        if set(changed) <= _written_by_itself(self.program):
            raise PassError(
                f"{step.spec()}: {self.program.source} writes into its own {names} whenever it runs, so two runs "
                f"differ and nothing can be compared with it. If the model does so the first time only, call it once "
                f"before it is captured; else take the write out of its forward."
            )
        raise PassError(
            f"{step.spec()}: to the author of {type(step).__qualname__}: the pass must leave its input as it was, "
            f"but wrote into {names}"
        )

    def record_checks(self, checks: Mapping[str, Check]) -> None:
        """Keep the worst of several checks of one name; all must pass for it to pass."""
        for name, check in checks.items():
            first = self.checks.get(name, check)
            worst = max((first, check), key=_severity)
            self.checks[name] = dataclasses.replace(worst, passed=first.passed and check.passed)


def _severity(check: Check) -> tuple[bool, float]:
    """Order checks: those that failed above those that passed, then by error in units of the tolerance."""
    error = check.max_abs_err
    if error is None or math.isnan(error):
        return not check.passed, 0.0 if check.passed else math.inf
    return not check.passed, error / check.tolerance if check.tolerance else error


@contextlib.contextmanager
def _named(step: Pass) -> Iterator[None]:
    """Name the pass in an error of ours; one about what the user gave keeps its class."""
    try:
        yield
    except _OWN_CLASS as error:
        error.add_note(f"raised by the pass {step.spec()}")
        raise
    except GraphpruneError as error:
        raise PassError(f"{step.spec()}: {error}") from error


def _versions(program: Program) -> dict[str, int]:
    """Return how often each parameter and buffer has been written into."""
    return {name: t._version for name, t in program.named_tensors() if not t.is_inference()}


def _written_by_itself(program: Program) -> set[str]:
    """Return the parameters and buffers that one run of the program writes into."""
    clone = program.clone()
    before = _versions(clone)
    with torch.no_grad():
        clone.module(*clone.example_inputs)
    return {name for name, version in _versions(clone).items() if before.get(name) != version}


def _first_difference(before: str, after: str) -> str:
    old, new = before.splitlines(), after.splitlines()
    for i, (a, b) in enumerate(zip(old, new, strict=False)):
        if a != b:
            return f"line {i} was {a.strip()!r} and became {b.strip()!r}"
    return f"it had {len(old)} lines and has {len(new)}"
