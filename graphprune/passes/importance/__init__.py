"""Importance: passes that score coupled channels; each is a ``--method``."""

from graphprune.passes.importance.activation import MeanActivation
from graphprune.passes.importance.bn_scale import BatchNormScale
from graphprune.passes.importance.fisher import Fisher
from graphprune.passes.importance.geometric_median import GeometricMedian
from graphprune.passes.importance.lamp import Lamp
from graphprune.passes.importance.magnitude import Magnitude
from graphprune.passes.importance.random import RandomScores
from graphprune.passes.importance.taylor import Taylor
from graphprune.passes.importance.wanda import Wanda

__all__ = [
    "BatchNormScale",
    "Fisher",
    "GeometricMedian",
    "Lamp",
    "Magnitude",
    "MeanActivation",
    "RandomScores",
    "Taylor",
    "Wanda",
]
