"""The proof for a model that runs whole: the masked original and the cut model side by side, module by module.

Each runs in a thread of its own, on the same inputs, with its own control flow. At every call of a module that
returns, the two meet, and what the original returned, restricted to what is kept, must equal what the cut model
returned. At the end the outputs are compared as they are, whatever containers they stand in. So nothing has to be kept
in memory but one result of each.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from graphprune.labels.trace import Consumer, ModuleCall, tensor_infos
from graphprune.labels.whole import Stack, watched, without_fast_path
from graphprune.program import Program, WholeModel
from graphprune.verify import Differs, relative, restrict
from graphprune.verify_masked import Masked, MaskMode, Promote

__all__ = ["Site", "Stumble", "compare_whole"]

Site = tuple[str, str, int]
"""A module, the name of an operator that it calls (empty: the module itself), and how many of that name come before."""


class Stumble(Differs):
    """The cut model fails, or differs, at a place that the analysis knows."""

    def __init__(self, message: str, site: Site, difference: float | None = None) -> None:
        super().__init__(message, difference)
        self.site = site


def compare_whole(
    before: Program,
    after: Program,
    inputs: tuple[Tensor, ...],
    reference: Masked,
    tolerance: float,
) -> float:
    """Run both and return the largest relative difference.

    Raises:
        Differs: They do not compute the same; a `Stumble` where it shows at an operator or module.
    """
    dtype = inputs[0].dtype if inputs[0].is_floating_point() else torch.get_default_dtype()
    meeting = _Meeting(reference, tolerance)
    masked = _MaskedFrames(dtype, reference)
    thread = threading.Thread(
        target=_run_masked, args=(before, inputs, masked, meeting), daemon=True
    )
    thread.start()
    frames = _CutFrames(dtype, meeting)
    model = after.module.get_submodule(WholeModel.CHILD)
    done = False
    try:
        with torch.inference_mode(), without_fast_path(), frames, watched(model, frames):
            outputs = model(*(t.clone() for t in inputs))
        done = True
    except Differs:
        raise
    # The model's own code fails on the sizes of the cut: that is what the comparison is for.
    except Exception as error:
        raise Stumble(
            f"the cut model does not run: {type(error).__name__} in module {frames.stack.path or '(top)'}: "
            f"{str(error).splitlines()[0] if str(error) else ''}",
            frames.site(),
        ) from error
    finally:
        if not done:
            meeting.close()
        thread.join()
    if masked.error is not None:
        raise Differs(f"the masked model does not run: {masked.error}") from masked.error
    try:
        return max(meeting.worst, _outputs(masked.outputs, outputs, tolerance))
    except Differs as error:
        raise Stumble(str(error), ("", "", 0), error.difference) from error


def _run_masked(
    program: Program, inputs: tuple[Tensor, ...], frames: _MaskedFrames, meeting: _Meeting
) -> None:
    model = program.module.get_submodule(WholeModel.CHILD)
    frames.meeting = meeting
    try:
        with torch.inference_mode(), frames, watched(model, frames):
            frames.outputs = model(*(t.clone() for t in inputs))
    except _Closed:
        pass
    # It is told to the thread that waits.
    except Exception as error:
        frames.error = error
    finally:
        meeting.end()


class _Closed(Exception):
    """The other side has stopped."""


class _Meeting:
    """Where the two runs hand over, one call of a module at a time."""

    def __init__(self, reference: Masked, tolerance: float) -> None:
        self.atoms = reference.atoms
        self.tolerance = tolerance
        self.worst = 0.0
        self.calls: dict[str, ModuleCall] = {}
        for call in reference.groups.labels.calls:
            self.calls.setdefault(call.path, call)
            self.calls[call.key] = call
        self._queue: queue.Queue[tuple[str, Any] | None] = queue.Queue(maxsize=1)
        self._closed = False

    def offer(self, key: str, output: Any) -> None:
        """Hand over what the original returned, and wait until it has been taken."""
        while not self._closed:
            try:
                self._queue.put((key, output), timeout=0.05)
            except queue.Full:
                continue
            self._queue.join()
            break
        if self._closed:
            raise _Closed

    def end(self) -> None:
        """Say that the original has returned for good."""
        while not self._closed:
            try:
                self._queue.put(None, timeout=0.05)
            except queue.Full:
                continue
            return

    def close(self) -> None:
        """Let the original go, wherever it is."""
        self._closed = True
        while not self._queue.empty():
            self._queue.get_nowait()
            self._queue.task_done()

    def meet(self, path: str, key: str, output: Any, site: Site) -> None:
        """Compare with what the original returned from the same call."""
        other = self._queue.get()
        try:
            if other is None or other[0] != key:
                found = "has ended" if other is None else f"returns from {other[0] or '(top)'}"
                raise Stumble(
                    f"control flow differs: the cut model returns from module {key or '(top)'}, the masked one {found}",
                    site,
                )
            call = self.calls.get(key) or self.calls.get(path)
            if call is None:
                raise Stumble(f"module {path} ran in the proof, but not in the analysis", site)
            self._compare(call, other[1], output, site)
        finally:
            self._queue.task_done()

    def _compare(self, call: ModuleCall, old: Any, new: Any, site: Site) -> None:
        if not call.path:
            return  # the outputs, which are compared by name at the end
        name = f"module {call.key}"
        infos = tensor_infos(call.after)  # in the order in which `_tensors` finds tensors
        olds, news = _tensors(old), _tensors(new)
        if len(olds) != len(news):
            raise Stumble(f"{name} returns {len(news)} tensors, expected {len(olds)}", site)
        known = len(infos) == len(olds)
        if not known and any(not self.atoms[f.atoms].all() for i in infos for f in i.fields):
            raise Differs(f"{name} returned {len(infos)} tensors in the analysis, {len(olds)} now")
        for position, (a, b) in enumerate(zip(olds, news, strict=True)):
            kept = restrict(infos[position], a, self.atoms) if known else a
            if kept.shape != b.shape:
                raise Stumble(
                    f"{name} returns shape {tuple(b.shape)}, expected {tuple(kept.shape)}", site
                )
            difference = relative(kept, b)
            if not difference <= self.tolerance:
                raise Stumble(
                    f"{name} is the first that differs: by {difference:.3g} of its largest value, tolerance "
                    f"{self.tolerance:g}",
                    site,
                    difference,
                )
            self.worst = max(self.worst, difference)


class _MaskedFrames(MaskMode):
    """The original, with removed channels zero at their consumers."""

    meeting: _Meeting

    def __init__(self, dtype: torch.dtype, reference: Masked) -> None:
        super().__init__(dtype, reference)
        self.stack = Stack()
        self.outputs: Any = None
        self.error: Exception | None = None
        self.several = {
            call.path for call in reference.groups.labels.calls if call.key != call.path
        }
        self.known = {call.key for call in reference.groups.labels.calls}

    def enter(self, node: str) -> None:
        """A module starts."""
        self.stack.push(node)

    def leave(self, path: str, args: tuple[Any, ...], output: Any) -> None:
        """A module returns."""
        _, key = self.stack.pop()
        self.meeting.offer(key, output)

    def consumers_of(self, name: str) -> list[Consumer] | None:
        """Count an operator; return where the removed channels are among its arguments."""
        occurrence = self.stack.count(name)
        # A call beyond those that the analysis saw has the labels of the first one.
        key = self.stack.key if self.stack.key in self.known else self.stack.path
        return self.consumers.get((key, name, occurrence))


class _CutFrames(Promote):
    """The cut model."""

    def __init__(self, dtype: torch.dtype, meeting: _Meeting) -> None:
        super().__init__(dtype)
        self.meeting = meeting
        self.stack = Stack()
        self.last: Site | None = None
        self.running: Site | None = None

    def enter(self, node: str) -> None:
        """A module starts."""
        self.stack.push(node)
        self.last = None

    def leave(self, path: str, args: tuple[Any, ...], output: Any) -> None:
        """A module returns."""
        site = (path, "", 0)
        path, key = self.stack.pop()
        self.meeting.meet(path, key, output, site)
        self.last = None

    def site(self) -> Site:
        """Return the operator at work, or the module whose own code is."""
        return self.running or (self.stack.path, "", 0)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = self.promoted(args, kwargs or {})
        if (result := self.taken_apart(func, args, kwargs)) is not NotImplemented:
            return result
        name = func._schema.name
        self.running = (self.stack.path, name, self.stack.count(name))
        result = func(*args, **kwargs)
        self.running = None
        return result


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _outputs(old: Any, new: Any, tolerance: float, where: str = "output") -> float:
    """Compare nested outputs; names in the message say where they differ."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        if old.shape != new.shape:
            raise Differs(f"{where} has shape {tuple(new.shape)}, expected {tuple(old.shape)}")
        difference = relative(old, new)
        if not difference <= tolerance:
            raise Differs(f"{where} differs by {difference:.3g} of its largest value", difference)
        return difference
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if list(old) != list(new):
            raise Differs(f"{where} has keys {list(new)}, expected {list(old)}")
        parts = [(old[k], new[k], f"{where}[{k!r}]") for k in old]
    elif isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)):
        if len(old) != len(new):
            raise Differs(f"{where} has {len(new)} entries, expected {len(old)}")
        parts = [(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return 0.0 if type(old) is type(new) else math.inf
    return max((_outputs(a, b, tolerance, name) for a, b, name in parts), default=0.0)
