"""Triton's interpreter as the tests run it: without what it does over and over, with programs in a
random order, and with a check of each address.

It looks through all names of the language before each call of a function, and makes a table of
types for each type it looks up.  It runs the programs of a launch in their order, and reads and
writes whatever lies at an address; a GPU does neither.  It leaves the language changed; here it is
behind a launch as it was, so that kernels compile in this process too.
"""

import gc
import inspect
from functools import cache
from itertools import product
from random import Random
from types import SimpleNamespace
from weakref import WeakValueDictionary

import torch


def quicken() -> None:
    """Let this process's interpreter remember both, and undo what it changes.  What it computes
    stays the same."""
    from triton import language
    from triton.runtime import interpreter

    @cache
    def builtins_of(package):  # asked for the first time before any of them is replaced
        return [name for name, value in inspect.getmembers(package) if is_builtin(value)]

    def members(package):
        return [(name, getattr(package, name)) for name in builtins_of(package)]

    def type_of(kind):
        kind = kind.element_ty if isinstance(kind, language.block_type) else kind
        return pointer if isinstance(kind, language.pointer_type) else scalar(kind)

    def patch(function):
        """What is replaced for a function that a kernel calls ends with the launch; once for a
        module."""
        scope = launches[0] if launches and launches[0]._changes else None
        if scope is None:
            launches[:] = [scope := patch_language(function)]
            seen.clear()
        elif id(function.__globals__) not in seen:
            scope._changes += patch_language(function)._changes
        seen.add(id(function.__globals__))
        return scope

    patch_language, launches, seen = interpreter._patch_lang, [], set()
    is_builtin, plain = language.core.is_builtin, interpreter._get_np_dtype
    scalar, pointer = cache(plain), plain(language.pointer_type(language.int8))
    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": members})
    interpreter._get_np_dtype = type_of
    if hasattr(interpreter, "_LangPatchScope"):  # which older ones have not
        interpreter._patch_lang = patch


def shuffle(seed) -> None:
    """Let this process's interpreter run the programs of a launch in a random order."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    set_size, set_program = Builder.set_grid_dim, Builder.set_grid_idx

    def set_grid_dim(self, *size):
        set_size(self, *size)
        programs = list(product(*map(range, size)))
        order = Random(f"{seed} {size}").sample(programs, len(programs))
        self.order = dict(zip(programs, order, strict=True))

    def set_grid_idx(self, *program):
        set_program(self, *self.order[program])

    Builder.set_grid_dim, Builder.set_grid_idx = set_grid_dim, set_grid_idx


class Bounds:
    """The memory that the running launch may touch: its tensors', and that of a tensor whose
    address it read from memory."""

    def __init__(self):
        self.kernel, self.spans = "", []
        self.pointed = WeakValueDictionary()  # tensors whose addresses kernels read, by their ids

    def begin(self, kernel, tensors):
        self.kernel, self.spans = kernel, list(set(map(span_of, tensors)))

    def allow(self, address):
        """All of the memory that a tensor has at an address."""
        for tensors in (self.pointed.values(), filter(is_tensor, gc.get_objects())):
            for tensor in tensors:
                storage = tensor.untyped_storage()
                start = storage.data_ptr()
                if start <= address < start + storage.nbytes():
                    self.pointed[id(tensor)] = tensor
                    self.spans.append((start, start + storage.nbytes()))
                    return

    def check(self, ptrs, mask):
        addresses = ptrs.data[mask.data]
        if not addresses.size:
            return
        size = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
        assert not (addresses % size).any(), f"{self.kernel}: an address is no multiple of {size}"
        first, last = int(addresses.min()), int(addresses.max())
        if any(start <= first and last + size <= end for start, end in self.spans):
            return
        inside = sum((addresses >= start) & (addresses + size <= end) for start, end in self.spans)
        count = int((inside == 0).sum())
        assert not count, f"{self.kernel}: {count} lanes are outside of the launch's tensors"


def is_tensor(held):
    return issubclass(type(held), torch.Tensor) and held.device.type == "cpu"


def span_of(tensor):
    """The bytes from the first to the last element of a tensor, as addresses."""
    start = tensor.data_ptr()
    steps = [(n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return start, start + ((sum(steps) + 1) * tensor.element_size() if tensor.numel() else 0)


def keep_inside() -> None:
    """Let this process's interpreter refuse what lies outside of the launch's memory."""
    from triton.runtime import interpreter

    bounds, builder = Bounds(), interpreter.InterpreterBuilder
    init, to_pointer = interpreter.GridExecutor._init_args_hst, builder.create_int_to_ptr

    def init_args(self, *arguments):
        positional, named = init(self, *arguments)
        tensors = [held for held in (*positional, *named.values()) if hasattr(held, "data_ptr")]
        bounds.begin(self.fn.__name__, tensors)
        return positional, named

    def int_to_ptr(self, value, kind):
        for address in value.data.flat:
            bounds.allow(int(address))
        return to_pointer(self, value, kind)

    def checked(function, pointers, mask):
        def access(self, *arguments):
            bounds.check(arguments[pointers], arguments[mask])
            return function(self, *arguments)

        return access

    interpreter.GridExecutor._init_args_hst = init_args
    builder.create_int_to_ptr = int_to_ptr
    builder.create_masked_load = checked(builder.create_masked_load, 0, 1)
    builder.create_masked_store = checked(builder.create_masked_store, 0, 2)
    builder.create_atomic_rmw = checked(builder.create_atomic_rmw, 1, 3)
