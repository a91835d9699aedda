"""Vulkan devices: the engine's view of one, and experts that its kernels read where they lie.

Experts in slots and in RAM are read in place, each by its address.  What is used is copied to slots
between passes, as far as the cache policy keeps it; what is in neither comes from the disk to RAM
in the middle of a pass, which waits for that.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import Json
from slotmoe.model.config import Config
from slotmoe.network.shapes import Activation
from slotmoe.offload.devices.device import Device, DeviceMemory, Event, Region
from slotmoe.offload.experts.experts import Experts
from slotmoe.offload.experts.host import HostTier
from slotmoe.offload.experts.slots import Slots
from slotmoe.offload.experts.store import CACHED, STALE
from slotmoe.offload.plan.precision import check_vulkan
from slotmoe.quant.backends.base import Records, TorchBackend
from slotmoe.quant.backends.vulkan import DeviceRows, VulkanBackend, allocate
from slotmoe.quant.kernels import vulkan as kernels

_NONE = torch.empty(0, dtype=torch.uint8)
# Of what a model is opened with, the values that are there.
_OPTIONS: dict[str, tuple[object, ...]] = {"misses": ("auto", "fetch"), "kernels": ("auto",)}
_OPTIONS |= {"draft": ("off", "auto", "ngram"), "quantize": (True,)}
_ONWARD = 1  # the urgency of what is copied to a slot because it was used


class _Copy(Event):
    def __init__(self, vulkan: kernels.Vulkan, value: int):
        self._vulkan, self._value = vulkan, value

    def done(self) -> bool:
        return self._vulkan.wait(self._value, 0)

    def synchronize(self) -> None:
        self._vulkan.wait(self._value)


def gpu_report(index: int) -> Json:
    """Of device ``index`` its ``name``, its ``free`` bytes, whether they are RAM (``unified``) and
    the ``reason`` why it can't be used; and the names of ``all``."""
    try:
        infos, reason = kernels.devices(), f"there is no device {index}"
    except kernels.VulkanError as problem:
        infos, reason = [], str(problem)
    report: Json = {"all": [info.name.decode() for info in infos], "reason": reason}
    for info in infos[index : index + 1]:
        report |= {"name": info.name.decode(), "free": info.heap, "reason": info.problem.decode()}
        report["unified"] = info.kind in (1, 4)  # integrated, or a CPU
    return report


