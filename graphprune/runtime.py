"""ONNX Runtime: sessions on the best provider that really loads, parity with torch, latency side by side."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from graphprune.check import Check
from graphprune.errors import ExportError, InputError, UsageError
from graphprune.exported import first_line, flat_outputs, without_fast_path
from graphprune.program import Program

__all__ = ["Latency", "Session", "bench", "open_session", "parity", "providers", "random_inputs"]

# Parity: ONNX Runtime fuses batch norms into convolutions and adds in another order than torch, so a float32 result
# differs by rounding: 5e-7 to 1e-6 of the largest output, measured on ResNet-18 and -56, MobileNet v3 and LR-ASPP. The
# factor of a hundred above is for deeper models. Half precision is limited by its own 2^-11 and 2^-8. The figures are
# relative to the largest output, however small it is: an absolute floor would pass anything from a faint model.
PARITY_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 8e-2,
}
PARITY_BATCHES = (1, 2, 5)

_FATAL = 4  # ONNX Runtime severities: 0 verbose, 1 info, 2 warning, 3 error, 4 fatal
_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(uint8)": torch.uint8,
    "tensor(int8)": torch.int8,
    "tensor(bool)": torch.bool,
}


@dataclass(frozen=True, kw_only=True)
class Session:
    """An ONNX file loaded into ONNX Runtime."""

    path: Path
    """The file."""
    provider: str
    """The execution provider that computes, by ONNX Runtime's name."""
    provider_note: str
    """One line: which provider is used, and why no other."""
    input_names: tuple[str, ...]
    input_shapes: tuple[tuple[int | None, ...], ...]
    """Shape of each input; None where any size goes."""
    input_dtypes: tuple[torch.dtype, ...]
    output_names: tuple[str, ...]
    ort_session: ort.InferenceSession

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the graph's outputs, on the CPU, for inputs given in the graph's order.

        Raises:
            InputError: The number, shape or kind of the inputs is not what the file takes.
        """
        if len(inputs) != len(self.input_names):
            raise InputError(
                f"{self.path.name} takes {len(self.input_names)} inputs, found {len(inputs)}"
            )
        outputs = self._run(self._feeds(inputs))
        return tuple(torch.from_numpy(np.asarray(output)) for output in outputs)

    def _feeds(self, inputs: Sequence[Tensor]) -> dict[str, np.ndarray[Any, Any]]:
        arrays = (tensor.detach().cpu().contiguous().numpy() for tensor in inputs)
        return dict(zip(self.input_names, arrays, strict=True))

    def _run(self, feeds: dict[str, np.ndarray[Any, Any]]) -> list[Any]:
        try:
            return list(self.ort_session.run(None, feeds))
        except _ort_errors() as error:
            shapes = {name: list(array.shape) for name, array in feeds.items()}
            raise InputError(
                f"{self.path.name} takes {dict(zip(self.input_names, self.input_shapes, strict=True))}, "
                f"found {shapes}: {first_line(error)}"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long one run of a file takes."""

    path: Path
    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int
    provider: str

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "path": str(self.path),
            "median_ms": self.median_ms,
            "p10_ms": self.p10_ms,
            "p90_ms": self.p90_ms,
            "runs": self.runs,
            "provider": self.provider,
        }


def providers() -> tuple[str, ...]:
    """Return the execution providers that ONNX Runtime was built with; a listed one may still fail to load."""
    return tuple(ort.get_available_providers())


