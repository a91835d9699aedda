"""CUDA devices: whether there is one that can be used, and the engine's view of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slotmoe.errors import ConfigError, DeviceError
from slotmoe.offload.tiers.device import (
    Copy,
    CpuDevice,
    Device,
    DeviceMemory,
    Download,
    Empty,
    Event,
    SlotEntries,
)
from slotmoe.offload.tiers.memory import Touching
from slotmoe.quant.backends import pick_backend
from slotmoe.quant.backends.base import TorchBackend

MIN_CAPABILITY = 7, 0


class _CudaEvent:
    def __init__(self, event: Any):
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())

    def synchronize(self) -> None:
        self.event.synchronize()


class _CudaCopy(_CudaEvent):
    def __init__(self, started: Any, ended: Any):
        super().__init__(ended)
        self._started = started

    @property
    def seconds(self) -> float:
        return float(self._started.elapsed_time(self.event)) / 1e3


class _CudaDownload:
    def __init__(self, tensor: Tensor):
        # torch keeps pinned memory until the stream has used it, here and in ``upload``.
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
            tensor, non_blocking=True
        )
        self._event = torch.cuda.current_stream(tensor.device).record_event()

    def get(self) -> Tensor:
        self._event.synchronize()
        return self._host


class CudaEntries:
    """A slot table on a GPU."""

    def __init__(self, tensor: Tensor, upload: Callable[[Tensor], Tensor]):
        self.tensor, self._entries, self._upload = tensor, tensor.view(-1), upload

    def set(self, expert_id: int, slot: int) -> None:
        self._entries[expert_id].fill_(slot)

    def load(self, slots: list[int]) -> None:
        self._entries.copy_(self._upload(torch.tensor(slots, dtype=torch.int32)))


class CudaDevice:
    """A CUDA device; compute is the stream that is current where kernels are launched."""

    tier, queues = "vram", True

    def __init__(self, index: int = 0):
        self.device, self.name = torch.device("cuda", index), torch.cuda.get_device_name(index)
        self._copies = torch.cuda.Stream(self.device)
        if torch.cuda.memory_allocated(self.device) == 0:
            torch.cuda.reset_peak_memory_stats(self.device)

    def backend(self, kernels: str, threads: int | None) -> TorchBackend:
        return pick_backend(self.device, kernels, threads)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def weights(self) -> Empty:
        return self.empty

    def touching(self, slab: Tensor, ready: int) -> Touching | None:
        return None

    def slot_entries(self, layers: int, experts: int) -> SlotEntries:
        entries = self.empty((layers, experts), torch.int32).fill_(-1)
        return CudaEntries(entries, self.upload)

    def layer_slots(self, experts: int, slots: Mapping[int, int]) -> Tensor:
        table_E = self.empty((experts,), torch.int32).fill_(-1)
        for expert, slot in slots.items():
            table_E[expert].fill_(slot)
        return table_E

    def run(self, step: Callable[[], Tensor], ways_out: str) -> Tensor:
        return run_on(self, step, ways_out)

    def record(self) -> Event:
        return _CudaEvent(torch.cuda.current_stream(self.device).record_event())

    def wait(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        torch.cuda.current_stream(self.device).wait_event(event.event)

    def copy(self, source: Tensor, target: Tensor, after: Event) -> Copy:
        assert isinstance(after, _CudaEvent)
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(after.event)
            started.record()
            target.copy_(source, non_blocking=True)
            ended.record()
        return _CudaCopy(started, ended)

    def download(self, tensor: Tensor) -> Download:
        return _CudaDownload(tensor)

    def upload(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def pin(self, memory: Tensor) -> bool:
        # Registered in place: pinning memory that exists costs no second copy of it.
        if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0:
            return True
        # CUDA reports a refusal again at this thread's next launch: this one takes it.
        with suppress(RuntimeError):
            torch.zeros(1, device=self.device)
        return False

    def unpin(self, memory: Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def memory(self) -> DeviceMemory | None:
        free, total = torch.cuda.mem_get_info(self.device)
        allocated, reserved = (
            torch.cuda.memory_allocated(self.device),
            torch.cuda.memory_reserved(self.device),
        )
        return DeviceMemory(
            free, total, allocated, reserved, torch.cuda.max_memory_allocated(self.device)
        )

    def release(self) -> None:
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class CudaFacts:
    """What torch says about CUDA here.  ``problem`` is the driver's complaint, if it has one;
    ``capability`` and ``architectures`` (like ``sm_90``) are the first GPU's and those that this
    torch has kernels for."""

    torch: str
    built: bool
    problem: str = ""
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    architectures: tuple[str, ...] = ()


def cuda_facts() -> CudaFacts:
    """Ask torch, and the driver through it."""
    if not torch.backends.cuda.is_built():
        return CudaFacts(torch.__version__, built=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch warns of an old driver first; ``init`` then says the same as an error
            torch.cuda.init()
            if torch.cuda.device_count() == 0:
                return CudaFacts(torch.__version__, True, "the driver shows no GPU to this process")
            name, capability = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
    except (RuntimeError, AssertionError) as problem:
        return CudaFacts(torch.__version__, True, str(problem).strip().partition("\n")[0])
    return CudaFacts(
        torch.__version__, True, "", name, capability, tuple(torch.cuda.get_arch_list())
    )


def why_not(facts: CudaFacts) -> str:
    """Why no GPU can be used; empty if one can."""
    if not facts.built:
        return (
            f"torch {facts.torch} here was built without CUDA; a CUDA build of torch is needed "
            "for a GPU"
        )
    if facts.problem:
        return f"torch can't use CUDA: {facts.problem}"
    device = f"{facts.name} has compute capability {facts.capability[0]}.{facts.capability[1]}"
    if facts.capability < MIN_CAPABILITY:
        return f"{device}, {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or newer is needed"
    if not any(_runs(built, facts.capability) for built in facts.architectures):
        known = ", ".join(facts.architectures)
        return (
            f"{device}, for which torch {facts.torch} has no kernels (it has {known}); "
            "install another build of torch"
        )
    return ""


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether kernels for ``sm_XY`` (same generation) or ``compute_XY`` (any later one) run on a
    GPU."""
    kind, _, digits = architecture.partition("_")
    digits = digits.rstrip("af")
    if not digits.isdecimal():
        return False
    built = divmod(int(digits), 10)
    return (
        built <= capability
        if kind == "compute"
        else built[0] == capability[0] and built <= capability
    )


