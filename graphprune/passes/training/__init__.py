"""Passes that change the values of a program and leave its structure alone."""

from __future__ import annotations

from graphprune.passes.training.fine_tune import FineTune
from graphprune.passes.training.l_obs import LayerwiseObs
from graphprune.passes.training.obs import StructuredObs
from graphprune.passes.training.reestimate_batch_norm import ReestimateBatchNorm
from graphprune.passes.training.trainable_gates import TrainableGates

__all__ = ["FineTune", "LayerwiseObs", "ReestimateBatchNorm", "StructuredObs", "TrainableGates"]
