"""Labels: which elements of which tensors are the same channel.

atoms.py      what is known about atoms: the same channel, pinned, part of a block, nested
field.py      the label of one tensor, and how labels meet
trace.py      the state of a labelled run, and the verbs that rules use
propagate.py  runs the graph on labels
rules/        what each ATen operator does to labels, one file per family
"""

from graphprune.labels.atoms import AtomTable
from graphprune.labels.field import Field
from graphprune.labels.propagate import propagate
from graphprune.labels.trace import Labels, TensorInfo

__all__ = ["AtomTable", "Field", "Labels", "TensorInfo", "propagate"]
