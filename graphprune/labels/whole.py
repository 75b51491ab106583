"""Labels of a model that no tracer captures: the model itself runs, and every tensor has a labelled twin.

    operator(real tensors) ------> real result                 what the model's own code branches on
         rule(trace, twins) -----> twin: a meta tensor with labels

The model runs on its example inputs, with all the control flow that it has in Python; the same rules as everywhere
else see the same operators, but on the twins. Where the size of a result depends on values (``nonzero``, non-maximum
suppression) no rule applies: what reaches the operator is pinned, and its result carries no label.

Operators are told apart by the module whose ``forward`` called them, their name, and how many of that name it has
called before. So the proof finds them again in a run on other values, whose control flow may differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from graphprune.errors import AnalysisError, GraphpruneError
from graphprune.labels.propagate import info_of, settled, without_view_tracking
from graphprune.labels.rules import find_rule
from graphprune.labels.trace import NO_RULE, Call, ModuleCall, Trace
from graphprune.program import Program, WholeModel

__all__ = ["ALL_OPERATORS", "NUMBERS", "OWN_OPERATORS", "Frames", "run_whole", "watched"]

NUMBERS = "the model's own code holds a size here as a number, which no cut can change"
SOMEWHERE = "a trial cut failed in this module, where the analysis cannot follow it"
OWN_OPERATORS = "*"
"""In place of an operator's name in `Program.fixed`: all that a module's own ``forward`` calls."""
ALL_OPERATORS = "**"
"""The same, and all that the modules inside call."""


class Frames(Protocol):
    """What follows the calls of modules."""

    def enter(self, path: str) -> None:
        """A module starts."""

    def leave(self, path: str, args: tuple[Any, ...], output: Any) -> None:
        """A module returns."""


@contextmanager
def watched(model: nn.Module, frames: Frames) -> Iterator[None]:
    """Within the context, `frames` hears of every call of a module in `model`; the model itself is called ``""``."""
    handles: list[Any] = []
    for path, module in model.named_modules():

        def before(module: nn.Module, args: Any, path: str = path) -> None:
            frames.enter(path)

        def after(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            frames.leave(path, args, output)

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Stack:
    """The modules whose ``forward`` is at work, and which operators each has called."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.frames: list[tuple[str, str, Counter[str]]] = []

    def push(self, path: str) -> str:
        """Start a call of a module; return its key."""
        self.calls[path] += 1
        count = self.calls[path]
        key = path if count == 1 else f"{path}@{count}"
        self.frames.append((path, key, Counter()))
        return key

    def pop(self) -> tuple[str, str]:
        """End the innermost call; return its path and key."""
        path, key, _ = self.frames.pop()
        return path, key

    @property
    def path(self) -> str:
        """The innermost module."""
        return self.frames[-1][0] if self.frames else ""

    @property
    def key(self) -> str:
        """The innermost call."""
        return self.frames[-1][1] if self.frames else ""

    def count(self, name: str) -> int:
        """Count an operator; return how many of its name the innermost call has made before."""
        if not self.frames:
            return 0
        seen = self.frames[-1][2]
        seen[name] += 1
        return seen[name] - 1


