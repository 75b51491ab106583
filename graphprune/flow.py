"""Flow: where a graph uses its parameters, and which of its operators everything goes through."""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx

from graphprune.labels.trace import Labels, tensor_infos
from graphprune.program import Program

__all__ = ["first_users", "unavoidable_nodes", "unavoidable_parameters"]


def first_users(program: Program, parameters: Iterable[str]) -> dict[str, str]:
    """Return the name of the first node that computes with each of `parameters`; those that none uses are left out."""
    users: dict[str, str] = {}
    by_module: dict[str, list[str]] = {}
    for name in parameters:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    wanted = set(parameters)
    for node in program.module.graph.nodes:
        if node.op == "call_module":
            for name in by_module.get(str(node.target), ()):
                users.setdefault(name, node.name)
        elif node.op == "get_attr" and str(node.target) in wanted and node.users:
            users.setdefault(str(node.target), next(iter(node.users)).name)
    return users


def unavoidable_nodes(program: Program, labels: Labels) -> frozenset[str]:
    """Return the names of nodes that every path of tensors from some input to the output goes through.

    They are the dominators of the output, with one input after the other as the root. A layer with a shortcut or a
    branch beside it is none of them. Sizes that are read off one tensor and given to another operator are no path.
    """
    graph = program.module.graph
    flow: nx.DiGraph[str] = nx.DiGraph()
    (output,) = graph.find_nodes(op="output")
    for node in graph.nodes:
        if node is output or tensor_infos(labels.values.get(node.name)):
            flow.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    found: set[str] = set()
    for start in graph.find_nodes(op="placeholder"):
        above = nx.immediate_dominators(flow, start.name) if start.name in flow else {}
        name = output.name
        while name in above and name != start.name:
            found.add(name)
            name = above[name]
    return frozenset(found - {output.name})


def unavoidable_parameters(
    program: Program, labels: Labels, parameters: Iterable[str]
) -> frozenset[str]:
    """Return those of `parameters` whose first user is one of `unavoidable_nodes`."""
    users, through = first_users(program, set(parameters)), unavoidable_nodes(program, labels)
    return frozenset(name for name, user in users.items() if user in through)
