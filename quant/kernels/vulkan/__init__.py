"""A Vulkan 1.3 device and a model's decode on it, through ctypes.

The functions are in the binary of the CPU kernels, where glslang and the headers of Vulkan were
there when it was built; the system's Vulkan loader is looked for when a device is asked for.  The
structures are those of device.h and decoder.h, which say what fields are.  Addresses are the
device's; memory that one names stays the caller's.
"""

import ctypes
import math
from ctypes import byref, c_char, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import cache, partialmethod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slotmoe.errors import DeviceError
from slotmoe.quant.kernels.cpu import bindings

NO_DEVICE, REFUSED, LOST, TIMED_OUT, NO_IMPORT = 2, 5, 6, 7, 8  # codes of `VulkanError`
DEVICE, MAPPED, IMPORTED = range(3)  # kinds of memory
ROWS = 8  # of a step that makes logits, and of one that is recorded once; more go in tiles
FOREVER = (1 << 63) - 1
_TYPES: dict[str, Any] = {"int": c_int64, "address": c_uint64, "pointer": c_void_p}
_TYPES |= {"double": c_double, "text": c_char * 256, "places": c_int64 * 5}


class VulkanError(DeviceError):
    """What a device or its driver refuses, by a ``code``."""

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


def structure(text: str, **types: Any) -> Any:
    """A structure with these fields; `kind:` stands before those of another kind than `int`."""
    fields, kind = list[tuple[str, Any]](), c_int64
    for word in text.split():
        if word.endswith(":"):
            kind = (_TYPES | types)[word[:-1]]
        else:
            fields.append((word, kind))
    return type("Native", (ctypes.Structure,), {"_fields_": fields})


DeviceInfo = structure("text: name problem int: kind heap")
Limits = structure("allocation import_alignment unified has_budget threads separate_copies")
Matrix = structure("kind n k address: data scale levels")
Layer = structure(
    "address: input_norm query_norm latent_norm next_norm matrix: query query_b latent kv_b out"
    " gate address: gate_bias biases matrix: mlp_gate mlp_up mlp_down",
    matrix=Matrix,
)
Model = structure(
    "double: at_once int: rows layers hidden vocabulary heads n p r v halves"
    " key_groups norm_last norm_row double: eps latent_eps scale rope_scale"
    " int: experts groups kept top_k group_best scoring normalized double: factor"
    " int: intermediate gate_up down places: places address: levels"
    " matrix: embedding head address: norm layers: layer pointer: frequencies",
    matrix=Matrix,
    layers=ctypes.POINTER(Layer),
)
Step = structure("rows first last pointer: tokens positions caches layer_bytes query_scale hidden")
_Views = structure(
    "pointer: table stopped indices weights logits hidden address: normed int: begin hidden_end"
    " logits_end bytes list: gates sums pointer: spans int: sets",
    list=ctypes.POINTER(c_int64),
)


@cache
def _function(name: str, arguments: int, gives: Any = ctypes.c_int) -> Any:
    """One of api.cpp, that takes addresses and integers of 64 bits.  Raises ``VulkanError``."""
    native = bindings.load()
    if native is None or not hasattr(native.library, "slotmoe_vulkan_open"):
        raise VulkanError(NO_DEVICE, "the kernels were built without Vulkan")
    function = native.library[f"slotmoe_vulkan_{name}"]  # a new one each time
    function.argtypes, function.restype = (c_void_p,) * arguments, gives
    return function


def call(name: str, *arguments: object) -> None:
    """Call a function of api.cpp.  Raises ``ValueError``, ``MemoryError`` and ``VulkanError``."""
    if code := _function(name, len(arguments))(*arguments):
        text = _function("error", 0, ctypes.c_char_p)().decode(errors="replace")
        plain = {1: ValueError, 4: MemoryError}.get(code)
        raise VulkanError(code, text) if plain is None else plain(text)


def devices(loader: int | None = None) -> list[Any]:
    """A ``DeviceInfo`` of each; ``problem`` says why it can't be used.  ``loader``: the address of
    a ``vkGetInstanceProcAddr`` in place of the system's.  Raises ``VulkanError``."""
    infos, count = (DeviceInfo * 16)(), c_int64()
    call("devices", loader, infos, len(infos), byref(count))
    return [*infos[: count.value]]


class Memory(NamedTuple):
    """Memory of a device: its ``address`` there and that of its first byte here, ``mapped``, unless
    it is the device's alone."""

    address: int
    mapped: int | None


