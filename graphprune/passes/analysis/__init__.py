"""Analyses: frozen facts about a program, which stays as it was."""

from graphprune.passes.analysis.choose_channels import ChooseChannels
from graphprune.passes.analysis.dependency_groups import FindDependencyGroups
from graphprune.passes.analysis.load_plan import LoadPlan
from graphprune.passes.analysis.measure_costs import MeasureCosts

__all__ = ["ChooseChannels", "FindDependencyGroups", "LoadPlan", "MeasureCosts"]
