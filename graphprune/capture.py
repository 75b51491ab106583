"""Capture: a module, a file or a name becomes a Program.

Two tracers stand behind one door. ``torch.fx.symbolic_trace`` comes first: it is fast and keeps modules and a dynamic
batch. A graph that calls an opaque Python function, or that computes other shapes than the model does, is not used;
then, as where Python control flow defeats symbolic tracing, ``torch.export`` takes over.

A Program shares parameters and buffers with the module that it was captured from, so that capture costs no copies;
surgery always copies. It shares no module object: the caller may go on training, switching modes or changing
attributes.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from graphprune import onnx_import
from graphprune.calling import Calling, calling_of
from graphprune.errors import AnalysisError, CaptureError, InputError, LoadError
from graphprune.inputs import infer_inputs
from graphprune.labels.propagate import BATCH, propagate
from graphprune.labels.trace import tensor_infos
from graphprune.load import ScriptedModel, is_onnx, load_model, load_weights
from graphprune.lowering import copies, exported, sized, symbolic
from graphprune.lowering.sized import may_vary, resize
from graphprune.program import Program
from graphprune.uncaptured import capture_whole

__all__ = ["capture", "capture_graph", "evaluation_mode"]

_PROBE_BATCH = 3
"""Another batch size than the example's, at which graph and model must agree."""
_INPUT_HINT = "give one with --input 1x3x224x224 (or example_inputs=torch.randn(1, 3, 224, 224))"


def capture(
    model: nn.Module | ExportedProgram | str,
    example_inputs: Tensor | Sequence[Tensor] | Mapping[str, Any] | None = None,
    *,
    outputs: Sequence[str] = (),
    weights: str | Path | None = None,
    trust: Sequence[str] = (),
    trust_all: bool = False,
    source: str | None = None,
) -> Program:
    """Turn a model into a Program, in evaluation mode.

    Args:
        model: A module, an exported program, or a MODEL text: a file (``.onnx`` among them), ``torchvision:NAME``,
            ``timm:NAME`` or ``package.module:factory``.
        example_inputs: One tensor, or one per positional input, or a mapping from parameter names to tensors (what is
            no tensor in it stays as it is); taken from the model where it states its own.
        outputs: Which outputs of the model count, by key or position; channels that only the others need may go. All of
            them unless given.
        weights: A state dict (``.safetensors`` or ``.pt``) to load first; a given module is copied before.
        trust: Classes that a pickled model may name besides those of torch, torchvision and timm.
        trust_all: Whether a pickled model may name any class.
        source: What to call the model; by default the text, or the name of the module's class.

    Returns:
        A program that shares tensors, but no module object, with `model`.

    Raises:
        LoadError: The file, name or weights cannot be loaded, or weights are not finite.
        InputError: There are no example inputs, or the model fails on them.
        CaptureError: Neither tracer can turn the model into a graph.
    """
    if isinstance(model, str) and is_onnx(model):
        if weights is not None:
            raise LoadError(f"{model} holds its weights: leave out --weights {weights}")
        if outputs or isinstance(example_inputs, Mapping):
            raise InputError(
                f"{model} is an ONNX file, whose inputs go by position and whose outputs all stay"
            )
        return _capture_onnx(model, example_inputs, source=source or model)
    if isinstance(model, str):
        source = source or model
        model = load_model(model, weights=weights, trust=trust, trust_all=trust_all)
    elif weights is not None:
        if isinstance(model, ExportedProgram):
            raise LoadError(
                f"weights {weights} were given for an ExportedProgram, which holds its own: leave them out"
            )
        model = load_weights(model, weights)
    if isinstance(model, torch.jit.ScriptModule):
        source, model = source or type(model).__name__, ScriptedModel(model)
    if isinstance(model, ExportedProgram):
        if outputs:
            raise InputError(f"outputs {tuple(outputs)} cannot be picked from an ExportedProgram")
        return _capture_exported(model, example_inputs, source=source or "ExportedProgram")
    source = source or type(model).__name__
    _check_finite(model, source)
    if example_inputs is None:
        example_inputs = infer_inputs(model)
    if not isinstance(example_inputs, Tensor) and not example_inputs:
        raise InputError(f"{source} does not state the shape of its input: {_INPUT_HINT}")
    calling, tensors = calling_of(model, example_inputs, outputs)
    with evaluation_mode(model):
        if not outputs and not isinstance(example_inputs, Mapping):
            listed = Calling(as_list=True)
            if _takes_list(model, listed, _as_tuple(tensors)):
                return _capture_listed(model, listed, _as_tuple(tensors), source)
        by_name = calling is not None and bool(calling.names)
        inputs = _as_inputs(model, tensors, source, by_name=by_name)
        bound = model if calling is None else calling.bind(model)
        program = _capture_module(bound, inputs, source, calling)
    if program.calling is calling:
        return program
    called = dataclasses.replace(program, calling=calling)
    called.memo.update(program.memo)
    return called