class Vulkan:
    """An open device.  Its methods raise ``VulkanError``, ``MemoryError`` and, for a defect,
    ``ValueError``; behind one that says LOST or TIMED_OUT it is for ``close`` alone."""

    def __init__(self, index: int = 0, loader: int | None = None):
        self._handle, self.limits = c_void_p(), Limits()
        call("open", loader, index, byref(self._handle), byref(self.limits))

    def close(self) -> None:
        """Waits for it, and frees all memory and decoders."""
        handle, self._handle = self._handle, c_void_p()
        call("close", handle)

    def budget(self) -> tuple[int, int, int]:
        """Bytes of the device's memory, of it free, and allocated here."""
        out = (c_int64 * 3)()
        call("budget", self._handle, out)
        return out[0], out[1], out[2]

    def allocate(self, kind: int, nbytes: int, host: int | None = None) -> Memory:
        """DEVICE or MAPPED memory, or that at ``host`` as IMPORTED, in whole pages, which stays."""
        address, mapped = c_uint64(), c_void_p()
        call("allocate", self._handle, kind, nbytes, host, byref(address), byref(mapped))
        return Memory(address.value, mapped.value)

    def copy(self, copies_N3: NDArray[np.uint64]) -> int:
        """Start copies, each of a source's and a target's address and bytes, all by one submit;
        gives what ``wait`` waits for."""
        value = c_uint64()
        call("copy", self._handle, copies_N3.ctypes.data, len(copies_N3), byref(value))
        return value.value

    def _move(
        self, name: str, address: int, host: int, pieces: int, nbytes: int, *strides: int
    ) -> None:
        """Copy pieces of memory at ``host`` to the device, or back; ``strides`` from piece to
        piece, there and here, are given of several."""
        call(name, self._handle, address, host, pieces, nbytes, *(strides or (0, 0)))

    write, read = partialmethod(_move, "write"), partialmethod(_move, "read")

    def wait(self, value: int, nanoseconds: int = FOREVER) -> bool:
        """Wait for a submit or a copy; 0 only asks whether it is over."""
        reached = c_int64()
        call("wait", self._handle, value, nanoseconds, byref(reached))
        return bool(reached.value)

    def decoder(self, model: Any) -> "Decoder":
        """Raises ``ValueError`` for shapes that the shaders do not take, by name."""
        return Decoder(self._handle, model)


class Views:
    """Mapped memory of a decoder: ``table`` uint64 [MoE layers, E] is written between steps, the
    rest read behind one: ``stopped`` int32 [1], ``indices`` int32 and ``weights`` float32 [MoE
    layers, T, K], ``logits`` float32 [ROWS, V], ``hidden`` [T, D], of at
    most T rows.  ``begin``, ``gates``, ``sums`` and what ends in ``end`` are operations."""

    def __init__(self, told: Any, model: Any):
        def view(name: str, kind: Any, *shape: int) -> NDArray[Any]:
            values = (kind * math.prod(shape)).from_address(getattr(told, name))
            return np.ctypeslib.as_array(values).reshape(shape)

        moe_layers = sum(bool(model.layer[index].gate.n) for index in range(model.layers))
        choices, vocabulary = (
            (moe_layers, model.rows, model.top_k),
            bool(model.head.n) * model.vocabulary,
        )
        self.table = view("table", c_uint64, moe_layers, model.experts)
        self.stopped = view("stopped", c_int32, 1)
        self.indices = view("indices", c_int32, *choices)
        self.weights = view("weights", c_float, *choices)
        self.hidden = view("hidden", c_float, model.rows, model.hidden)
        self.logits = view("logits", c_float, ROWS, vocabulary)
        self.begin, self.gates = told.begin, told.gates[:moe_layers]
        self.sums = told.sums[:moe_layers]
        self.hidden_end, self.logits_end = told.hidden_end, told.logits_end


class Decoder:
    """A model's decode on a device, until that is closed; decoder.h says what a ``Step`` is and
    what stops it."""

    def __init__(self, device: c_void_p, model: Any):
        self.handle, self.told = c_void_p(), _Views()
        call("decoder", device, byref(model), byref(self.handle), byref(self.told))
        self.views = Views(self.told, model)

    def run(self, step: Any) -> None:
        """Do a step: one submit, and the wait for it."""
        call("run", self.handle, byref(step))
