"""Measured bandwidths of the link to a GPU and of the CPU beside it: what ``--misses auto`` chooses
by.  A model that is opened without them measures them once; ``slotmoe bench`` does so each time."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slotmoe.offload.devices.device import Device, Event
from slotmoe.offload.devices.pages import page_aligned
from slotmoe.offload.ingest.output_dir import Notify
from slotmoe.offload.plan.speed import Bandwidths, store_bandwidths
from slotmoe.quant.backends.base import Records, TorchBackend
from slotmoe.quant.codecs.codec import ExpertCodecs
from slotmoe.quant.export.layout import RecordLayout

LINK_BYTES = 256 << 20  # of RAM that ``measure_link`` takes


def measure_link(
    device: Device, slab: Tensor, cpu: TorchBackend, codecs: ExpertCodecs
) -> dict[str, float]:
    """Bytes a second, measured now in about a second: ``pcie``, copies from RAM into the ``slab``
    on the GPU, which stays as it is; ``pcie_busy``, that while the ``cpu`` computes experts from
    the same RAM; ``experts``, its records.  Copies have 4 MiB and experts V2-Lite's shapes: it is
    the machine that is measured, whichever model is opened first."""
    rows = slab.view(-1)[: LINK_BYTES // 2].split(4 << 20)
    with ThreadPoolExecutor(1) as pool:
        alone = copy_bandwidth(device, rows, pool.submit(time.sleep, 0.3))
        rate = pool.submit(expert_bandwidth, cpu, RecordLayout(2048, 1408, codecs), seconds=0.6)
        copied = copy_bandwidth(device, rows, rate)
    return {"pcie": alone, "pcie_busy": copied, "experts": rate.result()}


def with_link(
    known: Bandwidths, path: Path, notify: Notify,
    device: Device, slab: Tensor, cpu: TorchBackend, codecs: ExpertCodecs,
) -> Bandwidths:  # fmt: skip
    """``known`` with what ``--misses auto`` follows from.  If nobody has measured it, ``notify``
    gets a line, and what is measured now is kept in ``path`` where that can be written."""
    if "assumed" not in map(known.origin_of, ("pcie_busy", "experts")):
        return known
    notify(f"measuring once how fast {device.name} gets experts and the CPU computes them")
    rates = measure_link(device, slab, cpu, codecs)
    with suppress(OSError):
        store_bandwidths(path, **rates)
    return known.updated("measured now", **rates)


def copy_bandwidth(device: Device, rows: Sequence[Tensor], beside: Future[Any]) -> float:
    """Bytes a second of copies from page-locked RAM into ``rows`` of the GPU, uint8 of one size,
    or the last one of less, for as long as what is ``beside`` them takes.  What is copied is what
    the rows hold, so nothing changes and no memory is needed there."""
    memory = page_aligned(sum(row.nbytes for row in rows), forks=False)
    sources = memory.split(rows[0].nbytes)
    for source, row in zip(sources, rows, strict=True):
        source.copy_(row)
    pinned, copies = device.pin(memory), list[Event]()
    try:
        copied, spent = 0, 0.0
        while copied == 0 or not beside.done():
            copies, after = [], device.record()
            for source, row in zip(sources, rows, strict=True):
                copies.append(device.copy(source, row, after))
            copies[-1].synchronize()
            spent += sum(copy.seconds for copy in copies)
            copied += memory.nbytes
        device.wait(copies[-1])
        return copied / spent
    finally:
        if copies:  # the memory goes: after Ctrl-C, too, nothing may be on its way from it
            copies[-1].synchronize()
        if pinned:
            device.unpin(memory)


def expert_bandwidth(backend: TorchBackend, layout: RecordLayout, seconds: float = 0.3) -> float:
    """Bytes of records a second at which ``backend`` computes a token's four uncached experts."""
    count = max(8, -(-(128 << 20) // layout.record_bytes)) // 4 * 4
    slab = page_aligned(count * layout.record_bytes).view(count, layout.record_bytes)
    slab.fill_(1)  # pages that nobody has written are all one, which a cache holds
    records = Records(slab, layout, layout.levels())
    x_1D = torch.randn(1, layout.hidden_size, generator=torch.Generator().manual_seed(0))
    slots_E, y_1KD = torch.arange(count, dtype=torch.int32), x_1D.new_empty(1, 4, x_1D.shape[1])
    spent, rounds, started = 0.0, -1, 0.0  # the first round is for pages and threads
    while rounds < 1 or spent < seconds:
        started = started if rounds > 0 else time.perf_counter()
        for indices_1K in torch.arange(count).view(-1, 1, 4):
            backend.experts(x_1D, records, slots_E, indices_1K, y_1KD)
        rounds, spent = rounds + 1, time.perf_counter() - started
    return rounds * slab.nbytes / spent
