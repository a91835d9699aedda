"""The reference path: an unquantized checkpoint, all experts in memory, each in a slot for good."""

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from slotmoe.model.config import Config
from slotmoe.model.names import expert_name
from slotmoe.offload.devices.device import Device
from slotmoe.offload.experts.experts import Experts
from slotmoe.offload.experts.slots import Slots
from slotmoe.offload.experts.source import Read
from slotmoe.offload.policy.cache import make_cache
from slotmoe.quant.backends.base import Prepared, Records, TorchBackend
from slotmoe.quant.export.layout import PROJECTIONS


class _CheckpointRecords(Records):
    """Experts of a checkpoint by the number of their slot, which is the expert id."""

    def __init__(self, config: Config, weights: Mapping[str, Prepared]):
        self._config, self._weights = config, weights

    def weights(self, slot: int) -> tuple[Prepared, ...]:
        row, expert = divmod(slot, self._config.n_routed_experts)
        layer = self._config.moe_layers[row]
        return tuple(self._weights[expert_name(layer, expert, name)] for name in PROJECTIONS)


class _InMemory:
    """A ``Source`` of what is in memory: every read is done at once."""

    def read(self, expert_id: int, target: Tensor, urgency: int) -> Read:
        return Read(expert_id, urgency, done=True)

    def wait(self, reads: Collection[Read]) -> list[Read]:
        return list(reads)

    def submit(self, reads: Iterable[Read]) -> None: ...
    def promote(self, read: Read) -> None: ...
    def cancel(self, read: Read) -> bool:
        return True

    def advance(self, tokens: int) -> None: ...


def resident_experts(
    config: Config, weights: Mapping[str, Prepared], backend: TorchBackend, device: Device
) -> Experts:
    """The experts of ``weights``, which a checkpoint names."""
    layers, experts = config.moe_layers, config.n_routed_experts
    cache = make_cache("lru", len(layers) * experts, len(layers), experts)
    slots = Slots(_InMemory(), cache, 1, 0, 1, device)  # a byte stands for an expert
    slots.fill(range(len(layers) * experts), lambda: None)
    return Experts(layers, _CheckpointRecords(config, weights), slots, backend, device)
