"""Networks on the native kernels, with random weights, and those of the reference path."""

import torch

from slotmoe.model.attention import new_state
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.config import parse_config
from slotmoe.model.names import EMBEDDING, HEAD, role_of
from slotmoe.model.network import Network
from slotmoe.offload.devices.device import Device
from slotmoe.offload.experts.experts import Experts
from slotmoe.offload.experts.slots import CheckpointRecords, resident_slots
from slotmoe.quant.backends.base import TorchBackend, new
from slotmoe.quant.backends.native import NativeBackend
from slotmoe.quant.codecs.codec import Codec
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight, int8_by_torch, levels_of
from slotmoe.quant.kernels.cpu.bindings import load
from slotmoe.quant.shapes import resident_quantization
from tests.support.codes import quantize_coded
from tests.support.slab import SlabExperts
from tests.support.tiny import random_weights


class ByRule(TorchBackend):
    """The reference path but for a delta rule, which the native kernel computes in float32 too."""

    _native, delta = load(), NativeBackend.delta


class LayerByLayerOps(NativeBackend):
    """The native kernels, one operation after the other."""

    def decoder(self, *given):
        return None


def network_of(raw, resident, ops):
    """A network with the backend ``ops`` on random weights for the config ``raw``."""
    config, weights = parse_config(raw), random_weights(raw)

    def stored(name, weight):
        quantization = resident_quantization(role_of(name), resident, name)
        if quantization == "int8":
            weight = Int8Weight(*int8_by_torch(weight))
        elif isinstance(quantization, Codec):
            coded = quantize_coded(weight, quantization)
            weight = CodedWeight(*coded, levels_of(quantization), tuple(weight.shape))
        elif weight.dim() == 1:
            weight = weight.float()
        elif not weight.is_floating_point():
            weight = weight.int()
        head = config.qk_nope_head_dim, config.v_head_dim
        tied = name == EMBEDDING and config.tie_word_embeddings
        return ops.prepare(role_of(HEAD if tied else name), weight, head=head)

    prepared = {
        name: stored(name, weight) for name, weight in weights.items() if ".experts." not in name
    }
    experts = SlabExperts(ops, config, weights, torch.device("cpu"))
    return Network(config, prepared, ops, experts)


def reference_network(config, weights, kind=TorchBackend):
    """The network of the reference path on float32 ``weights``."""
    ops = kind(activation=config.activation)
    records, slots = CheckpointRecords(config, weights), resident_slots(config, Device())
    experts = Experts(config.moe_layers, records, slots, ops, Device())
    return Network(config, weights, ops, experts)


def reference_of(folder, kind=TorchBackend):
    """The same on the weights of the checkpoint in ``folder``."""
    with open_checkpoint(folder) as checkpoint:
        weights = {name: checkpoint.tensor(name).float() for name in checkpoint.infos}
    return reference_network(checkpoint.config, weights, kind)


def reference_cache(config, context, dtype=torch.float32):
    """Rows that are not written yet must never be read."""

    def unwritten(shape, dtype):
        return torch.full(shape, torch.nan, dtype=dtype)

    return new_state(config, context, lambda R, P: (R + P, dtype), unwritten)


def native_cache(network, context=40):
    return new_state(network.config, context, network.backend.latent_row, new)


def feed(network, cache, ids, sizes):
    """Logits of the first ``ids``, in passes of ``sizes`` tokens."""
    passes = torch.tensor(ids[: sum(sizes)]).split(sizes)
    return torch.cat([network.head(network.forward(ids_T, [cache])).clone() for ids_T in passes])
