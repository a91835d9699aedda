"""Streams, events and graphs of a GPU that is none: queues, and an adversary that chooses under a
seed what runs when: as late as the host's next real wait, or at once, or between.  The current
device and stream are a thread's own.  A capture refuses what CUDA refuses."""

import threading
import time
from collections import defaultdict, deque
from contextlib import contextmanager
from itertools import count
from random import Random

import torch
from torch.utils._python_dispatch import _disable_current_modes

KIND = "maia"  # a type of device that no build of torch has anything for
GPUS, PINNED = {}, {}  # by index; page-locked RAM by address: bytes, and whose it is
_numbers = count(1)  # 0 is the GPU that a thread has when nothing is said, and nobody's here


class Here(threading.local):
    """What CUDA keeps for each thread."""

    def __init__(self):
        self.device, self.streams, self.capture, self.refusal = 0, {}, None, None


here = Here()


def gpu_of(index):
    return GPUS.get(index) or GPUS.setdefault(index, Gpu(index, 0, 1 << 30))


class Mark:
    """A point in a stream; in another stream's queue it is waited for."""

    def __init__(self, stream):
        self.stream, self.reached, self.when = stream, False, 0.0


@contextmanager
def running():
    """What runs is none of the thread's that waits for it."""
    with torch.inference_mode(), _disable_current_modes():
        yield


class Gpu:
    """``eager``: how likely something runs when something is queued; ``wide``: how likely something
    runs that the host does not wait for; whether it is a kernel or, as far as they may, a copy."""

    def __init__(self, index, seed, capacity):
        self.index, self.device, self.random = index, torch.device(KIND, index), Random(seed)
        self.eager, self.wide = (self.random.choice((0, 0.2, 0.9)) for _ in "12")
        self.copies_first = self.random.random() < 0.7
        self.lock, self.streams = threading.RLock(), []
        self.free, self.failure = defaultdict(list), None  # by pool and bytes; what stays
        self.capacity, self.taken, self.allocated, self.peak = capacity, 0, 0, 0
        self.engine = 0
        self.pins, self.locks = 1 << 40, True  # bytes that may be page-locked
        self.default = Stream(self.index, self)

    def pinned(self):
        return {first: size for first, (size, index) in PINNED.items() if index == self.index}

    def memory(self):
        return self.capacity - self.taken - self.allocated, self.capacity

    def check(self):
        if self.failure is not None:
            raise RuntimeError(f"CUDA error: {self.failure}") from self.failure

    def put(self, stream, item):
        refusal, here.refusal = here.refusal, None
        if refusal is not None:
            raise RuntimeError(f"CUDA error: {refusal}")
        with self.lock:
            self.check()
            if here.capture is not None:
                if stream is not here.capture.stream:
                    refuse("a capture does not hold what is queued elsewhere")
                if not isinstance(item, Mark):
                    return here.capture.items.append(item)
                if item.stream is not stream:
                    refuse("a capture waits for what it does not hold")
                return None
            stream.items.append(item)
            if self.random.random() < self.eager:
                with running():
                    self._step(self._any())

    def until(self, mark):
        refuse("the host waits")
        with self.lock, running():
            while not mark.reached:
                wide = self.random.random() < self.wide
                self._step(self._any() if wide else mark.stream)
                self.check()
            self.check()

    def _any(self):
        return self.random.choice(self.streams[self.copies_first :])  # the first has kernels

    def _step(self, stream):
        """Run what is first in a stream, or first of what that waits for."""
        while stream.items and isinstance(item := stream.items[0], Mark):
            if item.stream is stream or item.reached:
                item.reached, item.when = True, item.when or time.perf_counter()
                stream.items.popleft()
                return
            stream = item.stream
        if stream.items and self.failure is None:
            try:
                stream.items.popleft()()
            except (RuntimeError, IndexError) as problem:
                self.failure = problem

    def seen(self, stream):
        """Everything in a stream has run."""
        stream.record_event().synchronize()

    def close(self):
        for stream in self.streams:
            stream.items.clear()
        self.free.clear()
        GPUS.pop(self.index, None)


def refuse(what):
    """What CUDA does not permit while this thread captures; the capture is lost."""
    if here.capture is not None:
        here.capture.spoiled = what
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")


class Stream:
    def __init__(self, device=None, gpu=None):
        index = here.device if device is None else getattr(device, "index", device)
        self.gpu, self.items = gpu or gpu_of(index), deque()
        self.device = self.gpu.device
        self.gpu.streams.append(self)

    def wait_event(self, event):
        if event.mark is not None and event.mark.stream is not self:
            self.gpu.put(self, event.mark)

    def record_event(self):
        event = Event()
        event.record(self)
        return event

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        self.gpu.seen(self)


class Event:
    def __init__(self, enable_timing=False):
        self.mark = None

    def record(self, stream=None):
        self.mark = Mark(stream or current_stream())
        self.mark.stream.gpu.put(self.mark.stream, self.mark)

    def query(self):
        refuse("an event is asked for")
        if self.mark is not None:
            self.mark.stream.gpu.check()
        return self.mark is None or self.mark.reached

    def synchronize(self):
        if self.mark is not None:
            self.mark.stream.gpu.until(self.mark)

    def elapsed_time(self, end):
        return max(1e-6, 1e3 * (end.mark.when - self.mark.when))


class CUDAGraph:
    def capture_begin(self, pool, capture_error_mode):
        stream = current_stream()
        assert stream is not stream.gpu.default and capture_error_mode == "thread_local"
        self.stream, self.pool, self.items, self.spoiled = stream, pool, [], None
        here.capture = self

    def capture_end(self):
        here.capture = None
        if self.spoiled:
            raise RuntimeError(f"CUDA error: the capture has failed before: {self.spoiled}")

    def replay(self):
        stream = current_stream()
        for item in self.items:
            stream.gpu.put(stream, item)


class Recorded(CUDAGraph):
    """A graph of one function.  ``made`` counts them."""

    made = 0

    def __init__(self, function):
        Recorded.made += 1
        with on_stream(Stream()):
            self.capture_begin(object(), "thread_local")
            try:
                self.outputs = function()
            finally:
                self.capture_end()


def current_stream(device=None):
    index = here.device if device is None else device.index
    return here.streams.get(index) or gpu_of(index).default


def set_stream(stream):
    here.device = stream.device.index
    here.streams[here.device] = stream


@contextmanager
def on_stream(stream):
    before, there = current_stream(), current_stream(stream.device)
    set_stream(stream)
    try:
        yield
    finally:  # as torch leaves it
        set_stream(there)
        set_stream(before)


@contextmanager
def on_device(device):
    before, here.device = here.device, device.index
    try:
        yield
    finally:
        here.device = before


def new_gpu(seed, capacity):
    """A GPU that is not the first one."""
    index = next(index for index in (n % 100 for n in _numbers) if index not in GPUS)
    GPUS[index] = Gpu(index, seed, capacity)
    return GPUS[index]
