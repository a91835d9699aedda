"""Where the time of a run goes: what ``slotmoe profile`` watches.

Network, experts and runtime say what they have just done: ``mark(stage)`` gives ``stage`` the time
since the last mark.  It costs a fraction of a microsecond, a few hundred times a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from time import perf_counter

from slotmoe.border import Timer
from slotmoe.offload.experts.experts import Route
from slotmoe.offload.runtime import Runtime

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
    """Time by stage, step by step, and the gates' choices by MoE layer index ("row").
    ``moved`` counts each slower tier's bytes so far; ``wait`` waits for the device.

    ``uses[row][expert]`` counts tokens; ``hits``, ``misses`` and, of the misses, ``coming``, those
    whose read had begun, are the cache's counts: in prefill a pass's distinct experts.
    """

    def __init__(
        self, layers: int, experts: int, since: float, moved: Moved, wait: Callable[[], None] | None
    ):
        self.passes: list[StepRecord] = []
        self.uses = [[0] * experts for _ in range(layers)]
        self.hits, self.misses, self.coming = ([0] * layers for _ in range(3))
        self._origin, self._count, self._wait = since, moved, wait
        self._seconds: dict[str, float] = {}
        self._began = self._last = 0.0
        self._moved: dict[str, int] = {}

    def begin(self) -> None:
        """A step starts; the time since the one before went into sampling."""
        self.between_steps()
        self._moved, self._seconds = self._count(), {}
        self._began = self._last = perf_counter()

    def mark(self, stage: str, now: float | None = None) -> None:
        """The time since the last mark, until ``now`` of ``perf_counter``, went into ``stage``."""
        if self._wait is not None:
            self._wait()
        now = perf_counter() if now is None else now
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def end(self, kind: str, tokens: int) -> None:
        """The step over ``tokens`` tokens is done."""
        self.mark("rest")
        came = {tier: size - self._moved[tier] for tier, size in self._count().items()}
        began = self._began - self._origin
        self.passes.append(StepRecord(kind, tokens, began, came, self._seconds))

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
        for expert in chain.from_iterable(route.indices):
            self.uses[route.row][expert] += 1
        self.hits[route.row] += route.hits
        self.misses[route.row] += route.misses
        self.coming[route.row] += route.coming

    def seconds(self, kind: str) -> dict[str, float]:
        """Seconds by stage over all steps of ``kind``, of the stages that took any, in order."""
        steps = [step.seconds.copy() for step in list(self.passes) if step.kind == kind]
        sums = {stage: sum(step.get(stage, 0.0) for step in steps) for stage in STAGES}
        return {stage: spent for stage, spent in sums.items() if spent > 0}

    def tokens(self, kind: str) -> int:
        """Tokens of all steps of ``kind``."""
        return sum(step.tokens for step in list(self.passes) if step.kind == kind)


def attach(runtime: Runtime, origin: float) -> tuple[Profiler, Callable[[], None]]:
    """A profiler that watches ``runtime`` from now on, and what ends that.  Seconds count from
    ``origin``, of ``time.perf_counter()``.  Raises ``ConfigError`` on the reference path."""
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

    return profiler, lambda: runtime.engine.call(end)