class VulkanDevice(Device):
    """A Vulkan device; a pass is computed when its call returns.  It is closed, and all its memory
    given back, when nobody has it any more.  What fails raises ``DeviceError``."""

    tier, reads_in_place = "vram", True

    def __init__(self, index: int):
        if reason := (found := gpu_report(index))["reason"]:
            raise ConfigError(f"device vulkan:{index}: {reason}; or use --device cpu")
        self.vulkan, self.name = kernels.Vulkan(index), found["name"]
        self.unified = found["unified"]
        self._reached = list[Region]()  # RAM that has to outlive the device
        weakref.finalize(self, self.vulkan.close)

    def refuse(self, config: Config, asked: Mapping[str, object]) -> None:
        missing = [name for name, known in _OPTIONS.items() if asked[name] not in known]
        if problem := ", ".join(f"{name} {asked[name]}" for name in missing):
            raise ConfigError(f"{problem} is not there yet on Vulkan; use --device cpu")
        check_vulkan(config)

    def backend(self, kernels: str, activation: Activation) -> VulkanBackend:
        return VulkanBackend(self.vulkan)

    def region(self, count: int, size: int) -> Region:
        at_once, parts = max(1, self.vulkan.limits.allocation // size), list[Region]()
        for start in range(0, count, at_once):
            nbytes = min(at_once, count - start) * size
            parts.append(Region(allocate(self.vulkan, nbytes), nbytes, _NONE))
        return Region(parts[0].address, count * size, _NONE, tuple(parts))

    def reach(self, memory: Region) -> Region:
        self._reached.append(memory)
        imported = self.vulkan.allocate(kernels.IMPORTED, memory.nbytes, memory.address)
        return Region(imported.address, memory.nbytes, memory.tensor)

    def latents(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return cast(Tensor, DeviceRows(self.vulkan, shape))  # which stands for one

    def copy(self, source: Region, target: Region, after: Event) -> Event:
        """Passes are over when their calls return, so there is nothing to come ``after``."""
        copies_13 = np.array([[source.address, target.address, source.nbytes]], np.uint64)
        return _Copy(self.vulkan, self.vulkan.copy(copies_13))

    def wait(self, event: Event) -> None:
        event.synchronize()

    def memory(self) -> DeviceMemory:
        total, free, own = self.vulkan.budget()
        return DeviceMemory(free, total, own, own, own)


class PlacedExperts(Experts):
    """Experts behind slots and in RAM that the ``VulkanBackend`` reads in place."""

    def __init__(
        self, layers: Sequence[int], records: Records, slots: Slots, backend: TorchBackend,
        device: Device, *_: object,
    ):  # fmt: skip
        super().__init__(layers, records, slots, backend, device)
        assert isinstance(backend, VulkanBackend) and isinstance(slots.source, HostTier)
        backend.layout, self._host, self._brings = records.layout, slots.source, True
        self._vulkan, stores = backend.vulkan, (slots.store, slots.source.store)
        self._near_N, self._far_N = (  # of slots; behind them 0 for -1, which is none
            np.array([*(slot.address for slot in each.records), 0], np.uint64) for each in stores
        )
        self._slots_N, self._ram_N = (each.table_ME.view(-1).numpy() for each in stores)
        # What shaders read, and the changes of both that are in it.
        self._table_N, self._seen = np.empty(0, np.uint64), [-1, -1]
        # Experts that are copied to their slots, and read in RAM until that is done: ``_copied``.
        self._coming_N, self._copied = np.empty(0, np.int64), 0
        self._copies_N3 = np.full((slots.staging, 3), slots.record_bytes, np.uint64)

    def load_kernels(self, hidden_size: int, top_k: int) -> None:
        """They are there."""

    def begin(self, tokens: int, sequences: int = 1) -> None:
        """A pass begins: what was copied meanwhile is read in slots."""
        self._host.release_all()
        self._arrive(0)
        self.slots.admit_guesses()
        self._host.advance(tokens)
        super().begin(tokens, sequences)

    def write_addresses(self, table_ME: NDArray[np.uint64]) -> None:
        """See ``slotmoe.quant.backends.vulkan``."""
        near, host = self._store, self._host
        changes = [near.changes, host.store.changes]
        if changes == self._seen and not self._brings:
            return
        self._seen = changes  # other threads add to RAM, and take nothing away
        self._table_N = table_N = table_ME.reshape(-1)
        near_N, far_N = self._near_N[self._slots_N], self._far_N[self._ram_N]
        near_N[self._coming_N] = 0
        np.copyto(table_N, np.where(near_N, near_N, far_N))
        for read, slot in host.acquired.items():
            if near.state(read.expert_id) is not CACHED:
                table_ME.flat[read.expert_id] = slot.record.address
        self._brings = bool(host.acquired)

    def bring(
        self, moe_layer: int, indices: list[list[int]], table_ME: NDArray[np.uint64]
    ) -> Iterator[bool]:
        """Bring what a layer lacks, in parts if that is more than RAM lends: each is there, and
        alone, until the next is asked for; whether there is one."""
        host, slots, cached = self._host, self.slots, self._cache.cached
        self._arrive()
        ids = [id for id in self._uses(moe_layer, indices) if id not in cached]
        self._fetched += len(ids)
        lends = len(host.store.records) - host.cache.slots - slots.staging
        done_E, more = np.zeros(table_ME.shape[1], bool), True
        while more:
            host.release_all()  # an earlier layer's, or part's, which is over
            room = min(slots.room(), slots.staging)
            part, ids = ids[: room + lends], ids[room + lends :]
            reads, lent = slots.demand(part[:room]), [host.acquire(id) for id in part[room:]]
            host.submit(lent)
            while coming := [read for read in (*reads, *lent) if not read.done]:
                self.look()
                slots.wait(coming)
            slots.take(reads)
            for read in reads:
                slots.admit(read.expert_id, must=True)
            for read in lent:
                if read.error is not None:
                    raise read.error
            self._store.rank()
            self._brings = True
            self.write_addresses(table_ME)
            table_ME[moe_layer, done_E] = 0
            done_E |= table_ME[moe_layer] != 0
            yield (more := bool(ids))

    def passed(self, layer: int, indices_MTK: Tensor, x_MTD: Tensor | None) -> None:
        """And what was used goes on to slots, as far as the cache would keep it."""
        super().passed(layer, indices_MTK, x_MTD)
        used_N, self._missed_N = self._missed_N, self._missed_N[:0]
        if len(used_N):
            self._host.release_all()
            self._host.note_uses(used_N.tolist())
            self._keep(used_N[self._ram_N[used_N] >= 0])

    def _keep(self, used_N: NDArray[np.int64]) -> None:
        """Begin copies of what is in RAM: into free room, or by one submit, if none is under way,
        of what they pay for into the slots of what is worth least."""
        store = self._store
        if self.slots.room():
            for id in used_N.tolist():
                if store.state(id) <= STALE:
                    self.slots.prefetch(id, _ONWARD)
        elif not (len(self._coming_N) or store.staged):
            new_N, gone_N = self._cache.pairs(used_N, len(self._copies_N3))
            if not (count := len(new_N)):
                return
            copies_N3 = self._copies_N3[:count]
            copies_N3[:, 0] = self._far_N[self._ram_N[new_N]]
            copies_N3[:, 1] = self._near_N[self._slots_N[gone_N]]
            self._copied = self._vulkan.copy(copies_N3)
            self._coming_N = new_N
            self._host.refer(new_N.tolist(), 1)
            self._table_N[gone_N] = self._far_N[self._ram_N[gone_N]]
            store.exchange(new_N, gone_N)
            self._seen[0] += 1

    def _arrive(self, nanoseconds: int = kernels.FOREVER) -> None:
        """What is copied is read in its slots, if that is done in time."""
        if len(come_N := self._coming_N) and self._vulkan.wait(self._copied, nanoseconds):
            self._host.refer(come_N.tolist(), -1)
            self._host.bytes_copied += len(come_N) * self.slots.record_bytes
            self._table_N[come_N] = self._near_N[self._slots_N[come_N]]
            self._coming_N = come_N[:0]
