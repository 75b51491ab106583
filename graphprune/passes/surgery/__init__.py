"""Surgery: passes that return a smaller program and leave the one that came in as it was."""

from graphprune.passes.surgery.clean_up import CleanUp
from graphprune.passes.surgery.remove_channels import RemoveChannels

__all__ = ["CleanUp", "RemoveChannels"]
