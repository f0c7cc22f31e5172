"""Run a frozen prefix once over the images of a source and keep its rows."""

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.cache import Known, Stock, make_listing, make_seen, unreadable
from featcache.errors import DataError, StorageError
from featcache.fingerprint import sha256_of_bytes
from featcache.images import UnreadableImage, decode
from featcache.progress import logger, progress
from featcache.sources import FileStat, Item, Source
from featcache.specs import StoredDtype, Transform
from featcache.store import FeatureStore, Part, Quarantined, now_ns

PART_ROWS = 4096
PART_BYTES = 64 << 20
MIN_PART_SECONDS = 2.0
MAX_PART_SECONDS = 30.0
TOLERATED_BAD_IMAGES = 10
WORTH_SAYING = 500_000_000

Pixels = NDArray[np.uint8]
Runner = Callable[[Pixels], NDArray[Any]]


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction did."""

    rows: int
    computed: int
    quarantined: tuple[Quarantined, ...]
    seconds: float

    @property
    def reused(self) -> int:
        """Rows that were there already."""
        return self.rows - self.computed


@dataclass(frozen=True)
class _Decoded:
    known: Known
    pixels: Pixels


@dataclass
class _Harvest:
    """Rows that are computed and not yet in a part, and everything learned on the way."""

    known: list[Known] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)
    rows: list[tuple[Known, NDArray[Any]]] = field(default_factory=list)
    part_started: float = field(default_factory=time.monotonic)
    computed: int = 0

    def quarantine(self, bad: Quarantined) -> None:
        """Set an image aside and say so."""
        self.quarantined.append(bad)
        logger.warning("%s: left out: %s", bad.path, bad.reason)

    def settle(self) -> None:
        """Set aside the copies of images that turned out to give no row."""
        reasons = {bad.sha256: bad.reason for bad in self.quarantined if bad.sha256}
        copies = [one for one in self.known if one.sha256.hex() in reasons]
        self.known = [one for one in self.known if one.sha256.hex() not in reasons]
        self.quarantined += [Quarantined(one.item.path, one.sha256.hex(), reasons[one.sha256.hex()]) for one in copies]


def extract(
    source: Source,
    store: FeatureStore,
    stock: Stock,
    runner: Runner | None,
    *,
    transform: Transform,
    dtype: StoredDtype,
    batch_size: int = 32,
    max_bad: float = 0.01,
) -> ExtractReport:
    """Compute the rows that an entry lacks, commit them part by part, then list the source's images as they are now.

    Killed at any point it loses the part in flight; run again it goes on. An interrupt commits that part too.

    Args:
        source: the images.
        store: the entry that takes the rows.
        stock: the source compared with the entry.
        runner: the prefix: pixels uint8 (b, h, w, 3) to rows (b, ...); ``None`` stores the pixels.
        transform: how files become pixels.
        dtype: what rows are stored in.
        batch_size: images at a time; short batches are filled up, so that a row does not depend on its company.
        max_bad: the share of unusable images, above which (and above ten) the run ends in an error.

    Raises:
        DataError: too many images cannot be used, or none can.
        StorageError: the disk failed.
    """
    started, harvest = time.monotonic(), _Harvest()
    bad_before = {item.sha256: item.reason for item in store.manifest.quarantined if item.sha256}
    for one in stock.known:
        _sort_in(one, bad_before, harvest)
    if stock.to_read:
        rows_there = set(store.known_rows())
        run, sized = runner or (lambda pixels: pixels), False
        try:
            with progress(len(stock.to_read), f"extract {source.name}") as bar:
                for batch in _batches(_read_all(source, stock.to_read, transform, rows_there, harvest, bar), batch_size):
                    _compute(run, batch, batch_size, dtype, harvest)
                    if not sized:
                        sized = _check_room(store, harvest, len(stock.to_read))
                    if _part_is_due(harvest, started):
                        _commit_part(store, harvest)
        finally:
            _commit_part(store, harvest)
    harvest.settle()
    quarantined = (*harvest.quarantined, *stock.unreachable)
    _judge(source, harvest, quarantined, max_bad)
    store.commit(quarantined=quarantined, listing=make_listing(source, harvest.known, now_ns()))
    store.write_table()
    return ExtractReport(len(harvest.known), harvest.computed, quarantined, time.monotonic() - started)


def _sort_in(one: Known, bad_before: dict[str, str], harvest: _Harvest) -> None:
    reason = bad_before.get(one.sha256.hex())
    if reason is None:
        harvest.known.append(one)
    else:
        harvest.quarantined.append(Quarantined(one.item.path, one.sha256.hex(), reason))


def _read_all(
    source: Source, items: tuple[Item, ...], transform: Transform, rows_there: set[bytes], harvest: _Harvest, bar: Any
) -> Iterator[_Decoded]:
    """Yield each new image once, decoded ahead by threads; Pillow lets go of the interpreter while it works."""

    def read(item: Item) -> _Decoded | Known | Quarantined:
        digest = ""
        try:
            stat: FileStat | None = source.stat(item.path)
            content = source.read(item.path)
            digest = sha256_of_bytes(content)
            known = Known(item, bytes.fromhex(digest), stat)
            return known if known.sha256 in rows_there else _Decoded(known, decode(content, transform))
        except OSError as error:
            return unreadable(item, error)
        except UnreadableImage as error:
            return Quarantined(item.path, digest, str(error))

    workers = max(2, os.cpu_count() or 2)
    queue = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(read, item) for item in islice(queue, 8 * workers))
        try:
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(pool.submit(read, item) for item in islice(queue, 1))
                bar.update(1)
                if isinstance(done, Quarantined):
                    harvest.quarantine(done)
                elif isinstance(done, Known):
                    harvest.known.append(done)
                elif done.known.sha256 in rows_there:
                    harvest.known.append(done.known)
                else:
                    rows_there.add(done.known.sha256)
                    yield done
        finally:
            for future in waiting:
                future.cancel()


def _batches(decoded: Iterator[_Decoded], size: int) -> Iterator[list[_Decoded]]:
    batch: list[_Decoded] = []
    for one in decoded:
        batch.append(one)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _compute(run: Runner, batch: list[_Decoded], batch_size: int, dtype: StoredDtype, harvest: _Harvest) -> None:
    pixels = np.stack([one.pixels for one in batch] + [batch[-1].pixels] * (batch_size - len(batch)))
    with np.errstate(over="ignore"):
        rows = run(pixels)[: len(batch)].astype(dtype)
    for one, row in zip(batch, rows, strict=True):
        if np.isfinite(row).all():
            harvest.known.append(one.known)
            harvest.rows.append((one.known, row))
        else:
            reason = f"its activations are not finite in {dtype}" + (", try --dtype float32" if dtype == "float16" else "")
            harvest.quarantine(Quarantined(one.known.item.path, one.known.sha256.hex(), reason))


def _check_room(store: FeatureStore, harvest: _Harvest, images: int) -> bool:
    """Say how much will be written where it is much, and refuse what the disk cannot hold."""
    if not harvest.rows:
        return False
    each = harvest.rows[0][1].nbytes
    total, free = each * images, shutil.disk_usage(store.path).free
    if total > free:
        raise StorageError(
            f"{store.path}: {total / 1e9:.1f} GB would be written ({each / 1e3:.0f} kB an image), {free / 1e9:.1f} GB are "
            "free. Use another --cache or a later cut."
        )
    if total > WORTH_SAYING:
        logger.info("writing %.1f GB (%.0f kB an image)", total / 1e9, each / 1e3)
    return True


def _part_is_due(harvest: _Harvest, started: float) -> bool:
    """Tell whether to commit: parts grow with the run, from 2 s of work to 30 s."""
    if not harvest.rows:
        return False
    now = time.monotonic()
    patience = min(MAX_PART_SECONDS, max(MIN_PART_SECONDS, (now - started) / 10))
    size = len(harvest.rows) * harvest.rows[0][1].nbytes
    return len(harvest.rows) >= PART_ROWS or size >= PART_BYTES or now - harvest.part_started >= patience


def _commit_part(store: FeatureStore, harvest: _Harvest) -> None:
    if harvest.rows:
        part = Part(np.stack([row for _, row in harvest.rows]), make_seen([one for one, _ in harvest.rows], now_ns()))
        record = store.add_part(part)
        seconds = time.monotonic() - harvest.part_started
        store.commit(parts=[record], quarantined=[bad for bad in harvest.quarantined if bad.sha256], seconds=seconds)
    harvest.computed += len(harvest.rows)
    harvest.rows, harvest.part_started = [], time.monotonic()


def _judge(source: Source, harvest: _Harvest, quarantined: tuple[Quarantined, ...], max_bad: float) -> None:
    bad, total = len(quarantined), len(source.items)
    example = f"{quarantined[0].path}: {quarantined[0].reason}" if quarantined else ""
    if not harvest.known:
        raise DataError(f"{source.location}: none of the {total} images can be used ({example}).")
    if bad > max(TOLERATED_BAD_IMAGES, max_bad * total):
        raise DataError(
            f"{source.location}: {bad} of {total} images cannot be used ({example}). The other rows are kept: repair the "
            f"files and run again, or allow it with --max-bad {100 * bad / total:.1f}%."
        )
