"""Models that no tracer captures whole: detectors, and whatever branches in Python on what it computes.

Such a model is a program of the dialect ``module``: it runs as it is, and is cut in place. Its own code may hold sizes
as numbers (``x.view(n, 8, 32)``), and no graph shows them. So they are found by trial: a random cut is made and run
beside the masked model, and where it fails or differs, whatever reaches that operator is pinned, until a trial
passes; where that is not enough, whatever reaches any operator of that module. The cut that is made in the end is
proven like every other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.budget import choose
from graphprune.calling import Calling
from graphprune.cut import cut_program
from graphprune.errors import AnalysisError, CaptureError, TargetError
from graphprune.groups import analyze
from graphprune.labels.whole import ALL_OPERATORS, OWN_OPERATORS
from graphprune.lowering.copies import copy_structure
from graphprune.program import Program, WholeModel
from graphprune.target import parse_target
from graphprune.verify import Differs, Masked
from graphprune.verify_whole import Site, Stumble, compare_whole

__all__ = ["capture_whole"]

TRIALS = 24
"""How many places with sizes as numbers are looked for before the model is given up."""
_RATIO = "ratio=0.3"
_TOLERANCE = 1e-9


def capture_whole(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    source: str,
    reasons: Sequence[str],
    *,
    calling: Calling | None = None,
) -> Program:
    """Return a model as a program that runs it whole.

    Args:
        model: The model, in evaluation mode, which takes `inputs` by position.
        inputs: Its example inputs, on which it is analysed and proven.
        source: What the user called it.
        reasons: Why no tracer captured it.
        calling: How `inputs` are given to the user's own model.

    Raises:
        CaptureError: The model has no parameters, or no trial cut passes.
        AnalysisError: The model does not run on its example inputs.
    """
    if not any(True for _ in model.parameters()):
        raise CaptureError(f"{source} cannot be captured as a graph:\n  " + "\n  ".join(reasons))
    program = Program(
        module=WholeModel.of(copy_structure(model), len(inputs)),
        example_inputs=inputs,
        dialect="module",
        dynamic_batch=False,
        source=source,
        untraced=tuple(reasons),
        calling=calling,
    )
    for trial in range(TRIALS):
        found = _stumble(program, seed=trial)
        if found is None:
            return program
        site = next((s for s in _wider(found.site) if s not in program.fixed), None)
        if site is None:
            raise CaptureError(
                f"{source} cannot be captured as a graph, nor cut as it is: {found}\n  "
                + "\n  ".join(reasons)
            )
        program = dataclasses.replace(program, fixed=program.fixed | {site})
    raise CaptureError(
        f"{source} cannot be captured as a graph, and holds sizes as numbers in more than {TRIALS} places:\n  "
        + "\n  ".join(reasons)
    )


def _wider(site: Site) -> Iterator[Site]:
    """Yield what to pin for a place, the least first: what is wrong there may come from anywhere around it."""
    yield site
    path = site[0]
    while True:
        yield path, OWN_OPERATORS, 0
        yield path, ALL_OPERATORS, 0
        if not path:
            return
        path = path.rpartition(".")[0]


def _stumble(program: Program, *, seed: int) -> Stumble | None:
    """Cut at random; return where the cut model fails or differs from the masked one, or None."""
    groups = analyze(program)
    scores = np.random.default_rng(seed).random(groups.num_channels)
    try:
        keep = choose(groups, scores, parse_target(_RATIO)).keep
    except TargetError:
        return None  # nothing can go, so nothing can break
    if keep.all():
        return None
    cut = cut_program(program, groups, keep).program
    before, after = (p.map_floating(lambda t: t.to(torch.float64)) for p in (program, cut))
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        compare_whole(before, after, before.example_inputs, Masked(groups, keep), _TOLERANCE)
    except Stumble as error:
        return error
    except Differs as error:
        raise AnalysisError(f"{program.source}: {error}") from error
    finally:
        torch.set_default_dtype(previous)
    return None
