"""What ``slotmoe profile`` watches: where the time of a run goes, and how much memory it uses.

Network, experts and runtime say what they have just done: ``mark(stage)`` gives ``stage`` the time
since the last mark.  It costs a fraction of a microsecond, a few hundred times a token.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from time import perf_counter

from slotmoe.errors import informs
from slotmoe.network.layer_types import Timer
from slotmoe.offload.engine.loading import LoadedModel
from slotmoe.offload.experts.experts import Route
from slotmoe.offload.machine import process_bytes
from slotmoe.offload.runtime import Runtime
from slotmoe.system import peak_rss

LONGEST = 4000  # samples kept; beyond them every second one goes and the interval doubles
_FEW, REPLAYED = 16, 256  # tokens of a step, and such steps, whose routing is kept
Moved = Callable[[], dict[str, int]]
STAGES: tuple[str, ...] = ("attention", "gate", "experts", "shared experts and dense layers")
STAGES += ("captured layers", "head", "cache and prefetch", "waiting for disk", "waiting for RAM")
STAGES += ("sampling", "rest")
"""All stages of a token's time.  ``attention`` has the router's matrix where one kernel computes
both; ``captured layers`` are those of one CUDA graph; ``sampling`` is all that lies between two
steps, ``rest`` the embedding and position tables."""


@dataclass
class StepRecord:
    """One step that read or gave ``tokens`` tokens: when it began, in seconds since the profile's
    start, the bytes that came from each slower tier meanwhile, and its seconds by stage."""

    kind: str
    tokens: int
    began: float
    moved: dict[str, int]
    seconds: dict[str, float]


class Profiler(Timer):
    """Time by stage, step by step, and the gates' choices by MoE layer index.
    ``moved`` counts each slower tier's bytes so far; ``wait`` waits for the device.

    ``uses[moe_layer][expert]`` counts tokens; ``hits``, ``misses`` and, of the misses, ``coming``,
    those whose read had begun, are the cache's counts: in prefill a pass's distinct experts.
    """

    def __init__(
        self, layers: int, experts: int, since: float, moved: Moved, wait: Callable[[], None] | None
    ):
        self.passes: list[StepRecord] = []
        self.uses = [[0] * experts for _ in range(layers)]
        self.hits, self.misses, self.coming = ([0] * layers for _ in range(3))
        # Indices of the last steps over few tokens, by layer.
        self.routes = deque[list[list[list[int]]]](maxlen=REPLAYED)
        self._origin, self._count, self._wait = since, moved, wait
        self._seconds: dict[str, float] = {}
        self._began = self._last = 0.0
        self._moved: dict[str, int] = {}

    @informs
    def begin(self) -> None:
        """A step starts; the time since the one before went into sampling."""
        self.between_steps()
        self._moved, self._seconds = self._count(), {}
        self._began = self._last = perf_counter()

    @informs
    def mark(self, stage: str, now: float | None = None) -> None:
        """The time since the last mark, until ``now`` of ``perf_counter``, went into ``stage``."""
        if self._wait is not None:
            self._wait()
        now = perf_counter() if now is None else now
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
        self._last = now

    @informs
    def end(self, kind: str, tokens: int) -> None:
        """The step over ``tokens`` tokens is done."""
        self.mark("rest")
        came = {tier: size - self._moved[tier] for tier, size in self._count().items()}
        began = self._began - self._origin
        self.passes.append(StepRecord(kind, tokens, began, came, self._seconds))

    @informs
    def accepted(self) -> None:
        """The last step gave one more token, which it had drafted."""
        if self.passes:
            self.passes[-1].tokens += 1

    def between_steps(self) -> None:
        """What has passed since the last step's end was its sampling; call it at the end too."""
        if self.passes and self.passes[-1].seconds is self._seconds:
            self.mark("sampling")

    def on_layer(self, route: Route) -> None:
        """Count a gate's choice."""
        if len(route.indices) <= _FEW and (self.routes or not route.moe_layer):
            if route.moe_layer == 0:
                self.routes.append([])
            self.routes[-1].append(route.indices)
        for expert in chain.from_iterable(route.indices):
            self.uses[route.moe_layer][expert] += 1
        self.hits[route.moe_layer] += route.hits
        self.misses[route.moe_layer] += route.misses
        self.coming[route.moe_layer] += route.coming

    def seconds(self, kind: str) -> dict[str, float]:
        """Seconds by stage over all steps of ``kind``, of the stages that took any, in order."""
        steps = [step.seconds.copy() for step in list(self.passes) if step.kind == kind]
        sums = {stage: sum(step.get(stage, 0.0) for step in steps) for stage in STAGES}
        return {stage: spent for stage, spent in sums.items() if spent > 0}

    def tokens(self, kind: str) -> int:
        """Tokens of all steps of ``kind``."""
        return sum(step.tokens for step in list(self.passes) if step.kind == kind)


@contextmanager
def profiled(runtime: Runtime, origin: float) -> Iterator[Profiler]:
    """A profiler of ``runtime``, which watches it meanwhile.  Seconds count from ``origin``, of
    ``time.perf_counter()``.  Raises ``ConfigError`` on the reference path."""
    model, config = runtime.model, runtime.config
    experts = model.quantized("profile")
    # Where kernels are only queued, a mark waits for them.
    wait = (lambda: model.device.record().synchronize()) if model.device.queues else None
    store = model.store

    def moved() -> dict[str, int]:
        return {} if store is None else {name: io["bytes"] for name, io in store.stats().items()}

    profiler = Profiler(len(config.moe_layers), config.n_routed_experts, origin, moved, wait)

    def begin() -> Callable[[], None]:
        model.network.timer = experts.timer = profiler
        return experts.on_layer(profiler.on_layer)

    stop_listening = runtime.engine.call(begin)

    def end() -> None:
        stop_listening()
        profiler.between_steps()
        model.network.timer = experts.timer = None

    yield profiler
    runtime.engine.call(end)


def memory_in_use(model: LoadedModel) -> dict[str, tuple[int, dict[str, int]]]:
    """Tier -> (bytes in use now, those of the plan's components there now).  Any thread may ask."""
    plan, used, memory = model.plan, process_bytes(), model.device.memory()
    resident = sum(model.sizes.resident.values()) if model.sizes is not None else 0
    if memory is not None:  # everything is allocated at open
        names = ("KV cache", "expert slots", "read buffers")
        known = {name: plan.components[name] for name in names} | {"resident weights": resident}
        host = {name: size for name, size in plan.host.items() if name != "runtime"}
        return {"vram": (memory.allocated, known), "ram": (used, host)}
    cached, slab = model.quantized("profile").slots.present()
    buffers = min(plan.components["read buffers"], slab - cached)
    latent = sum(state.used_bytes for state in model.states)
    known = {"resident weights": resident, "KV cache": latent}
    return {"ram": (used, known | {"expert slots": slab - buffers, "read buffers": buffers})}


@dataclass(frozen=True)
class Sample:
    """Memory at one moment: seconds since the start, bytes in use by tier, and by component too."""

    seconds: float
    total: dict[str, int]
    components: dict[str, dict[str, int]]


class MemorySampler(AbstractContextManager["MemorySampler"]):
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
