"""The CPU computes missing experts beside a GPU, and what decides which: bandwidths of the link and
of the CPU, which a model that is opened without them measures once.

Shapes: T tokens, D hidden_size, E routed experts, K experts a token, N uses of experts.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slotmoe.offload.devices.device import Device, Event, Region
from slotmoe.offload.devices.pages import page_aligned
from slotmoe.offload.experts.host import HostTier
from slotmoe.offload.experts.store import Read
from slotmoe.offload.plan.speed import Bandwidths, Split, store_bandwidths
from slotmoe.quant.backends.base import Records, TorchBackend
from slotmoe.quant.codecs.codec import ExpertCodecs
from slotmoe.quant.export.layout import RecordLayout

LINK_BYTES = 256 << 20  # of RAM that ``measure_link`` takes


class HostCompute:
    """The CPU's part beside a GPU, by the ``split``: it computes the host's records in place, so
    many ``at_once``."""

    def __init__(
        self,
        backend: TorchBackend,
        records: Records,
        host: HostTier,
        device: Device,
        at_once: int,
        split: Split,
    ):
        self.backend, self.records, self.host, self._device = backend, records, host, device
        self.seconds, self._at_once = 0.0, at_once
        self._waiting: list[int] = []
        self.split, self.computed = split, 0  # experts so far

    def choose(
        self, tokens: int, uses: Mapping[int, int], absent: Sequence[int], missing: int
    ) -> list[int]:
        """Which of a layer's ``absent`` experts, in gate order, the CPU computes: those that the
        fewest of its ``tokens`` use, and of one token's those that the gate weighs least; of these
        first what is in RAM.  ``missing`` counts what is on its way, too."""
        fewest = list(reversed(absent))
        fewest.sort(key=uses.__getitem__)
        count = self.split.for_cpu(tokens, [uses[id] for id in fewest], missing)
        return sorted(fewest[:count], key=lambda id: id not in self.host.cache.cached)

    def begin(self, x_TD: Tensor, indices_TK: Tensor, expert_ids: list[int]) -> None:
        """A layer's input and choices, both in RAM, and which of the experts to compute."""
        self._x_TD, self._chosen_N = x_TD.numpy(), indices_TK.numpy().reshape(-1)
        self._waiting = expert_ids
        self.computed += len(expert_ids)
        self._acquire()

    def end(self) -> None:
        """The layer is over, or was broken off."""
        self._waiting = []
        self.host.release_all()
        self.host.note_uses()

    def _acquire(self) -> None:
        """Ask the host tier for the next records."""
        while self._waiting and len(self.host.acquired) < self._at_once:
            self.host.submit([self.host.acquire(self._waiting.pop(0))])

    def compute(self, ready: Sequence[Read], moe_layer: int, y_TKD: Tensor) -> None:
        """The outputs of acquired records that have arrived, into ``y_TKD`` on the GPU."""
        for read in ready:
            if read.error is not None:
                raise read.error
        started, experts = time.perf_counter(), self.host.cache.experts
        slots_E, chosen_N = np.full(experts, -1, np.int32), self._chosen_N
        for read in ready:
            slots_E[read.expert_id - moe_layer * experts] = self.host.acquired[read].index
        found_N = np.flatnonzero(slots_E[chosen_N] >= 0)
        # Each use is a token of its own with one expert, so only what is computed has memory.
        # By numpy, whose calls take a fifth of torch's.
        x_ND = self._x_TD[found_N // (len(chosen_N) // len(self._x_TD))]
        x, slots, indices = map(torch.from_numpy, (x_ND, slots_E, chosen_N[found_N, None]))
        y_N1D = torch.empty(len(found_N), 1, x_ND.shape[1])
        self.backend.experts(x, self.records, slots, indices, y_N1D)
        self._device.write(y_N1D[:, 0], y_TKD.flatten(0, 1), torch.from_numpy(found_N))
        self.seconds += time.perf_counter() - started
        for read in ready:
            self.host.release(read)
        self._acquire()


def measure_link(
    device: Device, slab: Region, cpu: TorchBackend, codecs: ExpertCodecs
) -> dict[str, float]:
    """Bytes a second, measured now in about a second: ``pcie``, copies from RAM into the ``slab``
    on the GPU, which stays as it is; ``pcie_busy``, that while the ``cpu`` computes experts from
    the same RAM; ``experts``, its records.  Copies have 4 MiB and experts V2-Lite's shapes: it is
    the machine that is measured, whichever model is opened first."""
    rows = slab.split(4 << 20)[: LINK_BYTES // 2 >> 22]
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):  # a link that was idle is slow: the first time wakes it
            alone = copy_bandwidth(device, rows, pool.submit(time.sleep, 0.3))
        rate = pool.submit(expert_bandwidth, cpu, RecordLayout(2048, 1408, codecs), seconds=0.6)
        copied = copy_bandwidth(device, rows, rate)
    return {"pcie": alone, "pcie_busy": copied, "experts": rate.result()}


def with_link(
    known: Bandwidths, path: Path, notify: Callable[[str], None],
    device: Device, slab: Region, cpu: TorchBackend, codecs: ExpertCodecs,
) -> Bandwidths:  # fmt: skip
    """``known`` with what ``--misses auto`` follows from.  If nobody has measured it, ``notify``
    gets a line, and what is measured now is kept in ``path`` where that can be written."""
    if "assumed" not in map(known.origin_of, ("pcie_busy", "experts")):
        return known
    notify(f"measuring once how fast {device.name} gets experts and the CPU computes them")
    rates = measure_link(device, slab, cpu, codecs)
    with suppress(OSError):
        store_bandwidths(path, device.name, **rates)
    return known.updated("measured now", **rates)


def copy_bandwidth(device: Device, rows: Sequence[Region], beside: Future[Any]) -> float:
    """Bytes a second of copies from page-locked RAM into ``rows`` of the GPU, of one size, or the
    last one of less, for as long as what is ``beside`` them takes.  What is copied is what
    the rows hold, so nothing changes and no memory is needed there."""
    memory = Region.of(page_aligned(sum(row.nbytes for row in rows), forks=False))
    sources = memory.split(rows[0].nbytes)
    for source, row in zip(sources, rows, strict=True):
        source.tensor.copy_(row.tensor)
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
