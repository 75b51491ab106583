"""The contract of a pass: what it is given, what it is, and what it may return.

A pass is a frozen dataclass whose fields are its options. What it is shows in what it returns:

    Facts            an analysis; the program stays as it was
    TrainingResult   values of parameters and buffers changed, the graph did not
    SurgeryResult    a new program; the one that came in stays as it was
    Artifacts        files and measurements; the program stays as it was
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from graphprune import options, registry, textform
from graphprune.check import Check
from graphprune.errors import PassError
from graphprune.outcome import Kept, Removed
from graphprune.program import Program
from graphprune.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from graphprune.data import DataSource
    from graphprune.verify import Masked

__all__ = [
    "Artifacts",
    "Context",
    "Facts",
    "Pass",
    "PassResult",
    "SurgeryResult",
    "TrainingResult",
]


class Facts:
    """Base of everything that an analysis finds out; subclasses are frozen dataclasses."""


F = TypeVar("F", bound=Facts)


@dataclass(frozen=True, kw_only=True)
class SurgeryResult:
    """A smaller program."""

    program: Program
    """The new program (the old one if nothing was done)."""
    modified: bool
    """Whether anything was done, counted from what was done."""
    removed: Removed = Removed()
    """What went."""
    kept: tuple[Kept, ...] = ()
    """What could have gone and did not."""
    reference: Masked | Program | None = None
    """What the new program must equal, for `graphprune.verify`; None: the program that came in."""
    is_rounded: bool = False
    """Whether new values were rounded to the precision of the parameters, and equal means equal to that precision."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The same graph with other values in its parameters and buffers."""

    program: Program
    """The trained program; it may be the one that came in."""
    modified: bool
    """Whether any value changed."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the training measured."""
    facts: tuple[Facts, ...] = ()
    """Facts that hold for the new values: a plan that the pass has learned. All others are dropped."""
    kept: tuple[Kept, ...] = ()
    """What could have gone and did not, and why."""
    checks: Mapping[str, Check] = field(default_factory=dict)
    """Comparisons by name, for instance ``gates``; none unless `Context.verify` holds."""


@dataclass(frozen=True, kw_only=True)
class Artifacts:
    """What an export wrote and measured."""

    files: tuple[Path, ...] = ()
    """Files, in the order in which they were written."""
    checks: Mapping[str, Check] = field(default_factory=dict)
    """Comparisons by name, for instance ``onnx``."""
    measurements: Mapping[str, Any] = field(default_factory=dict)
    """Numbers by name; ``before`` and ``after`` go into the report."""


PassResult = Facts | SurgeryResult | TrainingResult | Artifacts


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a pass may use besides the program."""

    facts: Mapping[type[Facts], Facts]
    """The facts that still hold, by their class."""
    dense: Program
    """The program that entered the pipeline."""
    data: DataSource | None = None
    """The user's data, if any was given."""
    device: str = "cpu"
    """Where to compute: ``cpu``, ``cuda`` or ``cuda:N``."""
    seed: int = 0
    """Seed of everything random."""
    verify: bool = True
    """Whether to prove what was done."""
    out: Path | None = None
    """Folder to write into; None: an export pass has nowhere to write."""
    progress: Progress = field(default_factory=SilentProgress)
    """Where to announce work that may take more than two seconds."""
    checkpoint: Path | None = None
    """Folder of this pass for the state of long work; None: an interrupted run is lost."""
    resume: bool = False
    """Whether to go on from the state in that folder, if there is one."""

    @property
    def runtime_device(self) -> str:
        """Where ONNX Runtime computes; where its CUDA provider does not load, on the CPU."""
        return self.device.replace("cuda", "auto")

    def need(self, kind: type[F]) -> F:
        """Return the fact of class `kind`.

        Raises:
            PassError: No earlier pass has found it out, or a change made it stale; names the passes that provide it.
        """
        fact = self.facts.get(kind)
        if not isinstance(fact, kind):
            raise PassError(_missing(kind, self.facts))
        return fact


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One step of a pipeline; subclasses are frozen, keyword-only dataclasses whose fields are their options.

    Options are int, float, bool, str, Literal, tuples of these, or None. A pass holds no other state. It must leave the
    program that it gets as it is, except that a training pass may write into its parameters and buffers: the driver
    has cloned the user's program before the first pass.
    """

    name: ClassVar[str]
    """Kebab-case name, under which the pass is registered."""
    requires: ClassVar[tuple[type[Facts], ...]] = ()
    """Facts that must hold before the pass runs."""
    is_method: ClassVar[bool] = False
    """Whether ``--method`` takes the name: the pass returns what a choice of channels is made from."""
    chooses: ClassVar[bool] = False
    """Whether a method chooses the channels itself: it takes the options of choose-channels, hands out a plan, and
    leaves weights and statistics that fit it."""

    def check(self, context: Context) -> None:  # noqa: B027 - most passes are soon done, and say it in run()
        """Look at the options and at what the user gave, before the first pass runs.

        What a pass would stumble over after the long work of others, it says here.

        Raises:
            UsageError, DataError, TargetError: What was given cannot be used.
        """

    @abstractmethod
    def run(self, program: Program, context: Context) -> PassResult:
        """Do the work; what is returned tells the driver what kind of pass this is."""

    def spec(self) -> str:
        """Return the text form: the name, and the options that are not at their default."""
        return textform.format_pass(self.name, options.spelled_options(self))

    @classmethod
    def describe_options(cls) -> dict[str, str]:
        """Return option name -> its type and default as text."""
        return options.describe_options(cls)


def _missing(kind: type[Facts], present: Mapping[type[Facts], Facts]) -> str:
    held = ", ".join(k.__name__ for k in present) or "none"
    providers = registry.providers(kind)
    step = f"; put {' or '.join(providers)} before it" if providers else ""
    return f"needs {kind.__name__}, found {held} (a change to the program drops all facts){step}"
