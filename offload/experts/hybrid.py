"""What the CPU computes beside a GPU.  Shapes: T tokens, D hidden_size, E routed experts, K experts
a token, N uses of experts."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from slotmoe.offload.devices.device import Device
from slotmoe.offload.experts.host import HostTier
from slotmoe.offload.experts.source import Read
from slotmoe.quant.backends.base import Records, TorchBackend


class HostCompute:
    """The CPU's part beside a GPU: it computes the host's records in place, so many ``at_once``."""

    def __init__(
        self, backend: TorchBackend, records: Records, host: HostTier, device: Device, at_once: int
    ):
        self.backend, self.records, self.host, self._device = backend, records, host, device
        self.seconds, self._x_TD, self._at_once = 0.0, torch.empty(0), at_once
        self._indices_TK = torch.empty(0, dtype=torch.int64)
        self._waiting: list[int] = []

    def begin(self, x_TD: Tensor, indices_TK: Tensor, expert_ids: list[int]) -> None:
        """A layer's input and choices, both in RAM, and which of the experts to compute."""
        self._x_TD, self._indices_TK, self._waiting = x_TD, indices_TK, expert_ids
        self._acquire()

    def end(self) -> None:
        """The layer is over, or was broken off."""
        self._waiting = []
        self.host.release_all()

    def _acquire(self) -> None:
        """Ask the host tier for the next records."""
        while self._waiting and len(self.host.acquired) < self._at_once:
            self.host.submit([self.host.acquire(self._waiting.pop(0))])

    def compute(self, ready: Sequence[Read], row: int, y_TKD: Tensor) -> None:
        """The outputs of acquired records that have arrived, into ``y_TKD`` on the GPU."""
        for read in ready:
            if read.error is not None:
                raise read.error
        started, experts = time.perf_counter(), self.host.cache.experts
        slots_E = torch.full((experts,), -1, dtype=torch.int32)
        for read in ready:
            slots_E[read.expert_id - row * experts] = self.host.acquired[read].index
        uses = (slots_E[self._indices_TK] >= 0).flatten().nonzero()[:, 0]
        tokens = uses // self._indices_TK.shape[1]
        # Each use is a token of its own with one expert, so only what is computed has memory.
        y_N1D = torch.empty(len(uses), 1, self._x_TD.shape[1])
        indices_N1 = self._indices_TK.flatten()[uses][:, None]
        self.backend.experts(self._x_TD[tokens], self.records, slots_E, indices_N1, y_N1D)
        self._device.write(y_N1D[:, 0], y_TKD.flatten(0, 1), uses)
        self.seconds += time.perf_counter() - started
        for read in ready:
            self.host.release(read)
        self._acquire()
