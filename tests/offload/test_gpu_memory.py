"""What a step allocates on a GPU beside weights and slots, counted without one: tensors without
memory, and kernels that are not launched.  The plan's scratch must hold it, and not much more."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slotmoe.model.config import read_config
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.offload.plan.memory import CUBLAS_BYTES, PREFILL_CHUNK, scratch_bytes
from slotmoe.quant.backends import pick_backend
from tests.support.meta import META, caches_of, empty, network_of


class Allocations(TorchDispatchMode):
    """Bytes of tensors that operations have made and that are alive, and the most so far, rounded
    as torch's allocator does."""

    def __init__(self):
        super().__init__()
        self._alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        leaves = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]
        before = {x.untyped_storage()._cdata for x in leaves} - self._alive.keys()
        result = operation(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == META:
                storage = tensor.untyped_storage()
                if storage._cdata in before:  # a view of what no operation here has made
                    continue
                size = -(-storage.nbytes() // 512) * 512
                entry = self._alive.setdefault(storage._cdata, [0, size])
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


@pytest.mark.usefixtures("interpreter")
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton launches its kernels where there is a GPU"
)
@pytest.mark.parametrize(
    ("geometry", "mode"), [("v2-lite", "int8"), ("v2-lite", "bf16"), ("v2", "nf4")]
)
def test_the_plans_scratch_holds_what_a_step_allocates(monkeypatch, geometry, mode):
    interpreter = pytest.importorskip(
        "triton.runtime.interpreter", reason="needs Triton, which is for Linux"
    )
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *arguments, **options: None)
    config = read_config(geometry_path(geometry))
    network = network_of(config, pick_backend(META, "triton"), mode)
    caches, steps = [*caches_of(network, 4096, [0] * 8)], [PREFILL_CHUNK - 2, 1, 1]
    with Allocations() as allocations:  # what the decoder's rows have lasts
        for counts in ([1] * 8, [1], [16], [128], [256], [PREFILL_CHUNK], steps):
            for depth in (0, 4096 - PREFILL_CHUNK):
                for cache in caches:
                    cache.length = depth
                ids_T = empty(sum(counts), dtype=torch.int64)
                network.head(network.forward(ids_T, caches[: len(counts)], counts)[-1:])
    planned = scratch_bytes(config, PREFILL_CHUNK, "triton") - CUBLAS_BYTES
    assert allocations.peak <= planned <= 1.2 * allocations.peak, (allocations.peak, planned)
