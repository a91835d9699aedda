"""A network's experts on its device, without an engine."""

import torch

from slotmoe.quant import nf4


class DeviceExperts:
    """All routed experts in one slab (uint8 [S, record_bytes]), found by tables on the device
    (int32 [E], of each layer), as an engine whose slots hold every expert has them."""

    def __init__(self, ops, layout, slab, tables, on_device=True):
        self.ops, self.layout, self.slab, self.tables = ops, layout, slab, tables
        self.on_device, self.calls = on_device, 0
        self._levels = torch.tensor(nf4.LEVELS, device=slab.device)

    def __call__(self, layer, x_TD, weights_TK, indices_TK):
        self.calls += 1
        y_TKD = torch.empty(*indices_TK.shape, x_TD.shape[1], device=x_TD.device)
        slots_TK = self.tables[layer][indices_TK]
        self.ops.experts_by_slot(x_TD, self.slab, slots_TK, self.layout, self._levels, y_TKD)
        return self.ops.weighted_sum(y_TKD, weights_TK)
