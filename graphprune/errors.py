"""Every error that graphprune raises on purpose.

A message says what was expected, what was found (with values), where, and what to do next.

    GraphpruneError
    |-- UsageError (ValueError)      an option or a text form that cannot be understood; exit status 2
    |-- LoadError (ValueError)       a model or weight file that cannot be loaded
    |   `-- ForbiddenClassError      a pickle names a class that is not on the allow-list
    |-- CaptureError                 neither tracer can turn the module into a graph
    |-- InputError (ValueError)      example inputs that the model does not accept
    |-- DataError (ValueError)       a data set that is not there or not readable
    |-- AnalysisError                labels that contradict each other
    |-- PlanError (ValueError)       a plan that does not fit the program
    |-- TargetError (ValueError)     a target out of range, or one that no removal can reach
    |-- TrainingError                a training that diverged or cannot go on
    |-- CheckpointError (ValueError) a checkpoint that cannot be read, or belongs to another run
    |-- PassError                    a pass failed; names the pass and what it was given
    |-- VerifyError                  a cut that is not exact; names the first node that differs
    |-- ApplyError                   the user's own class cannot hold the cut model
    |-- ExportError                  the exporter or ONNX Runtime refused the program
    `-- OutputError (OSError)        an output folder that cannot be written
"""

from __future__ import annotations

__all__ = [
    "AnalysisError",
    "ApplyError",
    "CaptureError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "ForbiddenClassError",
    "GraphpruneError",
    "InputError",
    "LoadError",
    "OutputError",
    "PassError",
    "PlanError",
    "TargetError",
    "TrainingError",
    "UsageError",
    "VerifyError",
]


class GraphpruneError(Exception):
    """Root of every error that graphprune raises on purpose."""


class UsageError(GraphpruneError, ValueError):
    """An option or a text form cannot be understood."""


class LoadError(GraphpruneError, ValueError):
    """A model or weight file cannot be loaded."""


class ForbiddenClassError(LoadError):
    """A pickle names a class that is not on the allow-list."""


class CaptureError(GraphpruneError):
    """Neither tracer can turn the module into a graph."""


class InputError(GraphpruneError, ValueError):
    """The model does not accept the example inputs."""


class DataError(GraphpruneError, ValueError):
    """A data set is not there, or not readable."""


class AnalysisError(GraphpruneError):
    """The labels of a program contradict each other."""


class PlanError(GraphpruneError, ValueError):
    """A plan does not fit the program."""


class TargetError(GraphpruneError, ValueError):
    """A target is out of range, or no removal can reach it."""


class TrainingError(GraphpruneError):
    """A training diverged, or cannot go on."""


class CheckpointError(GraphpruneError, ValueError):
    """A checkpoint cannot be read, or belongs to another run."""


class PassError(GraphpruneError):
    """A pass failed; the message names the pass and the cause is chained."""


class VerifyError(GraphpruneError):
    """A cut is not exact; the message names the first node that differs."""


class ApplyError(GraphpruneError):
    """The user's own class cannot hold the cut model."""


class ExportError(GraphpruneError):
    """The exporter or ONNX Runtime refused the program."""


class OutputError(GraphpruneError, OSError):
    """An output folder cannot be written."""
