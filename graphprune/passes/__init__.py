"""One pass per file, by kind; `graphprune.registry` finds them by name.

analysis      what is there: facts, the program stays as it was
importance    what each channel is worth: the methods of the command line
training      other values, the same graph
surgery       a smaller program, proven exact by the driver
export        files, read back and compared
"""

from __future__ import annotations

from graphprune.passes import analysis, export, importance, surgery, training

__all__ = ["analysis", "export", "importance", "surgery", "training"]