def open_session(path: str | Path, device: str = "auto") -> Session:
    """Load an ONNX file on CUDA when that provider loads, else on the CPU.

    Args:
        path: The file.
        device: ``auto``, ``cpu``, or ``cuda`` (an error where CUDA does not load); ``cuda:N`` and ``auto:N`` pick
            a GPU.

    Raises:
        ExportError: The file is missing or ONNX Runtime cannot load it, or `device` is CUDA and CUDA does not load.
        UsageError: `device` is none of these.
    """
    path = Path(path)
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
        raise UsageError(f"expected device auto, cpu, cuda or cuda:N, found {device!r}")
    if not path.is_file():
        raise ExportError(f"expected an ONNX file, found nothing at {str(path)!r}")
    why_not = _why_no_cuda()
    if not why_not:
        why_not = "the CPU was asked for"
        if kind != "cpu":
            # TF32 keeps 10 bits of the mantissa: with it no GPU result could be held to the parity tolerance.
            options = {"device_id": index or "0", "use_tf32": "0"}
            try:
                loaded = _load(path, [("CUDAExecutionProvider", options), "CPUExecutionProvider"])
            except _ort_errors() as error:
                why_not = f"the CUDA provider failed to load: {first_line(error)}"
            else:
                if "CUDAExecutionProvider" in loaded.get_providers():
                    return _session(path, loaded, "CUDAExecutionProvider", "CUDA provider in use")
                why_not = "the CUDA provider is listed but failed to load"
    if kind == "cuda":
        raise ExportError(
            f"device {device!r} was asked for, but {why_not}; use --device auto or cpu"
        )
    try:
        loaded = _load(path, ["CPUExecutionProvider"])
    except _ort_errors() as error:
        raise ExportError(f"ONNX Runtime cannot load {str(path)!r}: {first_line(error)}") from error
    return _session(path, loaded, "CPUExecutionProvider", f"CPU provider in use: {why_not}")


