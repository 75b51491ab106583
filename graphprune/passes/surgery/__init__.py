"""Surgery: passes that return a smaller program and leave the one that came in as it was."""

from graphprune.passes.surgery.clean_up import CleanUp
from graphprune.passes.surgery.remove_channels import RemoveChannels
from graphprune.passes.surgery.remove_zeros import RemoveZeros

__all__ = ["CleanUp", "RemoveChannels", "RemoveZeros"]