def capture_graph(model: nn.Module, inputs: tuple[Tensor, ...], *, source: str) -> Program:
    """Return `model` as a graph.

    Raises:
        InputError: The model fails on `inputs`.
        CaptureError: No tracer captures it.
    """
    reasons: list[str] = []
    with evaluation_mode(model):
        program = _traced(model, inputs, source, reasons)
        if program is not None:
            return program
        _check_accepts(model, inputs, source)
        return _export_module(model, inputs, source, reasons)


def _takes_list(model: nn.Module, calling: Calling, inputs: tuple[Tensor, ...]) -> bool:
    """Say whether a model takes its tensors as one list, as detectors take images, and not one by one.

    Only what says so by the name of its first parameter is asked, by running it.
    """
    names = list(inspect.signature(model.forward).parameters)
    if not names or names[0] not in _LIST_NAMES or any(t.dim() > 3 for t in inputs):
        return False
    return _runs(calling.bind(model), inputs)


_LIST_NAMES = ("images", "inputs", "xs", "tensors", "image_list", "batched_inputs")


def _runs(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    try:
        with torch.no_grad():
            model(*inputs)
    # The model's own code: any failure means that it cannot be called like this.
    except Exception:
        return False
    return True


def _capture_listed(
    model: nn.Module, calling: Calling, inputs: tuple[Tensor, ...], source: str
) -> Program:
    """Capture a model that takes its tensors as one list."""
    bound = calling.bind(model)
    reasons: list[str] = []
    program = _traced(bound, inputs, source, reasons)
    if program is not None:
        return dataclasses.replace(program, calling=calling)
    reasons.append("torch.export: not tried on a model that takes a list of tensors")
    return capture_whole(bound, inputs, source, reasons, calling=calling)


def _capture_module(
    model: nn.Module, inputs: tuple[Tensor, ...], source: str, calling: Calling | None = None
) -> Program:
    reasons: list[str] = []
    program = _traced(model, inputs, source, reasons)
    if program is not None:
        return program
    if not _is_meta(model):
        _check_accepts(model, inputs, source)
    try:
        return _export_module(model, inputs, source, reasons)
    except CaptureError:
        if isinstance(model, ScriptedModel) or _is_meta(model):
            raise
    return capture_whole(model, inputs, source, reasons, calling=calling)


def _traced(
    model: nn.Module, inputs: tuple[Tensor, ...], source: str, reasons: list[str]
) -> Program | None:
    """Return the graph of the first tracer that follows the model; `reasons` takes those of the others."""
    for name, tracer in _TRACERS.items():
        try:
            module = tracer(model, inputs)
        # The model's own code ran on symbolic values: it may raise anything, and the next tracer is the answer.
        except Exception as error:
            reasons.append(f"{name}: {type(error).__name__}: {_first_line(error)}")
            continue
        # A symbolic graph is the model's own computation, or the trace failed; a sized one may have followed a branch.
        if name == "torch.fx" and may_vary(inputs):
            program = _dynamic_program(module, inputs, source)
            if program is not None:
                return program
        agreed = _agrees(model, module, inputs)
        if agreed is not None:
            return Program(
                module=module,
                example_inputs=inputs,
                dialect=_dialect(module),
                dynamic_batch=agreed,
                source=source,
            )
        reasons.append(f"{name}: the graph does not compute the shapes that the model computes")
    return None


def _is_meta(model: nn.Module) -> bool:
    """Say whether the model has shapes only, so that nothing can be computed with it."""
    return any(p.is_meta for p in model.parameters())


_TRACERS: dict[str, Callable[[nn.Module, tuple[Tensor, ...]], fx.GraphModule]] = {
    "torch.fx": lambda model, inputs: symbolic.trace(model, num_inputs=len(inputs)),
    "torch.fx with known sizes": lambda model, inputs: sized.trace(
        model, inputs, dynamic=may_vary(inputs)
    ),
}
"""The tracers that keep modules, in the order in which they are tried; `torch.export` comes after them."""


def _export_module(
    model: nn.Module, inputs: tuple[Tensor, ...], source: str, reasons: list[str]
) -> Program:
    given = tuple(t.to("meta") for t in inputs) if _is_meta(model) else inputs
    for dynamic in (True, False) if may_vary(inputs) else (False,):
        example = tuple(resize(t, max(2, t.shape[0])) for t in given) if dynamic else given
        try:
            program = exported.export(copies.copy_structure(model), example, dynamic=dynamic)
        # torch.export documents no common error class; each failure is reported below.
        except Exception as error:
            reasons.append(
                f"torch.export ({'dynamic' if dynamic else 'fixed'} batch): {_first_line(error)}"
            )
            continue
        prefix = "script." if isinstance(model, ScriptedModel) else ""
        module = exported.flatten_program(program, class_name=type(model).__name__, prefix=prefix)
        return Program(
            module=module,
            example_inputs=inputs,
            dialect="export",
            dynamic_batch=dynamic,
            source=source,
        )
    raise CaptureError(f"{source} cannot be captured as a graph:\n  " + "\n  ".join(reasons))


def _capture_exported(program: ExportedProgram, example_inputs: Any, *, source: str) -> Program:
    if isinstance(example_inputs, Mapping):
        example_inputs = tuple(example_inputs.values())
    if example_inputs is None:
        if program.example_inputs is None or program.example_inputs[1]:
            raise InputError(f"{source} stores no positional example input: {_INPUT_HINT}")
        example_inputs = program.example_inputs[0]
    inputs = _as_tuple(example_inputs)
    module = exported.flatten_program(program, class_name="ExportedProgram")
    _check_finite(module, source)
    _check_accepts(module, inputs, source)
    dynamic = exported.has_dynamic_batch(program)
    return Program(
        module=module, example_inputs=inputs, dialect="export", dynamic_batch=dynamic, source=source
    )


def _capture_onnx(
    path: str, example_inputs: Tensor | Sequence[Tensor] | None, *, source: str
) -> Program:
    model = onnx_import.read_onnx(path)
    given = None if example_inputs is None else _as_tuple(example_inputs)
    inputs = onnx_import.example_inputs(model, given)
    module = onnx_import.build_graph(model, inputs)
    inputs = onnx_import.example_inputs(model, given, onnx_import.rows_of_inputs(module))
    _check_finite(module, source)
    if all(spec.is_batched for spec in model.inputs) and may_vary(inputs):
        program = _dynamic_program(module, inputs, source)
        if program is not None:
            return program
        # What follows the batch is a node of the graph, so it runs at the example's own size all the same.
    _check_accepts(module, inputs, source)
    return Program(
        module=module, example_inputs=inputs, dialect="fx", dynamic_batch=False, source=source
    )


def _dialect(module: fx.GraphModule) -> Any:
    calls = (n.target for n in module.graph.nodes if n.op == "call_function")
    return "export" if any(isinstance(t, torch._ops.OpOverload) for t in calls) else "fx"


def _as_tuple(inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    values = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    for position, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise InputError(
                f"example input {position} is a {type(value).__name__}, expected a tensor"
            )
    return tuple(v.detach() for v in values)


def _as_inputs(
    model: nn.Module, example_inputs: Tensor | Sequence[Tensor], source: str, *, by_name: bool
) -> tuple[Tensor, ...]:
    found = _as_tuple(example_inputs)
    if by_name:
        return found
    parameters = inspect.signature(model.forward).parameters.values()
    accepted = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    is_open = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    required = [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    if (len(found) > accepted and not is_open) or len(found) < len(required):
        wanted = f"{len(required)} ({', '.join(required)})" if required else f"at most {accepted}"
        raise InputError(
            f"{source} takes {wanted} inputs, found {len(found)} example inputs: repeat --input for each"
        )
    return found


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode and give each its own flag back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _check_finite(model: nn.Module, source: str) -> None:
    """Refuse parameters with NaN or infinity, and buffers with NaN (a mask may well hold infinities)."""
    parameters = [(n, p.detach()) for n, p in model.named_parameters()]
    buffers = list(model.named_buffers())
    bad = [n for n, t in _without_finite_sum(parameters) if not bool(torch.isfinite(t).all())]
    bad += [n for n, t in _without_finite_sum(buffers) if bool(torch.isnan(t).any())]
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise LoadError(
            f"{source} holds weights that are NaN or infinite: {shown}. Nothing can be proven about them"
        )


def _without_finite_sum(tensors: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Return the tensors that may hold what is not finite; a sum may also overflow, so they need a second look."""
    real = [(n, t) for n, t in tensors if t.is_floating_point() and not t.is_meta]
    sums = [t.sum() for _, t in real]
    return [pair for pair, s in zip(real, sums, strict=True) if not math.isfinite(s.item())]


def _agrees(model: nn.Module, module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> bool | None:
    """Compare the output shapes of model and graph.

    Returns:
        True where they agree at another batch size than the example's, False where only at the example's own,
        None where the graph does not agree with the model.
    """
    sizes = [_PROBE_BATCH + int(inputs[0].shape[0] == _PROBE_BATCH)] if may_vary(inputs) else []
    for batch in [*sizes, None]:
        expected = _shapes(model, inputs, batch)
        if expected is None:
            continue
        found = _shapes(module, inputs, batch)
        is_dynamic = batch is not None and all(s[:1] == (batch,) for s in expected)
        if found == expected and (is_dynamic or batch is None):
            return is_dynamic
        if found != expected:
            return None
    return None


def _dynamic_program(
    module: fx.GraphModule, inputs: tuple[Tensor, ...], source: str
) -> Program | None:
    """Return the program where the graph runs on labels at another batch size and its outputs follow."""
    program = Program(
        module=module,
        example_inputs=inputs,
        dialect=_dialect(module),
        dynamic_batch=True,
        source=source,
    )
    # The batch of the analysis, so that it need not run again; it must not be the example's own.
    batch = BATCH if inputs[0].shape[0] != BATCH else _PROBE_BATCH
    try:
        values = propagate(program, batch=batch).values
    except AnalysisError:
        return None
    outputs = tensor_infos(list(values.values())[-1])
    return program if all(info.shape[:1] == (batch,) for info in outputs) else None


def _shapes(
    module: nn.Module, inputs: tuple[Tensor, ...], batch: int | None
) -> list[tuple[int, ...]] | None:
    """Return the shapes of the outputs at another batch size, or None where the module fails there.

    Meta tensors are tried first, since they cost no arithmetic; code that mixes in tensors of its own needs real ones.
    """

    def attempt(device: str | None) -> list[tuple[int, ...]]:
        run = module if device is None else copies.meta_copy(module, {})
        args = tuple(t if device is None else torch.empty_like(t, device=device) for t in inputs)
        if batch is not None:
            args = tuple(resize(t, batch) for t in args)
        with torch.no_grad(), nullcontext() if device is None else symbolic.ShapesOnly():
            outputs = run(*args)
        return [tuple(t.shape) for t in symbolic.tensors_of(outputs)]

    for device in ("meta", None):
        try:
            return attempt(device)
        # The model's own code: any failure means that this way of running it gives no answer.
        except Exception:
            continue
    return None


def _check_accepts(model: nn.Module, inputs: tuple[Tensor, ...], source: str) -> None:
    """Run the model on its example inputs.

    Raises:
        InputError: The run fails; names the module that failed and the shapes that reached it.
    """
    names = {module: name for name, module in model.named_modules()}
    stack: list[tuple[str, str, str]] = []

    def enter(module: nn.Module, args: Any) -> None:
        shapes = ", ".join("x".join(map(str, t.shape)) for t in symbolic.tensors_of(args))
        stack.append((names.get(module, "?"), type(module).__name__, shapes))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    handles: list[Any] = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave),
    ]
    run: Callable[..., Any] = model
    try:
        with torch.no_grad():
            run(*inputs)
    # Whatever the model's own code raises on these inputs is what the user needs to read.
    except Exception as error:
        given = ", ".join("x".join(map(str, t.shape)) for t in inputs)
        name, kind, shapes = stack[-1] if stack else ("", type(model).__name__, given)
        where = f"module {name} ({kind})" if name else f"the model itself ({kind})"
        raise InputError(
            f"{source} does not accept example inputs of shape {given}: {where} failed on {shapes}: "
            f"{_described(error)}. If shape or type is wrong, give others with --input 1x3x224x224 or 1x16:int64"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _described(error: Exception) -> str:
    """Return kind and message of an error, and the place in the user's own code, where there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = Path(__file__).parent
    own = [
        f
        for f in frames
        if "site-packages" not in f.filename and ours not in Path(f.filename).parents
    ]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {_first_line(error)}{place}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
