"""A network's routed experts in one slab, and records to fill slabs with."""

import torch

from slotmoe.model.names import expert_name
from slotmoe.quant.backends.base import Records, SlotTable
from slotmoe.quant.codecs.codec import EXPERT_CODECS, NF4
from slotmoe.quant.export.layout import PROJECTIONS, RecordLayout
from tests.support.codes import quantize_coded

LEVELS = torch.tensor(NF4.levels)
NF4S = EXPERT_CODECS["nf4", "4"]


def write_record(record, layout, name, codes, scales):
    """Codes and scales of one projection to their places."""
    weight = layout.weight(record, name, layout.levels())
    weight.codes.copy_(codes)
    weight.scales.copy_(scales)


class SlabExperts:
    """All experts of a checkpoint in one slab, in no order; the network's ``experts``.

    With ``complete`` the slot table has all of them.  Without, it has those whose number is in
    ``in_table``.  ``calls`` are the layers that came to the host, and ``chosen`` the indices
    [T][K] of every layer that was computed anywhere, by layer.
    """

    def __init__(self, backend, config, weights, device, complete=False, in_table=(), codecs=NF4S):
        sizes = config.hidden_size, config.moe_intermediate_size
        layout = RecordLayout(*sizes, codecs, config.family.expert_biases)
        self.complete, self.in_table, self._backend = complete, in_table, backend
        self._layers, self._experts = config.moe_layers, config.n_routed_experts
        count = len(self._layers) * self._experts
        slab = torch.zeros(count, layout.record_bytes, dtype=torch.uint8)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
        for expert_id, slot in enumerate(order.tolist()):
            row, expert = divmod(expert_id, self._experts)
            for name in PROJECTIONS:
                weight = weights[expert_name(self._layers[row], expert, name)]
                coded = quantize_coded(weight, codecs.of(name))
                write_record(slab[slot], layout, name, *coded)
            for name in layout.bias_shapes:
                bias = weights[expert_name(self._layers[row], expert, name)]
                layout.part(slab[slot], name).copy_(bias)
        self._records = Records(slab.to(device), layout, layout.levels().to(device))
        self._slots_ME = order.int().view(len(self._layers), -1).to(device)
        self.calls, self.chosen = [], []

    def __call__(self, layer, x_TD, weights_TK, indices_TK):
        self.calls.append(layer)
        self.chosen.append((layer, indices_TK.tolist()))
        y_TKD = self._backend.outputs(x_TD, indices_TK)
        slots_E = self._slots_ME[self._layers.index(layer)]
        self._backend.experts(x_TD, self._records, slots_E, indices_TK, y_TKD)
        return self._backend.weighted_sum(y_TKD, weights_TK)

    def slot_table(self):
        slots_ME = self._slots_ME
        if not self.complete:
            hidden = torch.ones(self._experts, dtype=torch.bool)
            hidden[list(self.in_table)] = False
            slots_ME = slots_ME.masked_fill(hidden.to(slots_ME.device), -1)
        return SlotTable(self._records, slots_ME, self.complete)

    def passed(self, layer, indices_MTK, x_MTD):
        layers = [moe_layer for moe_layer in self._layers if moe_layer >= layer]
        self.chosen += zip(layers, indices_MTK.tolist(), strict=False)
