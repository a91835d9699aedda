"""Where the time and the memory of a run go: what ``slotmoe profile`` watches, without torch.

The network, the step above the cache and ``Runtime.step`` say what they have just done:
``lap(part)`` gives the time since the lap before to ``part``.  A lap costs a fraction of a
microsecond and a token has a few hundred at most.  Memory is sampled by a thread of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

import psutil

from slotmoe.offload.machine import peak_rss

if TYPE_CHECKING:
    from slotmoe.offload.runtime import Runtime

PARTS = (
    "attention",
    "gate",
    "experts",
    "shared experts and dense layers",
    "head",
    "cache and prefetch",
    "waiting for disk",
    "waiting for RAM",
    "sampling",
    "rest",
)
"""All parts of a token's time.  ``attention`` has the router's matrix where one kernel computes
both; ``sampling`` is all that lies between two steps, ``rest`` the embedding and position
tables."""

LONGEST = 4000  # memory samples kept; beyond them every second one goes and the interval doubles


@dataclass
class Pass:
    """One step over ``tokens`` tokens: when it began, in seconds since the profile's start, the
    bytes that came from each slower tier meanwhile, and its seconds by part."""

    kind: str
    tokens: int
    began: float
    moved: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Profiler:
    """Time by part, step by step, and the gates' choices by MoE layer ("row").  ``synchronize``
    waits for the device.

    ``uses[row][expert]`` counts tokens; ``hits``, ``misses`` and, of the misses, ``coming``, those
    whose read had begun, are counted as the cache counts them: in prefill each expert that a pass
    needs once.
    """

    def __init__(
        self, rows: int, experts: int, origin: float, synchronize: Callable[[], None] | None = None
    ):
        self.passes: list[Pass] = []
        self.uses = [[0] * experts for _ in range(rows)]
        self.hits, self.misses, self.coming = ([0] * rows for _ in range(3))
        self._origin, self._synchronize = origin, synchronize
        self._seconds: dict[str, float] = {}
        self._laps: list[tuple[str, float]] = []
        self._began = self._last = 0.0
        self._moved: dict[str, int] = {}

    def begin(self, moved: dict[str, int]) -> None:
        """A step starts; the time since the one before went into sampling.  ``moved`` counts each
        slower tier's bytes so far."""
        self.between_steps()
        self._moved = moved
        self._seconds = {}
        self._laps.clear()  # of a step that was stopped
        self._began = self._last = perf_counter()

    def lap(self, part: str, now: float | None = None) -> None:
        """The time since the last lap, until now or that moment of ``perf_counter``, went into
        ``part``."""
        if self._synchronize is not None:
            self._synchronize()
        self._laps.append((part, perf_counter() if now is None else now))

    def end(self, kind: str, tokens: int, moved: dict[str, int]) -> None:
        """The step over ``tokens`` tokens is done."""
        self.lap("rest")
        self._sum_up()
        came = {tier: size - self._moved[tier] for tier, size in moved.items()}
        self.passes.append(Pass(kind, tokens, self._began - self._origin, came, self._seconds))

    def between_steps(self) -> None:
        """What has passed since the last step's end was its sampling; call it after the last step
        too."""
        if self.passes and self.passes[-1].seconds is self._seconds:
            self.lap("sampling")
            self._sum_up()

    def _sum_up(self) -> None:
        """Laps become seconds by part."""
        seconds, last = self._seconds, self._last
        for part, now in self._laps:
            seconds[part] = seconds.get(part, 0.0) + now - last
            last = now
        self._laps.clear()
        self._last = last

    def chose(self, row: int, indices: list[list[int]]) -> None:
        """The gate of ``row`` chose ``indices`` [T, K]."""
        uses = self.uses[row]
        for chosen in indices:
            for expert in chosen:
                uses[expert] += 1

    def looked(self, row: int, hits: int, misses: int, coming: int) -> None:
        """So many of what ``row`` needs were cached and so many not; reads of ``coming`` of these
        had begun."""
        self.hits[row] += hits
        self.misses[row] += misses
        self.coming[row] += coming

    def seconds(self, kind: str) -> dict[str, float]:
        """Seconds by part over all steps of ``kind``, the parts that took any time, in the order of
        ``PARTS``."""
        sums = dict.fromkeys(PARTS, 0.0)
        for one in list(self.passes):
            if one.kind == kind:
                for part, spent in list(one.seconds.items()):
                    sums[part] += spent
        return {part: spent for part, spent in sums.items() if spent > 0}

    def tokens(self, kind: str) -> int:
        """Tokens of all steps of ``kind``."""
        return sum(one.tokens for one in list(self.passes) if one.kind == kind)


@dataclass(frozen=True)
class Sample:
    """Memory at one moment: seconds since the start, bytes in use by tier, and of them by tier and
    component."""

    seconds: float
    total: dict[str, int]
    components: dict[str, dict[str, int]]


class MemorySampler:
    """A thread that samples memory every ``interval`` seconds while it is open as a context
    manager.

    Until it watches a runtime it sees only how the process grows, by the resident weights.  What no
    component explains is ``scratch and rest``.
    """

    def __init__(self, interval: float = 0.05):
        self.samples: list[Sample] = []
        self._runtime: Runtime | None = None
        self.origin, self._interval = perf_counter(), interval
        self._process = psutil.Process()
        self.baseline: int = self._process.memory_info().rss
        self.earlier_peak = peak_rss()
        self._highest: dict[str, Sample] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slotmoe-memory", daemon=True)
        self._take()
        self._thread.start()

    def __enter__(self) -> MemorySampler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    @contextmanager
    def watching(self, runtime: Runtime) -> Iterator[None]:
        """Ask the open ``runtime`` what it holds; at the end take a last sample and stop."""
        self._runtime = runtime
        try:
            yield
        finally:
            self._stop()

    def _stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    @property
    def latest(self) -> Sample:
        """The newest sample."""
        return self.samples[-1]

    def highest(self, tier: str) -> Sample:
        """The sample with the most bytes in use in ``tier``; it is kept even where ``samples`` is
        thinned out."""
        return self._highest[tier]

    def _run(self) -> None:
        while True:
            stopping = self._stopping.wait(self._interval)
            self._take()
            if stopping:
                return

    def _take(self) -> None:
        sample = self._loading() if self._runtime is None else self._running(self._runtime)
        self.samples.append(sample)
        for tier, used in sample.total.items():
            if tier not in self._highest or used > self._highest[tier].total[tier]:
                self._highest[tier] = sample
        if len(self.samples) > LONGEST:
            del self.samples[::2]
            self._interval *= 2

    def _loading(self) -> Sample:
        used = self._process.memory_info().rss
        grown = max(0, used - self.baseline)
        return Sample(
            perf_counter() - self.origin,
            {"ram": used},
            {"ram": {"runtime": used - grown, "resident weights": grown}},
        )

    def _running(self, runtime: Runtime) -> Sample:
        now, components = runtime.memory_in_use(), {}
        for tier, (total, known) in now.items():
            parts = {"runtime": self.baseline, **known} if tier == "ram" else known
            components[tier] = {**parts, "scratch and rest": max(0, total - sum(parts.values()))}
        return Sample(
            perf_counter() - self.origin,
            {tier: total for tier, (total, _) in now.items()},
            components,
        )
