"""What executes a frozen program: here, the fastest runtime that agrees with PyTorch; or the actors of a Ray cluster.

On a CPU every worker thread runs whole batches by itself, each on its own share of the cores: two replicas of one thread
are faster than one of two threads, and decoding and computing fill the cores without a word between them. On a GPU the
workers decode and copy, and take turns at the device.

On a cluster decoding runs on CPUs, and features never pass through the driver: an actor writes its part into the entry and
returns the part's name. A part's rows depend on its images alone, so that a unit of work that was lost is simply done again.
The cache must be on a file system that all nodes share, and so must the images.
"""

import os
import pickle
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from featcache.backbones.base import Backbone, Outputs, TorchRuntime, as_tuple, to_array
from featcache.datasets import Dataset
from featcache.display import logger, progress
from featcache.errors import SetupError, UsageError
from featcache.extraction.extract import (
    NO_RUNTIME,
    EntryWriter,
    Runtime,
    Workers,
    beside_pixels,
    compute,
    in_dtype,
    not_finite,
    sample,
)
from featcache.extraction.files import Batch, BatchReader, DatasetFiles, Pixels, Positions, Rows
from featcache.resources import keep_freed_memory
from featcache.specs import INPUT, BackboneSpec, LoadedBackbone, Precision, RuntimeName, StoredDtype, Tokenisation, Views
from featcache.store.entry import FeatureStore
from featcache.store.hdf5 import FileIndex, Part
from featcache.store.manifests import FileRecord, Quarantined

if TYPE_CHECKING:
    from featcache.backbones.base import Preprocess

AGREEMENT = 1e-3  # of the greatest activation: rounding is 1e-6, another operator's arithmetic more
_PAYS_FROM_SECONDS = {"openvino": 10.0, "onnx": 15.0, "compile": 90.0}  # of work left: less than compiling takes is lost
_TIMING_SECONDS = 0.4
# Of PyTorch's seconds: what is believed at once, since a first run takes up to a quarter longer; what by turns is no noise.
_CLEARLY_FASTER, _FASTER = 0.7, 0.95
_TURNS, _TURNS_SHARE = 5, 0.03  # at most; as long as they cost less than so much of the work
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
UNIT = 1024
_RETRIES = 3


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
    gives on ``first``, within 0.1 % of the greatest activation, and be clearly faster.

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
    reference = _timed(eager, first, machine.workers.threads)
    if name != "auto":
        return _tried(name, program, first, reference, machine)
    remaining = reference.computing / len(first) * images / machine.workers.count
    for candidate in (each for each, worth in _PAYS_FROM_SECONDS.items() if remaining >= worth and is_installed(each)):
        try:
            runtime = _tried(candidate, program, first, reference, machine)
        except SetupError as error:
            logger.warning("runtime %s: left out (%s)", candidate, error)
            continue
        if runtime.difference > AGREEMENT:
            logger.warning("runtime %s: left out, it differs from PyTorch by %.1g", candidate, runtime.difference)
        elif _is_faster(runtime, eager, first, reference, _TURNS_SHARE * remaining):
            return runtime
    return plain


def _is_faster(runtime: Runtime, eager: TorchRuntime, first: Pixels, reference: "_Timed", seconds: float) -> bool:
    """Tell whether a runtime is clearly faster than PyTorch; where that is in doubt, by turns, for about so many seconds.

    On a loaded machine either may have met a busy moment: of turns the least of each counts.
    """
    if runtime.seconds < _CLEARLY_FASTER * reference.computing:
        return True
    least, least_eager, started = runtime.seconds, reference.seconds, time.perf_counter()
    for _ in range(_TURNS):
        least = min(least, _seconds_of(runtime.run, first))
        least_eager = min(least_eager, _seconds_of(eager, first))
        if time.perf_counter() - started > seconds:
            break
    logger.debug("runtime %s: by turns %.2g s a batch, PyTorch %.2g s", runtime.name, least, least_eager)
    return least < _FASTER * least_eager


def _seconds_of(run: Callable[[Pixels], Outputs], pixels: Pixels) -> float:
    started = time.perf_counter()
    run(pixels)
    return time.perf_counter() - started


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
    """What a batch gave; the seconds that it took, and those in which cores computed it, whatever else they did."""

    outputs: Outputs
    seconds: float
    computing: float


