"""What executes a frozen program: PyTorch as it is or compiled, OpenVINO, ONNX Runtime; the fastest that agrees.

On a CPU every worker thread runs whole batches by itself, each on its own share of the cores: two replicas of one thread
are faster than one of two threads, and decoding and computing fill the cores without a word between them. On a GPU the
workers decode and copy, and take turns at the device.
"""

import math
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featcache.backbones.base import Outputs, Pixels, TorchRuntime, as_tuple, to_array
from featcache.errors import SetupError, UsageError
from featcache.progress import logger
from featcache.resources import cores, keep_freed_memory
from featcache.specs import Precision, RuntimeName

Run = Callable[[Pixels], Outputs]

AGREEMENT = 1e-3
_MOST_WORKERS = 16
_PAYS_FROM_SECONDS = {"openvino": 10.0, "onnx": 15.0, "compile": 90.0}
_TIMING_SECONDS = 0.4
_FEW_BATCHES = 8
_APART_BYTES = (
    4 << 30
)  # of weights, up to which each worker has an OpenVINO model of its own: it then runs on the worker's thread
_NEEDS = {"openvino": ("openvino",), "onnx": ("onnxruntime", "onnxscript"), "compile": ()}


@dataclass(frozen=True)
class Workers:
    """How many threads take batches, and how many cores each of them computes on."""

    count: int
    threads: int


@dataclass(frozen=True)
class Chosen:
    """A runtime that is ready.

    ``difference`` is its greatest one from PyTorch's, relative to the greatest activation; ``seconds`` are a batch's.
    """

    name: str
    run: Run
    difference: float = 0.0
    seconds: float = math.inf


