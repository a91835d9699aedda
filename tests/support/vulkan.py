"""A network of random weights on a Vulkan device, and what a device there is.

Shapes: L layers, T rows, D hidden_size, E experts, M MoE layers, S positions, W latent row.
"""

import ctypes

import numpy as np
import pytest
import torch

from slotmoe.model.network import inverse_frequencies
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.quant.codecs.codec import EXPERT_CODECS
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight
from slotmoe.quant.kernels import vulkan as vk
from tests.support.native import network_of
from tests.support.slab import SlabExperts
from tests.support.tiny import random_weights

ARENA = 1 << 23
Span = vk.structure("address: address int: bytes")
Operation = vk.structure("address: reads writes int: barrier shader")
DENSE = {torch.float32: 9, torch.float16: 10, torch.bfloat16: 11}
SETS = (
    "io taken hidden low query latent queries caches sums values between logits normed activated"
    " choice experts shared scores told"
).split()


def usable():
    """Why there is no device to test on, or None."""
    try:
        problems = [info.problem.decode() for info in vk.devices()]
    except vk.VulkanError as problem:
        return str(problem)
    return problems[0] or None if problems else "there is no Vulkan device"


PROBLEM = usable()
needs_vulkan = pytest.mark.skipif(PROBLEM is not None, reason=f"no Vulkan 1.3: {PROBLEM}")


