"""Reading ahead: what to read before a gate asks for it.

Two horizons: ``layer`` guesses the next MoE layer's experts from the present one's input.
``table`` is certain: some first gates choose by token.

A guess costs nothing while disk and link would idle; else a wrong one delays a demand.  So what is
expected to be wasted has to fit into the time in which the step demands nothing: with a share ``p``
of right guesses, ``idle seconds * bandwidth / (1 - p)`` bytes may be on their way ahead.

Shapes: T tokens, D hidden_size, E routed experts, K experts a token.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from itertools import pairwise

from torch import Tensor

from slotmoe.model.config import Config
from slotmoe.model.layers import as_tensor
from slotmoe.model.names import EXPERTS_OF, GATE, LOGIT_BIAS, POST_NORM, layer_tensor
from slotmoe.offload.devices.device import Download, Event
from slotmoe.offload.experts.slots import Slots
from slotmoe.quant.backends.base import Prepared, TorchBackend

_RANKS = 6  # guesses of a token for a layer; later ones are hardly better than chance
HORIZONS = ("layer", "table")


@dataclass
class Accuracy:
    """Counts of one horizon: guesses, those ``right`` by the gate, what gates ``asked`` for where
    there were guesses; of guesses that were read, those ``used``, ``wasted`` and ``cancelled``."""

    guessed: int = 0
    right: int = 0
    asked: int = 0
    used: int = 0
    wasted: int = 0
    cancelled: int = 0


def _total(counts: Iterable[Accuracy]) -> dict[str, int]:
    """The sum, count by count."""
    return asdict(Accuracy(*map(sum, zip(*map(astuple, counts), strict=True))))


class Average:
    """Exponential moving average from ``start`` on."""

    def __init__(self, weight: float, start: float):
        self.value, self._weight = start, weight

    def add(self, value: float) -> None:
        self.value += self._weight * (value - self.value)


@dataclass
class _Guesses:
    """What a MoE layer is expected to use: expert ids that ``horizon`` named, the best first; which
    were ``absent`` from memory then; and what is ``reading``, by the horizon that named it."""

    named: list[int] = field(default_factory=list)
    horizon: str = "layer"
    absent: list[int] = field(default_factory=list)
    reading: dict[int, str] = field(default_factory=dict)


class Lookahead:
    """Guesses each MoE layer's experts before its gate has chosen, by its norm and gate on the
    residual stream of the layer before; and says which to read into ``target``: records of
    ``record_bytes``, ``bandwidth()`` a second.

    RMSNorm is scale-free, so the residual itself is not needed: dividing the present norm's weight
    out of its output and multiplying the next one's in gives what the next norm would give.

    ``active`` says, for the present pass, whether guesses pay.  While they do, the engine stops
    after every gate, so that a layer's input tells the guesses for the next one.
    """

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, Prepared],
        backend: TorchBackend,
        record_bytes: int,
        target: Slots,
        bandwidth: Callable[[], float],
        download: Callable[[Tensor], Download],
    ):
        """``download`` is the device's."""
        layers, self._experts = config.moe_layers, config.n_routed_experts
        self._record_bytes, self._target, self._bandwidth = record_bytes, target, bandwidth
        self._layers = [_Guesses() for _ in layers]
        # Share of right guesses; seconds a layer: idle disk, guessing; experts that a layer misses.
        self._right = {horizon: Average(0.02, 0.5) for horizon in HORIZONS}
        self._idle, self._cost = Average(0.05, 0.0), Average(0.05, 5e-5)
        self._missing = Average(0.01, float(self._experts))
        # Since when all demands are met but for copies; how long it was, until that is counted.
        self._free_since: float | None = None
        self._copies, self._free_for = list[Event](), 0.0
        self._considered = 0
        self.by_moe_layer = {horizon: [Accuracy() for _ in layers] for horizon in HORIZONS}
        layers = layers[: len(layers) - config.mtp]  # nothing is guessed of that head
        norms = [as_tensor(weights[layer_tensor(layer, POST_NORM)]) for layer in layers]
        self._ratios = [after / before.where(before != 0, 1.0) for before, after in pairwise(norms)]
        self._gates = [
            (weights[layer_tensor(layer, GATE)], weights.get(layer_tensor(layer, LOGIT_BIAS)))
            for layer in layers
        ]
        # Int32 [vocab, K] in RAM: the experts of each token in the first MoE layers, where gates go
        # by the token.
        names = (layer_tensor(layer, EXPERTS_OF) for layer in range(config.num_hash_layers))
        self._tables = [as_tensor(weights[name]).cpu() for name in names]
        self._backend, self._download = backend, download
        self._top_k, self.active = min(config.num_experts_per_tok, _RANKS), False

    def begin(self) -> None:
        """A pass begins: forget all guesses; what they read is the target's to drop."""
        self._layers = [_Guesses() for _ in self._layers]
        self._free_since, self._free_for = None, 0.0
        self.active = self.pays()

    def read_tables(self, ids: list[int]) -> None:
        """Read first what gates that go by the token choose for ``ids``; no guess replaces that."""
        for moe_layer, table in enumerate(self._tables):
            uses = Counter(table[ids].flatten().tolist())
            self.guess(moe_layer, [expert for expert, _ in uses.most_common()], "table")
        self.more(-1)

    def guess_layer(self, moe_layer: int, x_TD: Tensor) -> None:
        """Guess the experts of the layer behind ``moe_layer`` by the latter's input, and start to
        read."""
        if len(self._tables) <= moe_layer + 1 < len(self._gates) and self.active:
            started = time.perf_counter()
            experts = self._likely(moe_layer + 1, x_TD * self._ratios[moe_layer])
            if len(x_TD) == 1:
                self._cost.add(time.perf_counter() - started)
            self.guess(moe_layer + 1, experts, "layer")
        self.more(moe_layer)

    def _likely(self, moe_layer: int, x_TD: Tensor) -> list[int]:
        """The experts that any token is likely to use of a layer whose gate sees this, those of
        most tokens first."""
        gate, bias = self._gates[moe_layer]
        logits_TE = self._backend.linear(x_TD, gate)
        logits_TE = logits_TE if bias is None else logits_TE + as_tensor(bias)
        best_TK = self._download(logits_TE).get().topk(self._top_k, dim=-1).indices
        return [expert for expert, _ in Counter(best_TK.flatten().tolist()).most_common()]

    def stats(self) -> dict[str, dict[str, int]]:
        """The counts of each horizon, over all MoE layers."""
        return {horizon: _total(layers) for horizon, layers in self.by_moe_layer.items()}

    def by_layer(self) -> list[dict[str, int]]:
        """The counts of each MoE layer, of both horizons together."""
        return [_total(both) for both in zip(*self.by_moe_layer.values(), strict=True)]

    def pays(self) -> bool:
        """Whether a pass's guesses can hide much more, a layer's reads, than making them takes."""
        self._considered += 1
        hides = self._missing.value * self._record_bytes / self._bandwidth()
        # Times change: look again now and then.
        return hides > 4 * self._cost.value or self._considered % 16 == 0

    def guess(self, moe_layer: int, experts: list[int], horizon: str) -> None:
        """What ``moe_layer`` is expected to use when it comes, the most likely first."""
        named = [moe_layer * self._experts + expert for expert in experts]
        reading = self._layers[moe_layer].reading
        absent = [expert_id for expert_id in named if expert_id not in self._target]
        self._layers[moe_layer] = _Guesses(named, horizon, absent, reading)
        for expert_id in [expert_id for expert_id in reading if expert_id not in named]:
            # The later word refutes the earlier.
            self.by_moe_layer[reading.pop(expert_id)][moe_layer].cancelled += 1
            self._target.drop(expert_id)

    def chosen(self, moe_layer: int, expert_ids: Collection[int], missing: int) -> None:
        """The gate of ``moe_layer`` has chosen ``expert_ids``, ``missing`` of them not cached:
        guesses for it were right or wrong, and wrong reads are given up."""
        if self._free_since is not None and moe_layer > 0:
            self._free_for = time.perf_counter() - self._free_since
        self._free_since = None
        self._missing.add(missing)
        guesses, wanted = self._layers[moe_layer], set(expert_ids)
        self._layers[moe_layer] = _Guesses()
        if guesses.named:
            accuracy = self.by_moe_layer[guesses.horizon][moe_layer]
            accuracy.guessed += len(guesses.named)
            accuracy.right += len(wanted.intersection(guesses.named))
            accuracy.asked += len(expert_ids)
        if guesses.absent:
            right = len(wanted.intersection(guesses.absent))
            self._right[guesses.horizon].add(right / len(guesses.absent))
        for expert_id, horizon in guesses.reading.items():
            if expert_id in wanted:
                self.by_moe_layer[horizon][moe_layer].used += 1
            else:
                self.by_moe_layer[horizon][moe_layer].wasted += 1
                self._target.drop(expert_id)

    def more(self, moe_layer: int) -> None:
        """Start reads for the layers after ``moe_layer`` (-1: all) as far as they are worth it."""
        if self._free_for:  # counted here, since no demand waits for that
            copying = sum(copy.seconds if copy.done() else math.inf for copy in self._copies)
            self._idle.add(max(0.0, self._free_for - copying))
            self._free_for = 0.0
        ahead = sum(len(guesses.reading) for guesses in self._layers) * self._record_bytes
        window = self._idle.value * self._bandwidth()
        for distance, guesses in enumerate(self._layers[moe_layer + 1 :], 1):
            if not guesses.absent:
                continue
            wrong = max(1 - self._right[guesses.horizon].value, 0.02)
            allowed = math.inf if guesses.horizon == "table" else window / wrong
            for expert_id in guesses.absent:
                if ahead >= allowed:
                    return
                if expert_id not in self._target:
                    if not self._target.prefetch(expert_id, distance):
                        return
                    guesses.reading[expert_id] = guesses.horizon
                    ahead += self._record_bytes

    def idle(self, copies: Sequence[Event] = ()) -> None:
        """All demands are met, but for ``copies``: behind these disk and link have nothing else to
        do until the next gate."""
        self._copies = [copy for copy in copies if not copy.done()]
        self._free_since = time.perf_counter()
