"""What executes a frozen program: PyTorch as it is or compiled, OpenVINO, ONNX Runtime; the fastest that agrees.

On a CPU every worker thread runs whole batches by itself, each on its own share of the cores: two replicas of one thread
are faster than one of two threads, and decoding and computing fill the cores without a word between them. On a GPU the
workers decode and copy, and take turns at the device.
"""

import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featcache.backbones.base import Backbone, Outputs, Pixels, TorchRuntime, as_tuple, to_array
from featcache.display import logger
from featcache.errors import SetupError, UsageError
from featcache.extraction.extract import Runtime, Workers
from featcache.extraction.files import Rows
from featcache.resources import keep_freed_memory
from featcache.specs import Precision, RuntimeName, Tokenisation

AGREEMENT = 1e-3  # of the greatest activation: rounding is 1e-6, another operator's arithmetic more
_PAYS_FROM_SECONDS = {"openvino": 10.0, "onnx": 15.0, "compile": 90.0}  # of work left: less than compiling takes is lost
_TIMING_SECONDS = 0.4
_FEW_BATCHES = 8
# Of weights, up to which each worker has an OpenVINO model of its own: it then runs on the worker's thread. One model of
# many streams would hand every batch to another thread and back, and cores wait meanwhile.
_APART_BYTES = 4 << 30
_NEEDS = {"openvino": ("openvino",), "onnx": ("onnxruntime", "onnxscript"), "compile": ()}
Ids = NDArray[Any]  # int32 (n, length)
# Tokens of a piece. A core multiplies as fast from some hundreds of rows on, and what fills up the last piece of each
# length is lost; a GPU needs many more to be busy.
CPU_TOKENS, GPU_TOKENS = 512, 16_384
_FINE, _COARSE = 8, 16  # lengths are rounded up to multiples of these: below 64 tokens, and above


@dataclass(frozen=True)
class Machine:
    """What a program is to run on."""

    device: torch.device
    precision: Precision
    workers: Workers

    @property
    def is_exact(self) -> bool:
        """Whether it computes on the CPU in float32, as the runtimes beside PyTorch do."""
        return self.device.type == "cpu" and self.precision == "float32"


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


def runtime_of(
    backbone: Backbone, cuts: Sequence[str], first: NDArray[Any], images: int, name: RuntimeName, workers: Workers
) -> Runtime:
    """Return the runtime for a backbone's cuts, made ready on a first batch for so many samples; see ``select_runtime``."""
    machine, tokens = Machine(backbone.device, backbone.spec.precision, workers), _tokens_at_once(backbone)
    if tokens:
        if name not in {"auto", "torch"}:
            raise UsageError(f"`runtime` {name}: texts are of many lengths, which torch alone computes: leave it out.")
        name = "torch"
    usual: NDArray[Any] = typical(first, tokens) if tokens else first
    runtime = select_runtime(backbone.program(cuts), usual, images, name, machine)
    return replace(runtime, run=by_length(runtime.run, tokens), any_size=True) if tokens else runtime


def eager_run(backbone: Backbone, cuts: Sequence[str]) -> Callable[[NDArray[Any]], Outputs]:
    """Return what computes a backbone's cuts with PyTorch as it is."""
    run, tokens = TorchRuntime(backbone.program(cuts), backbone.device, backbone.spec.precision), _tokens_at_once(backbone)
    return by_length(run, tokens) if tokens else run


def _tokens_at_once(backbone: Backbone) -> int:
    """Return how many tokens of texts are computed at once, 0 where samples are no texts."""
    if not isinstance(backbone.preprocess.spec, Tokenisation):
        return 0
    return CPU_TOKENS if backbone.device.type == "cpu" else GPU_TOKENS


def select_runtime(program: nn.Module, first: Pixels, images: int, name: RuntimeName, machine: Machine) -> Runtime:
    """Return the runtime for a program, pixels uint8 (b, h, w, 3) -> a tuple of activations (b, ...).

    ``auto`` takes the fastest that is installed where so many images pay for its compilation; it must give what PyTorch
    gives on ``first``, within 0.1 % of the greatest activation, and be faster.

    Raises:
        SetupError: the runtime that was asked for is not installed, or cannot run this program.
        UsageError: it does not compute on this device or in this precision.
    """
    eager = TorchRuntime(program, machine.device, machine.precision)
    plain = Runtime(eager, "torch", workers=machine.workers.count)
    if name == "torch" or (name == "auto" and (not machine.is_exact or images <= _FEW_BATCHES * len(first))):
        return plain
    if name != "auto":
        _require(name, machine)
    reference = _timed(eager, first)
    if name != "auto":
        return _tried(name, program, first, reference, machine)
    remaining = reference.seconds / len(first) * images / machine.workers.count
    for candidate in (each for each, worth in _PAYS_FROM_SECONDS.items() if remaining >= worth and is_installed(each)):
        try:
            runtime = _tried(candidate, program, first, reference, machine)
        except SetupError as error:
            logger.warning("runtime %s: left out (%s)", candidate, error)
            continue
        if runtime.difference > AGREEMENT:
            logger.warning("runtime %s: left out, it differs from PyTorch by %.1g", candidate, runtime.difference)
        elif runtime.seconds < reference.seconds or _timed(runtime.run, first).seconds < reference.seconds:
            return runtime  # where it took two tries, a busy moment was to blame
    return plain


