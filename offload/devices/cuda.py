"""CUDA devices: whether there is one that can be used, and the engine's view of it."""

import importlib
import re
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import accumulate
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from slotmoe.errors import ConfigError, DeviceError
from slotmoe.jsonfile import Json
from slotmoe.offload.devices.device import Device, DeviceMemory, Download, Event, Region, T
from slotmoe.offload.machine import Gpu, device_index, visible_gpu
from slotmoe.quant.backends import lacking
from slotmoe.quant.backends.base import Empty
from slotmoe.system import hold

_KINDS = 16  # of small tensors whose page-locked RAM waits for the next ones
_MAILBOX_BYTES = 8 << 20  # of a token's small tensors, many times
# The oldest driver for each major version of CUDA (NVIDIA's CUDA Compatibility), and the newest
# torch that pip gives for it.
_DRIVERS = ((580, 13, "torch"), (525, 12, "'torch<2.11'"))


class _CudaEvent(Event):
    def __init__(self, event: torch.cuda.Event, started: torch.cuda.Event | None = None):
        self.event, self._started = event, started

    @property
    def seconds(self) -> float:
        return self._started.elapsed_time(self.event) / 1e3 if self._started is not None else 0.0

    def done(self) -> bool:
        return bool(self.event.query())

    def synchronize(self) -> None:
        self.event.synchronize()


class Mapped(NamedTuple):
    """Page-locked RAM, uint8: as the ``host`` addresses it, and as kernels do."""

    host: Tensor
    kernels: Tensor


class Parcel(NamedTuple):
    """Mapped memory for tensors of these shapes and types, and the views of each."""

    memory: Mapped
    kinds: tuple[tuple[torch.Size, torch.dtype], ...]
    views: list[Mapped]


