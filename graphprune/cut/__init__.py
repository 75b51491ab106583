"""Cutting: take a program and a choice of channels, return the smaller program.

slicer.py      keep the chosen indices of every parameter and buffer: one function for all
attributes.py  what a module remembers of its sizes (out_channels, num_features, normalized_shape, ...)
literals.py    what a graph node holds as a size (view, split, slice, pad, ...)
numbers.py     sizes that the graph computes while it runs

Labels already know what each tensor of the cut program looks like; these tables only write it down where a module or a
node says it in numbers.
"""

from graphprune.cut.slicer import Cut, cut_program

__all__ = ["Cut", "cut_program"]