def choose_device(wanted: str, make: Callable[[], Device] = CudaDevice) -> tuple[Device, str]:
    """The device to compute on, and why, as one clause.  Raises ``ConfigError`` if ``cuda`` is
    asked for in vain."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {wanted!r:.40} is unknown, expected auto, cpu or cuda")
    if wanted == "cpu":
        return CpuDevice(), "as asked"
    facts = cuda_facts()
    reason = why_not(facts)
    if reason and wanted == "cuda":
        raise ConfigError(f"device cuda: {reason}; or use --device cpu")
    if reason:
        return CpuDevice(), reason
    return make(), "as asked" if wanted == "cuda" else f"{facts.name} is here"


def run_on(device: Device, step: Callable[[], Tensor], ways_out: str) -> Tensor:
    """What ``step`` gives, computed; once more, with what the allocator has kept given back, where
    the device had no memory left.

    Raises ``DeviceError`` if the device fails; ``ways_out`` is what could be asked for instead."""

    def once() -> Tensor:
        result = step()
        device.record().synchronize()  # what fails in a kernel fails here
        return result

    try:
        try:
            return once()
        except torch.OutOfMemoryError:
            pass  # the tensors of its frames are free after this block
        device.release()
        return once()
    except torch.OutOfMemoryError:
        memory = device.memory()
        free = memory.free >> 20 if memory is not None else 0
        raise DeviceError(
            f"{device.name} has no memory left in the middle of a step ({free} MiB free): another "
            f"program has taken it; end that, or open the model with {ways_out}"
        ) from None
    except RuntimeError as problem:
        if "CUDA" not in str(problem):
            raise
        told = str(problem).partition("\n")[0]
        raise DeviceError(f"{device.name} failed ({told}); start the program again") from None