def random_inputs(session: Session, *, batch: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
    """Return inputs of the shapes that a session takes: standard normal, zeros for integers; free sizes are `batch`."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for shape, dtype in zip(session.input_shapes, session.input_dtypes, strict=True):
        sizes = [batch if size is None else size for size in shape]
        if dtype.is_floating_point:
            inputs.append(torch.randn(sizes, generator=generator).to(dtype))
        else:
            inputs.append(torch.zeros(sizes, dtype=dtype))
    return tuple(inputs)


def parity(
    program: Program, session: Session, *, batches: Sequence[int] = PARITY_BATCHES, seed: int = 0
) -> Check:
    """Compare a program in torch with its file in ONNX Runtime, on several batches of random inputs.

    Passes when every output has torch's shape, everything is finite, the outputs are not all one constant (two dead
    models agree on anything), and the largest difference is within the tolerance of the program's output type, times
    the largest torch output.

    Args:
        program: The reference; a program with a fixed batch is run on its own batch, with as many different inputs.
        session: The file.
        batches: Batch sizes.
        seed: Seed of the first batch's inputs; each next batch takes the next seed.
    """
    worst, scale, relative = 0.0, 0.0, 0.0
    problems: list[str] = []
    low, high = math.inf, -math.inf
    for index, size in enumerate(batches):
        inputs = program.batch(size, seed=seed + index)
        with torch.no_grad(), without_fast_path():
            expected = flat_outputs(program.module(*inputs))
        found = session.run(*inputs)
        shapes = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in found]
        if shapes[0] != shapes[1]:
            detail = f"batch {size}: torch gives shapes {shapes[0]}, ONNX Runtime {shapes[1]}"
            return _parity_check(session, None, max(PARITY_TOLERANCE.values()), [detail])
        for name, want, got in zip(session.output_names, expected, found, strict=True):
            relative = max(relative, PARITY_TOLERANCE.get(want.dtype, 0.0))
            want64, got64 = want.detach().double().cpu(), got.double()
            if not want64.isfinite().all() or not got64.isfinite().all():
                side = "torch" if not want64.isfinite().all() else "ONNX Runtime"
                problems.append(f"batch {size}: output {name} of {side} is not finite")
                worst = math.inf
            elif want64.numel():
                worst = max(worst, (want64 - got64).abs().max().item())
                scale = max(scale, want64.abs().max().item())
                low, high = min(low, want64.min().item()), max(high, want64.max().item())
    if low == high:
        problems.append(f"every output of torch is {low:g}: nothing was compared")
    if worst > relative * scale and not problems:
        problems.append(f"largest difference {worst:.3g} exceeds {relative * scale:.3g}")
    if not problems and program.dynamic_batch:
        return _parity_check(session, worst, relative * scale, [], f"batches of {_listed(batches)}")
    return _parity_check(
        session, worst, relative * scale, problems, f"{len(batches)} inputs of the fixed batch"
    )


def bench(
    paths: Sequence[str | Path],
    inputs: Sequence[Tensor],
    *,
    runs: int | None = None,
    warmup: int = 3,
    device: str = "auto",
    budget_s: float = 8.0,
) -> list[Latency]:
    """Time ONNX files on the same inputs, in turns (A B A B ...), so that a busy moment hits all of them.

    Args:
        paths: The files.
        inputs: One tensor per graph input.
        runs: Timed runs of each file; None takes as many as fit into `budget_s`, from 10 to 200.
        warmup: Untimed runs of each file before.
        device: As in `open_session`.
        budget_s: Seconds for all timed runs together where `runs` is None.
    """
    if runs is not None and runs < 1:
        raise UsageError(f"expected at least 1 run, found runs={runs}")
    sessions = [open_session(path, device) for path in paths]
    prepared = [(session, session._feeds(inputs)) for session in sessions]
    for _ in range(warmup):
        for session, feeds in prepared:
            session._run(feeds)
    if runs is None:
        start = time.perf_counter()
        for session, feeds in prepared:
            session._run(feeds)
        runs = min(200, max(10, int(budget_s / max(1e-6, time.perf_counter() - start))))
    times: list[list[float]] = [[] for _ in prepared]
    for _ in range(runs):
        for taken, (session, feeds) in zip(times, prepared, strict=True):
            start = time.perf_counter()
            session.ort_session.run(None, feeds)
            taken.append((time.perf_counter() - start) * 1e3)
    result = []
    for session, taken in zip(sessions, times, strict=True):
        p10, median, p90 = (float(q) for q in np.percentile(taken, (10, 50, 90)))
        result.append(
            Latency(
                path=session.path,
                median_ms=median,
                p10_ms=p10,
                p90_ms=p90,
                runs=runs,
                provider=session.provider,
            )
        )
    return result


def _parity_check(
    session: Session,
    worst: float | None,
    tolerance: float,
    problems: Iterable[str],
    compared: str = "",
) -> Check:
    detail = "; ".join(dict.fromkeys(problems))
    return Check(
        max_abs_err=worst,
        tolerance=tolerance,
        passed=not detail,
        detail=detail or compared,
        provider=session.provider,
    )


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def _load(path: Path, chosen: list[Any]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    # A provider that fails to load says so on stderr through the default logger, whatever the session's level is.
    ort.set_default_logger_severity(_FATAL)
    return ort.InferenceSession(str(path), sess_options=options, providers=chosen)


def _session(path: Path, loaded: ort.InferenceSession, provider: str, note: str) -> Session:
    inputs = loaded.get_inputs()
    unknown = sorted({i.type for i in inputs} - set(_TYPES))
    if unknown:
        raise ExportError(
            f"{path.name}: inputs of type {', '.join(unknown)} are not supported; "
            f"known: {', '.join(sorted(_TYPES))}"
        )
    return Session(
        path=path,
        provider=provider,
        provider_note=note,
        input_names=tuple(i.name for i in inputs),
        input_shapes=tuple(
            tuple(d if isinstance(d, int) else None for d in i.shape) for i in inputs
        ),
        input_dtypes=tuple(_TYPES[i.type] for i in inputs),
        output_names=tuple(o.name for o in loaded.get_outputs()),
        ort_session=loaded,
    )


@functools.cache
def _why_no_cuda() -> Literal[""] | str:
    """Return why the CUDA provider cannot be used, or nothing where it is worth a try."""
    if "CUDAExecutionProvider" not in providers():
        return "this ONNX Runtime was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    ort.preload_dlls()
    return ""


@functools.cache
def _ort_errors() -> tuple[type[Exception], ...]:
    """Return every class of error that ONNX Runtime raises: its own, and plain ones for inputs that do not fit."""
    state = ort.capi.onnxruntime_pybind11_state
    own = (
        value
        for value in vars(state).values()
        if isinstance(value, type) and issubclass(value, Exception)
    )
    return (*own, ValueError, RuntimeError)
