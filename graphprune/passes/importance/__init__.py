"""Importance: passes that score coupled channels; each is a ``--method``."""

from graphprune.passes.importance.activation import MeanActivation
from graphprune.passes.importance.bn_scale import BatchNormScale
from graphprune.passes.importance.magnitude import Magnitude
from graphprune.passes.importance.random import RandomScores
from graphprune.passes.importance.taylor import Taylor

__all__ = ["BatchNormScale", "Magnitude", "MeanActivation", "RandomScores", "Taylor"]
