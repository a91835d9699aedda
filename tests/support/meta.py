"""Networks of real geometries without memory: their tensors are on torch's meta device."""

from dataclasses import replace

import torch

from slotmoe.model.attention import new_state
from slotmoe.model.names import resident_shapes, role_of
from slotmoe.model.network import Network
from slotmoe.quant.backends.base import Records, SlotTable
from slotmoe.quant.codecs.codec import Codec
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight
from slotmoe.quant.export.layout import RecordLayout
from slotmoe.quant.shapes import WIDENED, resident_quantization
from tests.support.slab import NF4S

META = torch.device("meta")


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=META)


class Experts:
    """What ``slotmoe.offload.experts`` does for a pass.  All experts have slots if ``complete``;
    else some are computed by the slot table, the others in calls of their own."""

    def __init__(self, config, backend, codecs, complete):
        layout = RecordLayout(config.hidden_size, config.moe_intermediate_size, codecs)
        slab = empty(config.n_routed_experts, layout.record_bytes, dtype=torch.uint8)
        slots_ME = empty(len(config.moe_layers), len(slab), dtype=torch.int32)
        records = Records(slab, layout, empty(2, 16))
        self._backend, self._table = backend, SlotTable(records, slots_ME, complete)

    def __call__(self, layer, x_TD, weights_TK, indices_TK):
        records, (slots_E, *_), _ = self._table
        y_TKD = empty(*indices_TK.shape, x_TD.shape[1])
        for _ in range(2):
            self._backend.experts(x_TD, records, slots_E, indices_TK, y_TKD)
        return self._backend.weighted_sum(y_TKD, weights_TK)

    def slot_table(self):
        return self._table

    def passed(self, layer, indices_MTK, x_MTD):
        pass


def _resident(name, shape, mode):
    kind = resident_quantization(role_of(name), mode)
    if kind == "int8":
        return Int8Weight(empty(*shape, dtype=torch.int8), empty(shape[0]))
    if isinstance(kind, Codec):
        codes = empty(*kind.codes_shape(*shape), dtype=torch.uint8)
        scales = empty(*kind.scales_shape(*shape), dtype=torch.float16)
        return CodedWeight(codes, scales, empty(16), shape)
    widened = role_of(name) in WIDENED
    return empty(*shape, dtype=torch.float32 if widened else torch.bfloat16)


def network_of(config, backend, mode, codecs=NF4S, complete=False):
    """Three of the model's layers, a dense one and two with experts."""
    three = replace(config, num_hidden_layers=3)
    shapes = resident_shapes(three)
    weights = {name: _resident(name, shape, mode) for name, shape in shapes.items()}
    return Network(three, weights, backend, Experts(three, backend, codecs, complete))


def caches_of(network, context, counts):
    """Caches of ``context`` positions, in which there is room for ``counts`` tokens more."""
    config, row = network.config, network.backend.latent_row
    for count in counts:
        cache = new_state(config, context, row, lambda shape, dtype: empty(*shape, dtype=dtype))
        cache.length = context - count
        yield cache


def forward(network, tokens, context):
    """The residual stream of a pass over the last ``tokens`` of so many."""
    ids_T = empty(tokens, dtype=torch.int64)
    return network.forward(ids_T, [*caches_of(network, context, [tokens])])
