"""What this machine's disk, link and processors give: measured, for reports and for ``slotmoe bench
--calibrate``."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from statistics import median

import torch
from torch import Tensor

from slotmoe.offload.plan.memory import HELP_BYTES
from slotmoe.offload.tiers.device import Card, Copy
from slotmoe.offload.tiers.memory import page_aligned
from slotmoe.quant.backends.base import TorchOps
from slotmoe.quant.export.layout import RecordLayout, layer_file
from slotmoe.quant.export.reader import Export


def disk_bandwidth(export: Export, total: int = 1 << 30) -> float:
    """Bytes a second of 8 threads that read random aligned 4 MiB of the export's experts, ``total``
    bytes in all."""
    paths = [export.folder / layer_file(layer) for layer in export.layers]
    size = min(4 << 20, paths[0].stat().st_size // 4096 * 4096)
    rounds, random = max(1, total // size // 8), Random(0)

    def read(path: Path) -> None:
        try:
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError:
            handle = os.open(path, os.O_RDONLY)
        try:
            memory = (
                page_aligned(size).numpy().data
            )  # like the slots: fewer, larger pages make a direct read faster
            for _ in range(rounds):
                os.preadv(
                    handle, [memory], random.randrange(os.fstat(handle).st_size // size) * size
                )
        finally:
            os.close(handle)

    started = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, [random.choice(paths) for _ in range(8)]))
    return 8 * rounds * size / (time.perf_counter() - started)


def disk_latency(export: Export) -> float:
    """Median seconds of one direct read of a record, or of 128 KiB, when nothing else is read."""
    path = export.folder / layer_file(export.layers[0])
    size, random, seconds = min(export.layout.record_bytes, HELP_BYTES), Random(0), []
    memory = page_aligned(size).numpy().data
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        handle = os.open(path, os.O_RDONLY)
    try:
        places = max(1, os.fstat(handle).st_size // size)
        for _ in range(64):
            started = time.perf_counter()
            os.preadv(handle, [memory], random.randrange(places) * size)
            seconds.append(time.perf_counter() - started)
    finally:
        os.close(handle)
    return sorted(seconds)[len(seconds) // 2]


def copy_bandwidth(
    card: Card, rows: list[Tensor], busy: Callable[[], bool] = lambda: False, seconds: float = 0.3
) -> float:
    """Bytes a second of copies from page-locked RAM into ``rows``, uint8 [record_bytes] each, of
    the card: for so many seconds, and as long as ``busy()`` says."""
    size = rows[0].nbytes
    memory = page_aligned(len(rows) * size)
    memory.fill_(1)
    pinned = card.pin(memory)
    try:
        copied, spent, until = 0, 0.0, time.perf_counter() + seconds
        while busy() or copied == 0 or time.perf_counter() < until:
            after = card.record()
            copies: list[Copy] = [
                card.copy(source, row, after)
                for source, row in zip(memory.split(size), rows, strict=True)
            ]
            copies[-1].synchronize()
            spent += sum(copy.seconds for copy in copies)
            copied += memory.nbytes
        card.wait(copies[-1])
        return copied / spent
    finally:
        if pinned:
            card.unpin(memory)


def expert_bandwidth(
    ops: TorchOps, layout: RecordLayout, levels: Tensor, seconds: float = 0.3
) -> float:
    """Bytes of records a second that ``ops`` compute experts at, one token each, from memory that
    no cache holds."""
    count = max(8, -(-(128 << 20) // layout.record_bytes))
    slab = page_aligned(count * layout.record_bytes).view(count, layout.record_bytes)
    x_D = torch.randn(layout.hidden_size, generator=torch.Generator().manual_seed(0))
    ops.experts_each(x_D, list(slab), layout, levels)  # pages, threads
    done, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds or done == 0:
        for start in range(0, count, 4):
            ops.experts_each(x_D, list(slab[start : start + 4]), layout, levels)
        done += slab.nbytes
    return done / spent


def together(
    card: Card, rows: list[Tensor], ops: TorchOps, layout: RecordLayout, levels: Tensor
) -> tuple[float, float]:
    """``copy_bandwidth`` and ``expert_bandwidth`` while both go on, as they do where misses are
    split: they share the RAM."""
    found: list[float] = []
    working = threading.Thread(
        target=lambda: found.append(expert_bandwidth(ops, layout, levels, seconds=0.6))
    )
    working.start()
    copied = copy_bandwidth(card, rows, busy=working.is_alive, seconds=0.0)
    working.join()
    return copied, found[0]


def device_bandwidth(card: Card, memory: Tensor) -> float:
    """Bytes a second at which the card reads its own ``memory``, uint8: median of 5 sums over
    it."""
    words, seconds = memory[: memory.nbytes // 8 * 8].view(torch.int64), []
    for _ in range(6):
        card.synchronize()
        started = time.perf_counter()
        words.sum()
        card.synchronize()
        seconds.append(time.perf_counter() - started)
    return words.nbytes / median(seconds[1:])