def run_whole(program: Program, trace: Trace, values: dict[str, Any]) -> tuple[ModuleCall, ...]:
    """Run a program of the dialect ``module`` on its example inputs, and label it.

    Args:
        program: What to run.
        trace: Where facts go.
        values: What the nodes of the program's graph produced goes here.

    Returns:
        Every call of a module.

    Raises:
        AnalysisError: The model does not run on its example inputs.
    """
    model = program.module.get_submodule(WholeModel.CHILD)
    mode = _TwinMode(trace, program)
    inputs = [t.clone() for t in program.example_inputs]
    for tensor in inputs:
        if tensor.is_floating_point():
            mode.twins[tensor] = torch.empty_like(tensor, device="meta")
    try:
        with torch.inference_mode(), without_view_tracking(), without_fast_path(), mode:
            with watched(model, mode):
                outputs = model(*inputs)
    except GraphpruneError:
        raise
    # Whatever the model's own code raises on these inputs is what the user needs to read.
    except Exception as error:
        raise AnalysisError(
            f"{program.source} failed on its example inputs, in module {mode.stack.path or '(top)'}: "
            f"{type(error).__name__}: {error}"
        ) from error
    trace.node = "output"
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            trace.freeze(mode.twin(leaf), "model output")
    feed = iter(inputs)
    for node in program.module.graph.nodes:
        value = next(feed) if node.op == "placeholder" else outputs
        values[node.name] = mode.info(value)
    return tuple(
        ModuleCall(path, key, settled(before), settled(after))
        for path, key, before, after in mode.calls
    )


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Let attention modules run operator by operator."""
    previous = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(previous)


class _TwinMode(TorchDispatchMode):
    """Runs every operator, and its rule beside it."""

    def __init__(self, trace: Trace, program: Program) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self.fixed = program.fixed
        self.stack = Stack()
        self.twins: Any = WeakIdKeyDictionary()
        self.calls: list[tuple[str, str, Any, Any]] = []

    # -- frames ---------------------------------------------------------------------------------------------------

    def enter(self, path: str) -> None:
        """A module starts."""
        self.trace.node = self.stack.push(path)

    def leave(self, path: str, args: tuple[Any, ...], output: Any) -> None:
        """A module returns."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        before = None if first is None else self.info(first)
        path, key = self.stack.pop()
        if (path, "", 0) in self.fixed:
            for leaf in tree_leaves((args, output)):
                if isinstance(leaf, Tensor):
                    self.trace.freeze(self.twin(leaf), NUMBERS)
        self.calls.append((path, key, before, self.info(output)))
        self.trace.node = self.stack.key

    def twin(self, tensor: Tensor) -> Tensor:
        """Return the labelled twin of a tensor: itself for parameters, and for what has known values."""
        found = self.twins.get(tensor)
        return tensor if found is None else found

    def info(self, value: Any) -> Any:
        """Describe a value by shapes and labels."""
        plain = tree_map(lambda v: self.twin(v) if isinstance(v, Tensor) else None, value)
        described = info_of(self.trace, plain)
        return described if not isinstance(described, torch.Size) else None

    # -- operators ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        rule = find_rule(func)
        if rule is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = func._schema.name
        occurrence = self.stack.count(name)
        tensors = Call(func, args, kwargs).tensors()
        if tensors and not any(self._is_labelled(t) for t in tensors):
            return func(*args, **kwargs)
        given = tree_map(self._stand_in, (_with_places(func, args), kwargs))
        call = Call(func, given[0], given[1], occurrence)
        if (self.stack.path, name, occurrence) in self.fixed:
            self._freeze(call, NUMBERS)
        elif self._is_around_a_failure():
            self._freeze(call, SOMEWHERE)
        result = func(*args, **kwargs)
        if rule is None:
            self._without_rule(call, name, result)
            return result
        terms = len(self.trace.terms)
        try:
            described = rule(self.trace, call)
            self._attach(result, described, call)
        except (RuntimeError, NotImplementedError, ValueError, IndexError, TypeError):
            # The result's size depends on values, or the rule knows no such form of the operator.
            del self.trace.terms[terms:]
            self._freeze(
                call,
                f"operator {name} depends on values here, or is used in a form that its rule does not know",
            )
            self._attach_plain(result)
        return result

    def _is_around_a_failure(self) -> bool:
        if (self.stack.path, OWN_OPERATORS, 0) in self.fixed:
            return True
        return any((path, ALL_OPERATORS, 0) in self.fixed for path, *_ in self.stack.frames)

    def _is_labelled(self, tensor: Tensor) -> bool:
        return tensor in self.twins or self.trace.source(tensor) is not None

    def _stand_in(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return self.twin(value)

    def _freeze(self, call: Call, why: str) -> None:
        for tensor in call.tensors():
            self.trace.freeze(tensor, why)

    def _without_rule(self, call: Call, name: str, result: Any) -> None:
        if any(self.trace.fields(t) for t in call.tensors()):
            self.trace.unknown.setdefault(name, []).append(self.trace.node)
            self._freeze(call, NO_RULE.format(name))
        self._attach_plain(result)

    def _attach(self, result: Any, described: Any, call: Call) -> None:
        """Give the real results the twins that the rule made."""
        real = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        twins = [t for t in tree_leaves(described) if isinstance(t, Tensor)]
        if [t.shape for t in real] != [t.shape for t in twins]:
            raise ValueError("the rule describes results of other sizes")
        for tensor, twin in zip(real, twins, strict=True):
            if twin is tensor:
                continue
            is_known = not tensor.is_floating_point() and not self.trace.fields(twin)
            if is_known:
                self.twins.pop(tensor, None)  # its values say more than its labels
            elif self.trace.source(tensor) is None or not self.trace.source(tensor).name:  # type: ignore[union-attr]
                self.twins[tensor] = twin

    def _attach_plain(self, result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                if self.trace.source(tensor) is None:
                    twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                    self.twins[tensor] = self.trace.label(twin, ())


def _with_places(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of an indexing operator with masks written as the places where they hold."""
    if func._schema.name not in ("aten::index", "aten::index_put", "aten::index_put_"):
        return args
    indices: list[Any] = []
    for index in args[1]:
        if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
            indices += index.nonzero(as_tuple=True)
        else:
            indices.append(index)
    return (args[0], indices, *args[2:])
