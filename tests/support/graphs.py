"""Captured graphs without a GPU: a graph is a list of what was done to which memory."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

interpreter = pytest.importorskip(
    "triton.runtime.interpreter", reason="needs Triton, which is for Linux"
)
aten = torch.ops.aten
# What makes the host wait for a GPU, or a GPU for the host's memory: no graph can hold it.
NEEDS_THE_HOST = (aten.item, aten._local_scalar_dense, aten.nonzero, aten.masked_select)
NEEDS_THE_HOST += (aten._unique2, aten.lift_fresh)  # torch.tensor(...)


class Recorded(TorchDispatchMode):
    """What a ``Graph`` is on a GPU: the kernels and torch operations of a function with the
    memory that they had.

    ``replay`` repeats them there and calls nothing else.  A function that asks for a value on the
    host, or uses one, fails as on a GPU.
    """

    made = kernels = 0  # how many of these, and those that a GPU would launch of the latest

    def __init__(self, function):
        super().__init__()
        Recorded.made, Recorded.kernels = Recorded.made + 1, 0
        self._work, self._inside = [], False
        call, tolist = interpreter.GridExecutor.__call__, torch.Tensor.tolist
        recorder = self

        def launch(executor, *args, **kwargs):
            recorder._work.append(lambda: call(executor, *args, **kwargs))
            Recorded.kernels += 1
            recorder._inside = True  # what the interpreter does with torch is not ours
            call(executor, *args, **kwargs)
            recorder._inside = False

        def refuse(tensor):
            raise AssertionError("a graph's work asked for values on the host")

        interpreter.GridExecutor.__call__, torch.Tensor.tolist = launch, refuse
        try:
            with self:
                self.outputs = function()
        finally:
            interpreter.GridExecutor.__call__, torch.Tensor.tolist = call, tolist

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        masks = operation is aten.index.Tensor and any(
            mask is not None and mask.dtype == torch.bool for mask in args[1]
        )
        refused = operation.overloadpacket in NEEDS_THE_HOST or masks
        assert self._inside or not refused, f"a graph's work needs the host: {operation}"
        result = operation(*args, **(kwargs or {}))
        if not self._inside:
            self._work.append(partial(self._repeat, operation, args, kwargs or {}, result))
            schema = operation._schema
            views = any(returned.alias_info for returned in schema.returns)
            changes = any(one.alias_info and one.alias_info.is_write for one in schema.arguments)
            makes_memory = schema.name.startswith("aten::empty")
            Recorded.kernels += not makes_memory and (changes or not views)
        return result

    @staticmethod
    def _repeat(operation, args, kwargs, result):
        again = operation(*args, **kwargs)
        for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
            if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)

    def replay(self):
        for work in self._work:
            work()