def _tried(name: str, program: nn.Module, first: Pixels, reference: "_Timed", machine: Machine) -> Runtime:
    """Build a runtime and hold it against PyTorch. PyTorch's own run is over by then: exporters patch modules in place."""
    try:
        if machine.is_exact:
            run = _build(name, program, first, machine.workers)
        else:
            compiled: Any = torch.compile(program, dynamic=False)
            run = TorchRuntime(compiled, machine.device, machine.precision)
        timed = _timed(run, first)
    except Exception as error:
        raise SetupError(f"`runtime` {name} cannot run this backbone ({_named_error(error)}).") from error
    difference = max(_greatest_difference(*pair) for pair in zip(timed.outputs, reference.outputs, strict=True))
    seconds = timed.seconds, reference.seconds
    logger.debug("runtime %s: %.2g s a batch, PyTorch %.2g s; differs by %.1g", name, *seconds, difference)
    return Runtime(run, name, difference, timed.seconds, machine.workers.count)


class _Timed(NamedTuple):
    outputs: Outputs
    seconds: float


def _timed(run: Callable[[Pixels], Outputs], pixels: Pixels) -> _Timed:
    """Return what a batch gives and the seconds it takes, the best of several runs where they are short."""
    best, spent = float("inf"), 0.0
    while True:
        started = time.perf_counter()
        outputs = run(pixels)
        seconds = time.perf_counter() - started
        best, spent = min(best, seconds), spent + seconds
        if spent > 4 * best or spent > _TIMING_SECONDS:
            return _Timed(outputs, best)


def _build(name: str, program: nn.Module, first: Pixels, workers: Workers) -> Callable[[Pixels], Outputs]:
    builders: dict[str, Callable[[nn.Module, Pixels, Workers], Callable[[Pixels], Outputs]]] = {
        "openvino": _openvino,
        "onnx": _onnx,
        "compile": _compiled,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return builders[name](program, first, workers)


def _openvino(program: nn.Module, first: Pixels, workers: Workers) -> Callable[[Pixels], Outputs]:
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


def _onnx(program: nn.Module, first: Pixels, workers: Workers) -> Callable[[Pixels], Outputs]:
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


def _compiled(program: nn.Module, first: Pixels, workers: Workers) -> Callable[[Pixels], Outputs]:  # noqa: ARG001 - as the others
    import torch._inductor.config as inductor

    compiled = torch.compile(program, dynamic=False)

    def run(pixels: Pixels) -> Outputs:
        with torch.no_grad(), inductor.patch(freezing=True):
            return tuple(to_array(output) for output in as_tuple(compiled(torch.from_numpy(pixels))))

    return run


def _require(name: str, machine: Machine) -> None:
    if not is_installed(name):
        lack = "needs a C++ compiler" if name == "compile" else f"is not installed: `pip install 'featcache[{name}]'`"
        raise SetupError(f"`runtime` {name} {lack}, or leave `runtime` out.")
    if name != "compile" and not machine.is_exact:
        where = f"not on {machine.device} in {machine.precision}"
        raise UsageError(f"`runtime` {name} computes on the CPU in float32 only, {where}.")


def is_installed(name: str) -> bool:
    """Tell whether a runtime can be used here."""
    if name == "compile":
        return any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++"))
    return all(find_spec(package) is not None for package in _NEEDS[name])


def _greatest_difference(got: NDArray[Any], expected: NDArray[Any]) -> float:
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - expected).max(initial=0) / max(float(np.abs(expected).max(initial=0)), 1e-30))


def _named_error(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def by_length(run: Callable[[Ids], Rows], tokens: int) -> Callable[[Ids], Rows]:
    """Return what computes token ids, int32 (n, length), -1 behind each text, by ``run``, in pieces of about one length.

    How long a piece is and how many texts it has depends on a text's own length alone, so that its row does not depend on
    its company, not by a bit. Rows that have one value a token come back as long as the ids are, zero behind the text.
    """

    def computed(ids: Ids) -> Rows:
        rows: list[NDArray[np.float32]] = []
        for length, places in _of_one_length(ids, tokens):
            filled = np.concatenate([places, np.repeat(places[-1:], _texts(length, tokens) - len(places))])
            parts = run(np.ascontiguousarray(ids[filled, :length]))
            rows = rows or [_room(part, length, ids.shape) for part in parts]
            for row, part in zip(rows, parts, strict=True):
                if part.ndim == 3:
                    row[places, :length] = part[: len(places)]
                else:
                    row[places] = part[: len(places)]
        return tuple(rows)

    return computed


def typical(ids: Ids, tokens: int) -> Ids:
    """Return the largest piece of some ids: what a runtime is made ready with."""
    length, places = max(_of_one_length(ids, tokens), key=lambda piece: piece[0] * len(piece[1]))
    return np.ascontiguousarray(ids[np.resize(places, _texts(length, tokens)), :length])


def _texts(length: int, tokens: int) -> int:
    return max(1, tokens // length)


def _room(part: NDArray[np.float32], length: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return room for the rows of all texts, given those of a piece."""
    count, most = shape
    is_of_tokens = part.ndim == 3 and part.shape[1] == length
    return np.zeros((count, most, part.shape[2]) if is_of_tokens else (count, *part.shape[1:]), part.dtype)


def _of_one_length(ids: Ids, tokens: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield the length of each piece and the places of its texts, short texts first."""
    lengths = np.maximum((ids >= 0).sum(axis=1), 1)
    steps = np.where(lengths <= 64, _FINE, _COARSE)
    rounded = np.minimum(-(-lengths // steps) * steps, ids.shape[1])
    for length in np.unique(rounded).tolist():
        places, count = np.flatnonzero(rounded == length), _texts(length, tokens)
        yield from ((length, places[start : start + count]) for start in range(0, len(places), count))
