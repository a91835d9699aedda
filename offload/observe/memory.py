"""How much memory a run uses: by tier and component, now and over time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType

import psutil

from slotmoe.offload.loading import LoadedModel
from slotmoe.offload.machine import peak_rss, process_bytes

LONGEST = 4000  # samples kept; beyond them every second one goes and the interval doubles


def memory_in_use(model: LoadedModel) -> dict[str, tuple[int, dict[str, int]]]:
    """Tier -> (bytes in use now, bytes of those components of the plan that are there by now).
    Another thread may ask."""
    plan, used, memory = model.plan, process_bytes(), model.device.memory()
    resident = sum(model.sizes.resident.values()) if model.sizes is not None else 0
    if memory is not None:  # everything is allocated at open
        names = ("latent KV cache", "expert slots", "read buffers")
        known = {name: plan.components[name] for name in names} | {"resident weights": resident}
        host = {name: size for name, size in plan.host.items() if name != "runtime"}
        return {"vram": (memory.allocated, known), "ram": (used, host)}
    cached, slab = model.quantized("profile").slots.present()
    buffers = min(plan.components["read buffers"], slab - cached)
    latent = sum(
        cache.nbytes // cache.context * max(cache.length, cache.written) for cache in model.caches
    )
    known = {"resident weights": resident, "latent KV cache": latent}
    return {"ram": (used, known | {"expert slots": slab - buffers, "read buffers": buffers})}


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

    Until it watches a model it sees only how the process grows, by the resident weights.  What no
    component explains is ``scratch and rest``.
    """

    def __init__(self, interval: float = 0.05):
        self.samples: list[Sample] = []
        self._model: LoadedModel | None = None
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
    def watching(self, model: LoadedModel) -> Iterator[None]:
        """Ask the open ``model`` what it holds; at the end take a last sample and stop."""
        self._model = model
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
        sample = self._loading() if self._model is None else self._running(self._model)
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

    def _running(self, model: LoadedModel) -> Sample:
        now, components = memory_in_use(model), {}
        for tier, (total, known) in now.items():
            parts = {"runtime": self.baseline, **known} if tier == "ram" else known
            components[tier] = {**parts, "scratch and rest": max(0, total - sum(parts.values()))}
        return Sample(
            perf_counter() - self.origin,
            {tier: total for tier, (total, _) in now.items()},
            components,
        )
