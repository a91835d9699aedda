"""What a step allocates on a GPU beside weights and slots, counted without one: tensors without
memory, and kernels that are not launched.  The plan's scratch must hold it, and not much more."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slotmoe.model.config import read_config
from slotmoe.model.kv_cache import LatentCache
from slotmoe.model.names import resident_shapes, role_of
from slotmoe.model.network import Network
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.offload.plan.memory import CUBLAS_BYTES, PREFILL_CHUNK, scratch_bytes
from slotmoe.quant.backends import pick_backend
from slotmoe.quant.backends.base import Records, SlotTable
from slotmoe.quant.codec import Codec
from slotmoe.quant.coded import CodedWeight
from slotmoe.quant.export.layout import RecordLayout
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.shapes import resident_quantization
from tests.support.slab import NF4S

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
    """What ``slotmoe.offload.experts`` allocates for a pass: some experts are computed by the slot
    table, the others in calls of their own."""

    def __init__(self, backend, layout):
        self._backend = backend
        self._records = Records(
            empty(160, layout.record_bytes, dtype=torch.uint8), layout, empty(2, 16)
        )

    def __call__(self, layer, x_TD, weights_TK, indices_TK):
        y_TKD, slots_E = empty(*indices_TK.shape, x_TD.shape[1]), empty(160, dtype=torch.int32)
        for _ in range(2):
            self._backend.experts(x_TD, self._records, slots_E, indices_TK, y_TKD)
        return self._backend.weighted_sum(y_TKD, weights_TK)

    def slot_table(self):
        return SlotTable(self._records, empty(2, 160, dtype=torch.int32), complete=False)


def resident(name, shape, mode):
    kind = resident_quantization(role_of(name), mode)
    if kind == "int8":
        return Int8Weight(empty(*shape, dtype=torch.int8), empty(shape[0]))
    if isinstance(kind, Codec):
        codes = empty(*kind.codes_shape(*shape), dtype=torch.uint8)
        absmax = empty(*kind.scales_shape(*shape), dtype=torch.float16)
        return CodedWeight(codes, absmax, empty(16), shape)
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
    three = replace(config, num_hidden_layers=3)  # a dense one and two with experts
    weights = {name: resident(name, shape, mode) for name, shape in resident_shapes(three).items()}
    layout = RecordLayout(config.hidden_size, config.moe_intermediate_size, NF4S)
    peaks = {}
    backend = pick_backend(META, "triton")
    row = backend.latent_row(config.kv_lora_rank, config.qk_rope_head_dim)
    for tokens in (1, 16, 128, 170, PREFILL_CHUNK):
        for context in (512, 4096):
            network = Network(three, weights, backend, Experts(backend, layout))
            cache = LatentCache(
                three, context, row, lambda shape, dtype: empty(*shape, dtype=dtype)
            )
            cache.length = context - tokens
            with Allocations() as allocations:
                network.head(network.forward(empty(tokens, dtype=torch.int64), [cache])[-1:])
            peaks[tokens, context] = allocations.peak
    planned = scratch_bytes(config, PREFILL_CHUNK, "triton") - CUBLAS_BYTES
    worst = max(peaks, key=peaks.__getitem__)
    assert peaks[worst] <= planned <= 1.2 * peaks[worst], (worst, peaks[worst], planned)