class OnDevice:
    """A network's weights on a device, and steps of its decode.  Records of experts whose number is
    in ``far`` lie in mapped memory."""

    def __init__(self, device, raw, resident="int8", codecs=EXPERT_CODECS["nf4", "4"], far=(1, 3)):
        self.device, self.backend, self.kept = device, TorchBackend(), []
        self.network = network_of(raw, resident, self.backend)
        self.config, self.geometry = self.network.config, self.network._geometry
        made = self.config, random_weights(raw), torch.device("cpu")
        experts = SlabExperts(self.backend, *made, codecs=codecs)
        self.network.experts, self.records = experts, experts._records
        self.arena, self.used = torch.empty(ARENA, dtype=torch.uint8), 0
        self.start = device.allocate(vk.DEVICE, ARENA).address
        self.addresses_ME = self._place_records(experts._slots_ME, far)
        self.model = self._model()
        device.write(self.start, self.arena.data_ptr(), 1, self.used)
        self.arena = None
        self.decoder = device.decoder(self.model)
        self.views = self.decoder.views
        self.views.table[:] = self.addresses_ME
        self.frequencies_C = inverse_frequencies(self.config.rope, self.config.qk_rope_head_dim)

    def put(self, tensor):
        """Its address; it comes there with the others in `_model`, or when it is put alone."""
        data = tensor.contiguous().reshape(-1).view(torch.uint8)
        if self.arena is None:
            address = self.device.allocate(vk.DEVICE, data.nbytes).address
            self.device.write(address, data.data_ptr(), 1, data.nbytes)
            return address
        address, self.used = self.start + self.used, self.used + -(-data.nbytes // 256) * 256
        self.arena[address - self.start :][: data.nbytes] = data
        return address

    def _place_records(self, slots_ME, far):
        slab = self.records.slab
        mapped = self.device.allocate(vk.MAPPED, slab.nbytes)
        ctypes.memmove(mapped.mapped, slab.data_ptr(), slab.nbytes)
        near = self.put(slab)
        starts_E = [mapped.address if e in far else near for e in range(slots_ME.shape[1])]
        offsets_ME = slots_ME.numpy().astype(np.uint64) * np.uint64(slab.shape[1])
        return offsets_ME + np.array(starts_E, np.uint64)

    def matrix(self, weight):
        if weight is None:
            return vk.Matrix()
        if isinstance(weight, Int8Weight):
            return vk.Matrix(0, *weight.shape, self.put(weight.q), self.put(weight.scale))
        if isinstance(weight, CodedWeight):
            parts = map(self.put, (weight.codes, weight.scales, weight.levels))
            return vk.Matrix(weight.kind, *weight.shape, *parts)
        return vk.Matrix(DENSE[weight.dtype], *weight.shape, self.put(weight))

    def _layer(self, layer):
        a, mlp, put = layer.attention, layer.mlp, self.put
        norms = {"input_norm": put(layer.input_layernorm), "latent_norm": put(a.kv_a_layernorm)}
        norms["next_norm"] = put(layer.post_attention_layernorm)
        if a.q_a_layernorm is not None:
            norms["query_norm"] = put(a.q_a_layernorm)
        query = a.q_proj if a.q_a_proj is None else a.q_a_proj
        matrices = {"query": query, "query_b": a.q_b_proj, "latent": a.kv_a_proj}
        matrices |= {"kv_b": a.kv_b_proj, "out": a.o_proj, "gate": layer.gate}
        if mlp is not None:
            matrices |= {"mlp_gate": mlp.gate_proj, "mlp_up": mlp.up_proj}
            matrices["mlp_down"] = mlp.down_proj
        if layer.gate_bias is not None:
            norms["gate_bias"] = put(layer.gate_bias)
        placed = {name: self.matrix(weight) for name, weight in matrices.items()}
        return vk.Layer(**norms, **placed)

    def _model(self):
        network, g, layout = self.network, self.geometry, self.records.layout
        router = g.router
        layers = [self._layer(layer) for layer in network.layers]
        places = (*layout.gate_up_places, *layout.down_places)
        return vk.Model(
            layers=len(layers),
            hidden=self.config.hidden_size,
            vocabulary=self.config.vocab_size,
            **dict(zip(("heads", "n", "p", "r", "v"), g[:5], strict=True)),
            halves=g.halves,
            eps=g.eps,
            latent_eps=g.latent_eps,
            scale=g.softmax_scale,
            experts=self.config.n_routed_experts,
            groups=router.n_group,
            kept=router.topk_group,
            top_k=router.top_k,
            group_best=router.group_best,
            scoring=("softmax", "sigmoid").index(router.scoring),
            normalized=router.normalized,
            factor=router.factor,
            intermediate=layout.moe_intermediate_size,
            gate_up=layout.codecs.gate_up.kind,
            down=layout.codecs.down.kind,
            places=(ctypes.c_int64 * 5)(*places),
            levels=self.put(layout.levels()),
            embedding=self.matrix(network.embed_tokens),
            head=self.matrix(network.lm_head),
            norm=self.put(network.norm),
            layer=(vk.Layer * len(layers))(*layers),
        )

    def cache(self, context=96):
        """The address of a sequence's latents [L, S, W], and the bytes of a layer: all NaN."""
        layers, width = self.config.num_hidden_layers, self.geometry.R + self.geometry.P
        rows = torch.full((layers, context, width), torch.nan, dtype=torch.float16)
        return self.put(rows), rows[0].nbytes

    def step(self, ids, positions, caches, first=None, last=None, **more):
        """What `Decoder.submit` takes for a row each of these."""
        views, T = self.views, len(ids)
        rope_TC = self.backend.rotations(
            torch.tensor(positions, dtype=torch.float32),
            self.frequencies_C,
            self.config.rope.table_scale,
        )
        lists = [
            np.array(ids, np.int64),
            np.array(positions, np.int64),
            np.array([start for start, _ in caches], np.uint64),
            np.array([size for _, size in caches], np.int64),
        ]
        self.kept = [lists, rope_TC, *more.values()]
        pointers = {name: item.data_ptr() for name, item in more.items()}
        ends = views.begin if first is None else first, views.logits_end if last is None else last
        tables = (item.ctypes.data for item in lists)
        return vk.Step(T, *ends, *tables, rope_TC.data_ptr(), **pointers)

    def run(self, *arguments, **more):
        """Do a step; logits float32 [T, V]."""
        step = self.step(*arguments, **more)
        self.decoder.run(step)
        return torch.from_numpy(self.views.logits[: step.rows].copy())

    def span(self, name):
        """Where a set's memory is, and its bytes."""
        spans = ctypes.cast(self.decoder.told.spans, ctypes.POINTER(Span))
        return spans[SETS.index(name)].address, spans[SETS.index(name)].bytes

    def read(self, name, dtype=torch.float32):
        """A set's memory."""
        address, size = self.span(name)
        host = torch.empty(size, dtype=torch.uint8)
        if size:
            self.device.read(address, host.data_ptr(), 1, size)
        return host.view(dtype)

    def plan(self, first=None, last=None):
        """Operations of a submit."""
        ends = self.views.begin if first is None else first, last or self.views.logits_end
        operations, count = (Operation * 999)(), ctypes.c_int64()
        vk.call("plan", self.decoder.handle, *ends, operations, 999, ctypes.byref(count))
        return operations[: count.value]
