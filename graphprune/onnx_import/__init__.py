"""ONNX in: a model file becomes a torch.fx graph that the rest of graphprune takes like any other.

file.py      the file: read, checked, functions written out; its inputs, and which of their sizes are free
builder.py   the walk over the graph: every ONNX value becomes a graph node, a known tensor, or a vector of sizes
operators/   one function per ONNX operator, in families; `@operator("Name")`

Sizes that the file computes (Shape, Gather, Concat, Reshape) are followed for two batch sizes: what is the same in
both is a literal of the new graph, as a tracer would have left it, and only what follows the batch stays a node. So
the literals of a cut are rewritten as in every other program. Initializers keep their names and layouts, so that a
plan can be checked against the file.
"""

from graphprune.onnx_import.builder import build_graph, rows_of_inputs
from graphprune.onnx_import.file import OnnxModel, example_inputs, read_onnx
from graphprune.onnx_import.operators import known_operators, operator

__all__ = [
    "OnnxModel",
    "build_graph",
    "example_inputs",
    "known_operators",
    "operator",
    "read_onnx",
    "rows_of_inputs",
]