def workers_here() -> Workers:
    """Return the workers for the cores that this process may use."""
    count = min(cores(), _MOST_WORKERS)
    return Workers(count, cores() // count)


@contextmanager
def own_randomness(device: torch.device | None = None) -> Iterator[None]:
    """Leave PyTorch's random numbers to the caller as they were: those of the CPU, and of a GPU that is computed on."""
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def threads_per_worker(threads: int) -> Iterator[None]:
    """Let PyTorch use so many cores a call, in threads that start inside, and memory that stays mapped."""
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose(
    program: nn.Module,
    first: Pixels,
    *,
    images_left: int,
    wish: RuntimeName,
    device: torch.device,
    precision: Precision,
    workers: Workers,
) -> Chosen:
    """Return the runtime for a program, pixels uint8 (b, h, w, 3) -> a tuple of activations (b, ...).

    ``auto`` takes the fastest that is installed where the images left to compute pay for its compilation; it must give
    what PyTorch gives on ``first``, within 0.1 % of the greatest activation, and be faster.

    Raises:
        SetupError: the wished runtime is not installed, or cannot run this program.
        UsageError: the wished runtime does not compute on this device or in this precision.
    """
    plain = Chosen("torch", eager := TorchRuntime(program, device, precision))
    exact = device.type == "cpu" and precision == "float32"
    if wish == "torch" or (wish == "auto" and (not exact or images_left <= _FEW_BATCHES * len(first))):
        return plain
    if wish != "auto":
        _require(wish, device, precision)
    reference = _timed(eager, first)
    if wish != "auto":
        return _tried(wish, program, first, reference, device, precision, workers)
    left = reference.seconds / len(first) * images_left / workers.count
    for name in (name for name, worth in _PAYS_FROM_SECONDS.items() if left >= worth and is_installed(name)):
        try:
            chosen = _tried(name, program, first, reference, device, precision, workers)
        except SetupError as error:
            logger.warning("runtime %s: left out (%s)", name, error)
            continue
        if chosen.difference > AGREEMENT:
            logger.warning("runtime %s: left out, it differs from PyTorch by %.1g", name, chosen.difference)
        elif chosen.seconds < reference.seconds or _timed(chosen.run, first).seconds < reference.seconds:
            return chosen  # where it took two tries, a busy moment was to blame
    return plain


def _tried(
    name: str,
    program: nn.Module,
    first: Pixels,
    reference: "_Timed",
    device: torch.device,
    precision: Precision,
    workers: Workers,
) -> Chosen:
    """Build a runtime and hold it against PyTorch. PyTorch's own run is over by then: exporters patch modules in place."""
    try:
        if device.type == "cpu" and precision == "float32":
            run = _build(name, program, first, workers)
        else:
            compiled: Any = torch.compile(program, dynamic=False)
            run = TorchRuntime(compiled, device, precision)
        got = _timed(run, first)
    except Exception as error:
        raise SetupError(f"`runtime` {name} cannot run this backbone ({_first_line(error)}).") from error
    difference = max(_difference(one, other) for one, other in zip(got.outputs, reference.outputs, strict=True))
    logger.debug(
        "runtime %s: %.2g s a batch, PyTorch %.2g s; differs by %.1g", name, got.seconds, reference.seconds, difference
    )
    return Chosen(name, run, difference, got.seconds)


class _Timed(NamedTuple):
    outputs: Outputs
    seconds: float


def _timed(run: Run, pixels: Pixels) -> _Timed:
    """Return what a batch gives and the seconds it takes, the best of several runs where they are short."""
    best, spent = float("inf"), 0.0
    while True:
        started = time.perf_counter()
        outputs = run(pixels)
        seconds = time.perf_counter() - started
        best, spent = min(best, seconds), spent + seconds
        if spent > 4 * best or spent > _TIMING_SECONDS:
            return _Timed(outputs, best)


def _build(name: str, program: nn.Module, first: Pixels, workers: Workers) -> Run:
    builders: dict[str, Callable[[nn.Module, Pixels, Workers], Run]] = {
        "openvino": _openvino,
        "onnx": _onnx,
        "compile": _compiled,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return builders[name](program, first, workers)


def _openvino(program: nn.Module, first: Pixels, workers: Workers) -> Run:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it would report every conversion
    import openvino

    with torch.inference_mode():
        traced = torch.jit.trace(program, torch.from_numpy(first[:1]), check_trace=False)  # type: ignore[no-untyped-call]
        model = openvino.convert_model(traced, input=[first.shape])
    weights = sum(value.nbytes for value in (*program.parameters(), *program.buffers()))
    apart = weights * workers.count <= _APART_BYTES
    streams = 1 if apart else workers.count
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(streams * workers.threads),
        "ENABLE_CPU_PINNING": "NO",
    }
    core = openvino.Core()
    first_model = core.compile_model(model, "CPU", settings)
    idle = [first_model.create_infer_request()]

    def run(pixels: Pixels) -> Outputs:
        try:
            request = idle.pop()
        except IndexError:
            compiled = core.compile_model(model, "CPU", settings) if apart else first_model
            request = compiled.create_infer_request()
        request.infer([pixels], share_inputs=True)
        outputs = tuple(output.data.copy() for output in request.output_tensors)
        idle.append(request)
        return outputs

    return run


def _onnx(program: nn.Module, first: Pixels, workers: Workers) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = workers.threads
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.onnx"
        torch.onnx.export(program, (torch.from_numpy(first),), str(path), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pixels: tuple(session.run(None, {name: pixels}))


def _compiled(program: nn.Module, first: Pixels, workers: Workers) -> Run:  # noqa: ARG001 - as the others
    import torch._inductor.config as inductor

    compiled = torch.compile(program, dynamic=False)

    def run(pixels: Pixels) -> Outputs:
        with torch.no_grad(), inductor.patch(freezing=True):
            return tuple(to_array(output) for output in as_tuple(compiled(torch.from_numpy(pixels))))

    return run


def _require(name: str, device: torch.device, precision: Precision) -> None:
    if not is_installed(name):
        what = "needs a C++ compiler" if name == "compile" else f"is not installed: `pip install 'featcache[{name}]'`"
        raise SetupError(f"`runtime` {name} {what}, or leave `runtime` out.")
    if name != "compile" and (device.type != "cpu" or precision != "float32"):
        raise UsageError(f"`runtime` {name} computes on the CPU in float32 only, not on {device} in {precision}.")


def is_installed(name: str) -> bool:
    """Tell whether a runtime can be used here."""
    if name == "compile":
        return any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++"))
    return all(find_spec(package) is not None for package in _NEEDS[name])


def _difference(got: NDArray[Any], expected: NDArray[Any]) -> float:
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - expected).max(initial=0) / max(float(np.abs(expected).max(initial=0)), 1e-30))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
