"""What a step allocates on a card beside weights and slots, counted without one: tensors without
memory, and kernels that are not launched.  The plan's scratch must hold it, and not much more."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slotmoe.model.config import read_config
from slotmoe.model.kv_cache import LatentCache
from slotmoe.model.names import resident_shapes, role_of
from slotmoe.model.network import DeepseekV2
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.offload.plan.memory import CUBLAS_BYTES, PREFILL_CHUNK, scratch_bytes
from slotmoe.quant.backends import pick_ops
from slotmoe.quant.export.layout import RecordLayout
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.nf4 import Nf4Weight
from slotmoe.quant.shapes import absmax_shape, codes_shape, resident_quantization

META = torch.device("meta")


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=META)


class Allocations(TorchDispatchMode):
    """Bytes of tensors that operations have made and that are alive, and the most so far, rounded
    as torch's allocator does."""

    def __init__(self):
        super().__init__()
        self._alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == META:
                storage = tensor.untyped_storage()
                entry = self._alive.setdefault(
                    storage._cdata, [0, -(-storage.nbytes() // 512) * 512]
                )
                self.now += entry[1] if entry[0] == 0 else 0
                self.peak = max(self.peak, self.now)
                entry[0] += 1
                weakref.finalize(tensor, self._gone, storage._cdata)
        return result

    def _gone(self, storage):
        entry = self._alive[storage]
        entry[0] -= 1
        if entry[0] == 0:
            self.now -= self._alive.pop(storage)[1]


class Experts:
    """What ``slotmoe.offload.card_experts`` allocates for a pass whose experts are all here."""

    def __init__(self, ops, layout):
        self._ops, self._layout, self._levels = ops, layout, empty(16)
        self._slab = empty(160, layout.record_bytes, dtype=torch.uint8)

    def __call__(self, layer, x_TD, weights_TK, indices_TK):
        y_TKD, N = empty(*indices_TK.shape, x_TD.shape[1]), indices_TK.numel()
        if len(x_TD) == 1:
            self._ops.experts_by_slot(
                x_TD, self._slab, indices_TK.int(), self._layout, self._levels, y_TKD
            )
        else:
            tokens, starts, slots = (
                empty(N, dtype=torch.int64),
                empty(161, dtype=torch.int32),
                empty(160, dtype=torch.int32),
            )
            y_ND = self._ops.experts_grouped(
                x_TD, tokens, starts, slots, self._slab, self._layout, self._levels
            )
            y_TKD.flatten(0, 1).index_copy_(0, tokens, y_ND)
        return self._ops.weighted_sum(y_TKD, weights_TK)


def resident(name, shape, mode):
    kind = resident_quantization(role_of(name), mode)
    if kind == "int8":
        return Int8Weight(empty(*shape, dtype=torch.int8), empty(shape[0]))
    if kind == "nf4":
        codes, absmax = (
            empty(*codes_shape(*shape), dtype=torch.uint8),
            empty(*absmax_shape(*shape), dtype=torch.float16),
        )
        return Nf4Weight(codes, absmax, empty(16), shape)
    return empty(*shape)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton launches its kernels where there is a GPU"
)
@pytest.mark.parametrize(("geometry", "mode"), [("v2-lite", "int8"), ("v2", "nf4")])
def test_the_plans_scratch_holds_what_a_step_allocates(monkeypatch, geometry, mode):
    pytest.importorskip("triton")
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *arguments, **options: None)
    config = read_config(geometry_path(geometry))
    weights = {name: resident(name, shape, mode) for name, shape in resident_shapes(config).items()}
    layout, peaks = RecordLayout(config.hidden_size, config.moe_intermediate_size), {}
    for tokens in (16, 128, 170, PREFILL_CHUNK):
        for context in (512, 4096):
            ops = pick_ops(torch.device("cpu"), "triton")
            network, cache = (
                DeepseekV2(config, weights, ops, Experts(ops, layout)),
                LatentCache(config, context, (config.latent_width, torch.float16), META),
            )
            network.layers, network.fused = (
                network.layers[:3],
                network.fused[:3],
            )  # a dense one and two of experts
            cache.length = context - tokens
            with Allocations() as allocations:
                network.forward(empty(tokens, dtype=torch.int64), cache)
            peaks[tokens, context] = allocations.peak - cache.nbytes
    planned = scratch_bytes(config, PREFILL_CHUNK, "triton") - CUBLAS_BYTES
    worst = max(peaks, key=peaks.__getitem__)
    assert peaks[worst] <= planned <= 1.2 * peaks[worst], (worst, peaks[worst], planned)
