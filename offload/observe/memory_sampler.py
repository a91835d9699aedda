"""How much memory a run uses: by tier and component, now and over time."""

import threading
from dataclasses import dataclass
from time import perf_counter

from slotmoe.offload.engine.loading import LoadedModel
from slotmoe.offload.machine import process_bytes
from slotmoe.system import peak_rss

LONGEST = 4000  # samples kept; beyond them every second one goes and the interval doubles


def memory_in_use(model: LoadedModel) -> dict[str, tuple[int, dict[str, int]]]:
    """Tier -> (bytes in use now, those of the plan's components there now).  Any thread may ask."""
    plan, used, memory = model.plan, process_bytes(), model.device.memory()
    resident = sum(model.sizes.resident.values()) if model.sizes is not None else 0
    if memory is not None:  # everything is allocated at open
        names = ("latent KV cache", "expert slots", "read buffers")
        known = {name: plan.components[name] for name in names} | {"resident weights": resident}
        host = {name: size for name, size in plan.host.items() if name != "runtime"}
        return {"vram": (memory.allocated, known), "ram": (used, host)}
    cached, slab = model.quantized("profile").slots.present()
    buffers = min(plan.components["read buffers"], slab - cached)
    latent = sum(state.used_bytes for state in model.states)
    known = {"resident weights": resident, "latent KV cache": latent}
    return {"ram": (used, known | {"expert slots": slab - buffers, "read buffers": buffers})}


@dataclass(frozen=True)
class Sample:
    """Memory at one moment: seconds since the start, bytes in use by tier, and by component too."""

    seconds: float
    total: dict[str, int]
    components: dict[str, dict[str, int]]


class MemorySampler:
    """A thread that samples memory every ``interval`` seconds, as a context manager.

    Until it watches a model it sees only how the process grows, by the resident weights.  What no
    component explains is ``scratch and rest``.
    """

    def __init__(self, interval: float = 0.05):
        self.samples: list[Sample] = []
        self.origin, self._interval = perf_counter(), interval
        self.baseline, self.earlier_peak = process_bytes(), peak_rss()
        self._model: LoadedModel | None = None
        # Of each tier the sample with the most bytes there, even where ``samples`` is thinned out.
        self.highest: dict[str, Sample] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slotmoe-memory", daemon=True)
        self._take()
        self._thread.start()

    def __enter__(self) -> "MemorySampler":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        self._thread.join()

    def watching(self, model: LoadedModel) -> "MemorySampler":
        """Itself, which now asks the open ``model``; its end takes a last sample and stops."""
        self._model = model
        return self

    def _run(self) -> None:
        while not self._stopping.wait(self._interval):
            self._take()
        self._take()

    def _take(self) -> None:
        if self._model is None:
            used = process_bytes()
            now = {"ram": (used, {"resident weights": max(0, used - self.baseline)})}
        else:
            now = memory_in_use(self._model)
        components = {}
        for tier, (used, known) in now.items():
            parts = ({"runtime": min(used, self.baseline)} if tier == "ram" else {}) | known
            components[tier] = {**parts, "scratch and rest": max(0, used - sum(parts.values()))}
        total = {tier: used for tier, (used, _) in now.items()}
        sample = Sample(perf_counter() - self.origin, total, components)
        self.samples.append(sample)
        for tier, used in total.items():
            if tier not in self.highest or used > self.highest[tier].total[tier]:
                self.highest[tier] = sample
        if len(self.samples) > LONGEST:
            del self.samples[::2]
            self._interval *= 2