class Mailbox:
    """Small tensors between host and device, through page-locked RAM (``mapped``) that kernels read
    and write: no copy engine is asked, which may have records before them.  ``block`` was locked
    before any other RAM: where the system's limit is reached no more can be had."""

    def __init__(self, block: Mapped) -> None:
        self._block, self._taken = block, 0
        self._free: dict[tuple[tuple[torch.Size, torch.dtype], ...], list[Parcel]] = {}
        # In stream order: kernels use it until the event, a reader while its download lives.
        self._used: list[tuple[Event, Parcel, Callable[[], object]]] = []

    def write(
        self, device: "CudaDevice", source: Tensor, target: Tensor, at: Tensor | None = None
    ) -> None:
        """A kernel that is launched now makes ``target`` what ``source`` in RAM is now."""
        given = [source] if at is None else [source, at]
        views = (parcel := self._take(device, given)).views
        for tensor, (host, _) in zip(given, views, strict=True):
            host.copy_(tensor)
        if at is None:
            torch.mul(views[0].kernels, 1, out=target)  # an operation that torch makes no copy of
        else:
            target.index_copy_(0, views[1].kernels, views[0].kernels)
        self._used.append((device.record(), parcel, lambda: None))

    def read(self, device: "CudaDevice", *sources: Tensor) -> Download:
        """Kernels that are launched now bring ``sources`` to RAM."""
        memory, _, views = parcel = self._take(device, sources)
        if len(sources) > 1 and not any(source.nbytes % 16 for source in sources[:-1]):
            flat = [source.contiguous().view(-1).view(torch.uint8) for source in sources]
            torch.cat(flat, out=memory.kernels[: sum(map(len, flat))])  # they lie side by side
        else:
            for source, (_, kernels) in zip(sources, views, strict=True):
                torch.mul(source, 1, out=kernels)
        event = device.record()
        download = Download(*(host for host, _ in views), event=event)
        self._used.append((event, parcel, weakref.ref(download)))
        return download

    def _take(self, device: "CudaDevice", like: Sequence[Tensor]) -> Parcel:
        """Memory for such tensors."""
        self._collect()
        kinds = tuple((tensor.shape, tensor.dtype) for tensor in like)
        if free := self._free.get(kinds):
            return free.pop()
        if len(self._free) > _KINDS:
            self._free.clear()  # torch keeps the memory for others
            self._taken = self._taken if self._used else 0
        starts = [0, *accumulate(-(-tensor.nbytes // 16) * 16 for tensor in like)]
        first, size = self._taken, max(256, starts[-1])
        with torch.inference_mode(False):  # what is made in that mode can't be written outside
            if first + size <= len(self._block.host):
                memory = Mapped(*(view[first : first + size] for view in self._block))
                self._taken += -(-size // 256) * 256
            else:
                memory = device.mapped(size)
            views = list[Mapped]()
            for tensor, start in zip(like, starts, strict=False):
                parts = (view[start : start + tensor.nbytes].view(tensor.dtype) for view in memory)
                views.append(Mapped(*(part.view(tensor.shape) for part in parts)))
        return Parcel(memory, kinds, views)

    def _collect(self) -> None:
        passed = 0
        while passed < len(self._used) and self._used[passed][0].done():
            passed += 1
        read = [entry for entry in self._used[:passed] if entry[2]() is not None]
        for _, parcel, reader in self._used[:passed]:
            if reader() is None:
                self._free.setdefault(parcel.kinds, []).append(parcel)
        self._used[:passed] = read


class CudaDevice(Device):
    """A CUDA device; compute is the stream that is current where kernels are launched.

    Each thread has a current GPU, which is the first until it says another, and page-locked RAM
    belongs to that one: what any thread may call is under ``current`` here."""

    tier, queues = "vram", True

    def __init__(self, index: int):
        self.device, self.name = torch.device("cuda", index), torch.cuda.get_device_name(index)
        self._copies = torch.cuda.Stream(self.device)
        self._mailbox = Mailbox(self.mapped(_MAILBOX_BYTES))
        if torch.cuda.memory_allocated(self.device) == 0:
            torch.cuda.reset_peak_memory_stats(self.device)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def weights(self) -> Empty:
        return self.empty

    def run(self, step: Callable[[], T], ways_out: str) -> T:
        """Without memory, ``step`` runs once more, when the allocator gave back what it kept."""

        def once() -> T:
            with self.current():
                result = step()
            self.record().synchronize()  # what fails in a kernel fails here
            return result

        try:
            try:
                return once()
            except torch.OutOfMemoryError:
                pass  # the tensors of its frames are free after this block
            self.release()
            return once()
        except torch.OutOfMemoryError:
            free = self.memory().free >> 20
            problem = f"has no memory left in the middle of a step ({free} MiB free)"
            advice = f"another program has taken it; end that, or open the model with {ways_out}"
            raise DeviceError(f"{self.name} {problem}: {advice}") from None
        except RuntimeError as problem:
            if "CUDA" not in str(problem):
                raise
            told = str(problem).partition("\n")[0]
            raise DeviceError(f"{self.name} failed ({told}); start the program again") from None

    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device)

    def record(self) -> Event:
        return _CudaEvent(torch.cuda.current_stream(self.device).record_event())

    def wait(self, event: Event) -> None:
        assert isinstance(event, _CudaEvent)
        torch.cuda.current_stream(self.device).wait_event(event.event)

    def copy(self, source: Region, target: Region, after: Event) -> Event:
        assert isinstance(after, _CudaEvent)
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with self.current(), torch.cuda.stream(self._copies):
            self._copies.wait_event(after.event)
            started.record()
            target.tensor.copy_(source.tensor, non_blocking=True)
            ended.record()
        return _CudaEvent(ended, started)

    def mapped(self, size: int) -> Mapped:
        """Page-locked RAM that kernels address."""
        with self.current():
            host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        # RAM as a GPU's array, which torch takes as it is: nothing is copied.
        facts = {"shape": (size,), "typestr": "|u1", "version": 2, "data": (host.data_ptr(), False)}
        array = SimpleNamespace(__cuda_array_interface__=facts, host=host)
        kernels = torch.as_tensor(array, device=self.device)
        assert kernels.data_ptr() == host.data_ptr(), "page-locked RAM was copied, not mapped"
        return Mapped(host, kernels)

    def download(self, tensor: Tensor, *others: Tensor) -> Download:
        return self._mailbox.read(self, tensor, *others)

    def upload(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        result = torch.empty_like(tensor, device=self.device) if into is None else into
        self._mailbox.write(self, tensor, result)
        return result

    def write(self, source: Tensor, target: Tensor, at: Tensor | None = None) -> None:
        self._mailbox.write(self, source, target, at)

    def pin(self, memory: Region) -> bool:
        hold(memory.address, memory.nbytes)
        # Registered in place: pinning memory that exists costs no second copy of it.
        with self.current():
            if int(torch.cuda.cudart().cudaHostRegister(memory.address, memory.nbytes, 0)) == 0:
                return True
        # CUDA reports a refusal again at this thread's next launch: this one takes it.
        with suppress(RuntimeError):
            torch.zeros(1, device=self.device)
        return False

    def unpin(self, memory: Region) -> None:
        with self.current():
            torch.cuda.cudart().cudaHostUnregister(memory.address)

    def memory(self) -> DeviceMemory:
        cuda = torch.cuda
        counters = cuda.memory_allocated, cuda.memory_reserved, cuda.max_memory_allocated
        free, total = cuda.mem_get_info(self.device)
        return DeviceMemory(free, total, *(counter(self.device) for counter in counters))

    def release(self) -> None:
        torch.cuda.empty_cache()


def judge_gpu(index: int) -> tuple[str, str, str]:
    """The name of GPU ``index`` by CUDA's order, empty if none is seen, why it can't be used, and
    what mends that."""
    version, built = f"torch {torch.__version__}", torch.version.cuda or ""
    try:
        if not built:
            raise RuntimeError("it was built without that")
        with warnings.catch_warnings():
            # torch warns of an old driver first; ``init`` then says the same as an error.
            warnings.simplefilter("ignore")
            torch.cuda.init()
            if (count := torch.cuda.device_count()) <= index:
                shown = f"only cuda:0 to cuda:{count - 1}" if count else "no GPU"
                raise RuntimeError(f"the driver shows {shown} to this process")
            name = torch.cuda.get_device_name(index)
            capability = torch.cuda.get_device_capability(index)
    except (RuntimeError, AssertionError) as problem:
        told = str(problem).strip().partition("\n")[0].partition(". Please update your")[0]
        gpu = visible_gpu(index)
        mend = fitting_torch(gpu, built)
        return gpu.name if gpu else "", f"{version} can't use CUDA: {told}", mend
    reason, mend = lacking(capability)
    known = torch.cuda.get_arch_list()
    if not reason and not any(_runs(architecture, capability) for architecture in known):
        age = "{}.{}".format(*capability)
        reason = (
            f"{version} has no kernels for compute capability {age} (it has {', '.join(known)})"
        )
        mend = fitting_torch(visible_gpu(index))
    return name, reason, mend


def fitting_torch(gpu: Gpu | None, built: str = "") -> str:
    """How to get a torch that runs with the driver of ``gpu``, or a driver.  A torch that can't use
    CUDA is ``built`` for a version of it."""
    driver = gpu.driver if gpu else ""
    number, newest = int(re.match(r"\d*", driver)[0] or 0), _DRIVERS[0][0]  # type: ignore[index]
    newer = f"install NVIDIA's driver {newest} or newer"
    for least, cuda, torch_ in _DRIVERS:
        if number >= least:
            if built and int(built.partition(".")[0]) <= cuda:
                return "restart the machine: the driver that runs may be older than its files"
            pip = f"pip install --force-reinstall {torch_}"
            return pip if least == newest else f"{pip}, which fits driver {driver}; or {newer}"
    return newer


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether kernels for ``sm_XY`` (same generation) or ``compute_XY`` (or later) run there."""
    kind, _, digits = architecture.partition("_")
    digits = digits.rstrip("af")
    if not digits.isdecimal():
        return False
    built = divmod(int(digits), 10)
    return built <= capability and (kind == "compute" or built[0] == capability[0])


def choose_device(
    wanted: str, make: Callable[[int], Device] = CudaDevice, notify: Callable[[str], object] = str
) -> tuple[Device, str]:
    """The device that computes, and why.  ``notify`` gets a line where a GPU is there that ``auto``
    does not take.  Raises ``ConfigError`` if a GPU is ``wanted`` in vain."""
    index = device_index(wanted)
    if wanted == "cpu":
        return Device(), "as asked"
    if wanted.startswith("vulkan"):  # never by itself: it is not whole yet
        from slotmoe.offload.devices.vulkan import VulkanDevice

        return VulkanDevice(index), "as asked"
    name, reason, mend = judge_gpu(index)
    if reason and wanted != "auto":
        raise ConfigError(f"device {wanted}: {reason}; {mend}; or use --device cpu")
    if reason:
        if name:
            notify(f"{name} is not used: {reason}; {mend}")
        return Device(), reason
    return make(index), "as asked" if wanted != "auto" else f"{name} is here"


def gpu_report(index: int) -> Json:
    """Of GPU ``index``: its ``name``, the ``reason`` why ``auto`` would not take it, what would
    ``mend`` that, and the bytes that are ``free`` of it."""
    name, reason, mend = judge_gpu(index)
    if not reason:
        try:
            importlib.import_module("triton")
        except Exception as problem:
            reason = f"Triton does not load ({problem})"
            mend = "pip install --force-reinstall triton"
    free = 0 if reason else torch.cuda.mem_get_info(index)[0]
    return {"name": name, "reason": reason, "mend": mend, "free": free}