def _timed(run: Callable[[Pixels], Outputs], pixels: Pixels, threads: int = 1) -> _Timed:
    """Return what a batch gives and the seconds it takes on so many threads, the least of several runs if short."""
    best = computing = float("inf")
    spent = 0.0
    while True:
        # one thread computes in this one, and what reads images ahead beside it does not count
        started, begun = time.perf_counter(), time.thread_time() if threads == 1 else time.process_time()
        outputs = run(pixels)
        seconds = time.perf_counter() - started
        worked = time.thread_time() - begun if threads == 1 else (time.process_time() - begun) / threads
        best, computing, spent = min(best, seconds), min(computing, seconds, worked), spent + seconds
        if spent > 4 * best or spent > _TIMING_SECONDS:
            return _Timed(outputs, best, computing)


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


@dataclass(frozen=True)
class WorkerConfig:
    """What an actor needs to compute as this process would: the backbone as asked for and as it must turn out."""

    spec: BackboneSpec
    loaded: LoadedBackbone | None
    cuts: tuple[str, ...]
    entries: tuple[Path, ...]
    dtypes: tuple[StoredDtype, ...]
    preprocess: "Preprocess"
    views: Views
    batch_size: int
    device: str | None
    runtime: RuntimeName
    actors: int | None


@dataclass(frozen=True)
class WrittenPart:
    """A unit of work that is on disk: a part for each entry (``None`` where no row was good), and what was seen.

    ``good`` are positions of images that have a row, entry by entry; ``files`` (k,) is what was found at ``positions`` (k,).
    """

    parts: tuple[FileRecord | None, ...]
    good: tuple[Positions, ...]
    copies: Positions
    bad: tuple[tuple[Quarantined, ...], ...]
    images: int
    positions: Positions
    files: FileIndex


@dataclass(frozen=True)
class DecodedUnit:
    """A unit's images, decoded: pixels (b, views, h, w, 3) of ``fresh`` images, and what was seen on the way."""

    pixels: Pixels
    fresh: Positions
    copies: Positions
    bad: tuple[Quarantined, ...]
    files: FileIndex  # of the fresh ones, then of the copies


def compute_remotely(
    config: WorkerConfig, files: DatasetFiles, pending: Positions, cached: frozenset[bytes], writers: Sequence[EntryWriter]
) -> str:
    """Let a cluster compute what entries lack, and make its parts count; return what computed them.

    Raises:
        SetupError: Ray is not installed.
        UsageError: the data set lives in this process alone.
    """
    with (
        progress(len(pending), f"extract {files.dataset.name}", files.dataset.kind) as bar,
        closing(run(files.dataset, pending.tolist(), cached, config)) as units,
    ):
        for written in units:
            files.learn(written.positions, written.files)
            for number, writer in enumerate(writers):
                writer.adopt(written, number)
            bar.update(written.images)
    return "ray"


def run(
    dataset: Dataset, positions: Sequence[int], cached: frozenset[bytes], config: WorkerConfig
) -> Generator[WrittenPart, None, None]:
    """Yield units of work as actors finish them; the caller commits them.

    Raises:
        SetupError: Ray is not installed.
        UsageError: the data set lives in this process alone.
    """
    try:
        import ray
    except ImportError:
        raise SetupError("`engine` ray needs Ray: `pip install 'featcache[ray]'`.") from None
    try:
        pickle.dumps(dataset)
    except Exception as error:
        raise UsageError(f"{dataset.location}: `engine` ray cannot send it to other nodes. Use files or shards.") from error
    started_here = not ray.is_initialized()
    if started_here:
        before = os.environ.get("RAY_USAGE_STATS_ENABLED")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        yield from _run(ray, dataset, positions, cached, config)
    finally:
        if started_here:
            ray.shutdown()
            if before is None:  # the caller's environment is left as it was
                os.environ.pop("RAY_USAGE_STATS_ENABLED", None)


def _run(
    ray: Any, dataset: Dataset, positions: Sequence[int], cached: frozenset[bytes], config: WorkerConfig
) -> Generator[WrittenPart, None, None]:
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    on_gpu = gpus > 0 and (config.device or "cuda").startswith("cuda")
    count = config.actors or (gpus if on_gpu else max(1, cpus // 2))
    cores = min(1.0, cpus / (2 * count))
    share = {"num_gpus": 1} if on_gpu else {"num_cpus": cores}
    actor = ray.remote(max_restarts=_RETRIES, max_task_retries=_RETRIES, **share)(_Actor)
    decode = ray.remote(num_cpus=cores, max_retries=_RETRIES)(decode_unit)
    shared, without = ray.put(dataset), ray.put(cached)
    actors = [actor.remote(config, len(positions) // count) for _ in range(count)]
    size = max(config.batch_size, min(UNIT, -(-len(positions) // (4 * count))))
    units = [list(positions[start : start + size]) for start in range(0, len(positions), size)]
    logger.debug("ray: %d units of %d images, %d actors of %s", len(units), size, count, share)
    waiting: dict[Any, int] = {}
    load = [0] * count
    feed = iter(units)
    while True:
        while sum(load) < 2 * count and (unit := next(feed, None)) is not None:
            which = int(np.argmin(load))
            pixels = decode.remote(shared, unit, config.preprocess, config.views, without)
            waiting[actors[which].work.remote(pixels)] = which
            load[which] += 1
        if not waiting:
            return
        (finished,), _ = ray.wait(list(waiting), num_returns=1)
        load[waiting.pop(finished)] -= 1
        yield ray.get(finished)


def decode_unit(
    dataset: Dataset, positions: Sequence[int], preprocess: "Preprocess", views: Views, cached: frozenset[bytes]
) -> DecodedUnit:
    """Return a unit's images, decoded."""
    files = DatasetFiles(replace(dataset, samples=[dataset.samples[position] for position in positions]))
    batch = BatchReader(files, range(len(positions)), preprocess, views, cached).fill(len(positions))
    pixels = np.stack(batch.pixels) if batch.pixels else np.empty((0, 1, 1, 1, 3), np.uint8)
    fresh, copies = (np.array(numbers, np.int64) for numbers in (batch.fresh, batch.copies))
    looked_at = np.concatenate([fresh, copies])
    newest = int(files.index(looked_at, 0).stat[:, [1, 3]].max(initial=0))  # by the clock that dates the files
    at = np.asarray(positions, np.int64)
    return DecodedUnit(pixels, at[fresh], at[copies], tuple(batch.bad), files.index(looked_at, newest))


class _Actor:
    """Holds one loaded backbone and writes the parts that it computes."""

    def __init__(self, config: WorkerConfig, images: int) -> None:
        self._config = config
        self._stores = [FeatureStore.open(path) for path in config.entries]
        self._computed = [cut for cut in config.cuts if cut != INPUT]
        self._images = images
        self._runtime: Runtime | None = None

    def _prepare(self, first: NDArray[np.uint8]) -> None:
        import torch

        from featcache.backbones import open_backbone

        torch.set_num_threads(1)
        device = torch.device(self._config.device) if self._config.device else None
        backbone = open_backbone(self._config.spec, device)
        if backbone.loaded != self._config.loaded:
            raise SetupError(f"`engine` ray: {backbone.spec.name} has other weights on this node than on the driver.")
        config = self._config
        self._runtime = runtime_of(backbone, self._computed, first, self._images, config.runtime, Workers(1, 1))

    def work(self, unit: DecodedUnit) -> WrittenPart:
        """Compute a unit and write its parts."""
        size, count = self._config.batch_size, len(unit.fresh)
        collected: list[list[NDArray[Any]]] = [[] for _ in self._config.cuts]
        for start in range(0, count, size):
            piece = Batch(fresh=unit.fresh[start : start + size].tolist(), pixels=list(unit.pixels[start : start + size]))
            if self._computed and self._runtime is None:
                self._prepare(sample(piece, size))
            runtime = self._runtime or NO_RUNTIME
            run = beside_pixels(self._config.cuts, runtime.run if self._computed else None)
            compute(piece, replace(runtime, run=run), size)
            for rows, new in zip(collected, piece.rows, strict=True):
                rows.append(new)
        parts: list[FileRecord | None] = []
        good: list[Positions] = []
        bad: list[tuple[Quarantined, ...]] = []
        files = unit.files.take(np.arange(count))
        for store, dtype, rows in zip(self._stores, self._config.dtypes, collected, strict=True):
            record, finite, unusable = write_part(store, dtype, rows, files, self._runtime.name if self._runtime else "")
            parts.append(record)
            good.append(unit.fresh[finite])
            bad.append((*unit.bad, *unusable))
        positions = np.concatenate([unit.fresh, unit.copies])
        images = len(positions) + len(unit.bad)
        return WrittenPart(tuple(parts), tuple(good), unit.copies, tuple(bad), images, positions, unit.files)


def write_part(
    store: FeatureStore, dtype: StoredDtype, pieces: Sequence[NDArray[Any]], files: FileIndex, runtime: str
) -> tuple[FileRecord | None, NDArray[np.bool_], list[Quarantined]]:
    """Write rows as a part, not yet committed, but for those that are not finite in its dtype: return which are."""
    if not len(files):
        return None, np.zeros(0, bool), []
    rows, finite = in_dtype(pieces, dtype)
    unusable = files.take(~finite)
    bad = not_finite(unusable.paths, [row.tobytes() for row in unusable.sha256], dtype)
    record = store.add_part(Part([rows[finite]], files.take(finite)), runtime) if finite.any() else None
    return record, finite, bad
