"""What the native functions take, by signatures.txt: arguments are checked and results allocated by
it, before the native side sees a pointer.

A line has a function's C arguments in order:

    x:f32[T,K]    a tensor: contiguous, on the CPU, of this dtype and shape; `x?:` may be None
    s:source[T,K] the same, of any dtype of `SOURCE_TYPES`
    >y:f32[T,N]   a result, allocated here
    w:bound       what is bound for native calls (`Bound`): its address is passed, and it sets sizes
    T             a size; `type` is that of the source
    eps:float     a value that is passed on as it is

A size is a number or a letter: T tokens, W [N, K], H hidden, A heads; the first tensor that has the
letter sets it, unless the caller does.  N/16 is N / 16 rounded up, K/64+2 two more.
"""

import ctypes
import re
import zlib
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    **{"f16": torch.float16, "f32": torch.float32, "f64": torch.float64, "c64": torch.complex64},
    "f8_e8m0": torch.float8_e8m0fnu,
    **{"u8": torch.uint8, "i8": torch.int8, "i32": torch.int32, "i64": torch.int64},
}
SOURCE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # `Source` of isa.h
INT8 = "i8[N/16,K/64,1024]"  # tiled
C_TYPES: dict[str, type] = {  # all others are sizes
    **dict.fromkeys(("pointer", "bound"), ctypes.c_void_p),
    **{"pointers": ctypes.POINTER(ctypes.c_void_p), "int64s": ctypes.POINTER(ctypes.c_int64)},
    **{"type": ctypes.c_int, "float": ctypes.c_float, "double": ctypes.c_double},
}
_TABLE = Path(__file__).with_name("signatures.txt").read_text(encoding="utf-8")
CHECKSUM = zlib.crc32(_TABLE.encode())
"""Of signatures.txt, as setup.py gives it to layout.cpp."""
_ROWS = re.sub(r"\n +", " ", _TABLE)
SIGNATURES: dict[str, str] = dict(re.findall(r"^(\w+): (.+)$", _ROWS, re.MULTILINE))
_REFUSED = {
    1: "the kernels refused an argument: sizes must be at least 1, levels finite, indices"
    " experts, and slots rows of the slab",
    2: "the source holds NaN or infinity",
    3: "a block's largest magnitude is beyond float16 (65504)",
}


class TensorSpec:
    """A tensor of the table, `name:dtype[sizes]`, or a matrix of a structure."""

    def __init__(self, text: str) -> None:
        name, _, self._text = text.partition(":")
        dtype, _, sizes = self._text.removesuffix("]").partition("[")
        self.optional, self.name = name.endswith("?"), name.strip(">?")
        self.is_matrix, self._is_source = dtype == "matrix", dtype == "source"
        self.dtypes = tuple(SOURCE_TYPES if self._is_source or self.is_matrix else [DTYPES[dtype]])
        # A letter, what divides it and what is added; a number has no letter.
        self._sizes: list[tuple[str, int, int]] = []
        for size in sizes.split(","):
            letter, _, rest = size.partition("/")
            divisor, _, more = rest.partition("+")
            of_letter = letter, int(divisor or 1), int(more or 0)
            self._sizes.append(("", 1, int(size)) if size.isdigit() else of_letter)

    def shape(self, sizes: dict[str, int]) -> list[int]:
        """The shape with these sizes."""
        shape = []
        for letter, by, more in self._sizes:
            shape.append(-(-sizes[letter] // by) + more if letter else more)
        return shape

    def check(self, tensor: object, sizes: dict[str, int]) -> int | None:
        """The tensor's address; `sizes` gets the letters that it lacks. Raises `ValueError`."""
        if tensor is None and self.optional:
            return None
        if not isinstance(tensor, Tensor) or not tensor.is_cpu or tensor.layout != torch.strided:
            raise ValueError(f"{self.name} must be a dense CPU tensor")
        if tensor.dtype not in self.dtypes:
            expected = " or ".join(str(dtype) for dtype in self.dtypes)
            raise ValueError(f"{self.name} is {tensor.dtype}, expected {expected}")
        if self._is_source:
            sizes["type"] = SOURCE_TYPES[tensor.dtype]
        self.fit(tensor.shape, sizes)
        if not tensor.is_contiguous() or tensor.is_conj():
            raise ValueError(f"{self.name} must be contiguous, and not conjugated lazily")
        return tensor.data_ptr()

    def fit(self, shape: Sequence[int], sizes: dict[str, int]) -> None:
        """Check the shape as `check` does."""
        if len(shape) != len(self._sizes):
            raise ValueError(f"{self.name} has shape {tuple(shape)}, expected {self._text}")
        for (letter, by, more), actual in zip(self._sizes, shape, strict=True):
            size = sizes.setdefault(letter, actual) if letter else 0
            if (size != actual or by > 1 or more) and actual != -(-size // by) + more:
                own = dict(zip((letter for letter, *_ in self._sizes), shape, strict=True))
                wanted = tuple(self.shape(own | sizes))
                raise ValueError(f"{self.name} has shape {tuple(shape)}, expected {wanted}")


tensor_spec = cache(TensorSpec)


class Bound:
    """A structure for native calls, which points into ``memory``, and the sizes that it sets."""

    def __init__(self, native: ctypes.Structure, sizes: dict[str, int], *memory: object):
        self.address, self.native, self.sizes = ctypes.addressof(native), native, sizes
        self._memory = memory

    def agree(self, sizes: dict[str, int]) -> None:
        """Give `sizes` what it lacks of these.  Raises `ValueError` where they differ."""
        for letter, size in self.sizes.items():
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"{letter} is {sizes[letter]} and {size}, expected one")


class NativeFunction:
    """A native function with its row of the table."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        words = SIGNATURES[name].split()
        inputs = [word for word in words if ":" in word and ">" not in word]
        results = [word for word in words if ">" in word]
        self._letters = [word for word in words if ":" not in word]
        # None: a value, or bound
        self._inputs = [TensorSpec(word) if "[" in word else None for word in inputs]
        self._results = list(map(TensorSpec, results))
        self._in_order = itemgetter(*map([*inputs, *results, *self._letters].index, words))
        kinds = ["pointer" if "[" in word else word.rpartition(":")[2] for word in words]
        self.native = getattr(library, f"slotmoe_{name}")
        self.native.argtypes = [C_TYPES.get(kind, ctypes.c_int64) for kind in kinds]

    def __call__(self, *values: object, **sizes: int) -> Tensor:
        """The first of the `results`."""
        return self.results(*values, **sizes)[0]

    def results(self, *values: object, **sizes: int) -> list[Tensor]:
        """The function's results of values, checked, the table's in order; the last may be left out
        where they may be None.  Raises `ValueError` for a bad argument and `MemoryError`.  It runs
        for each token, so it makes few calls of Python."""
        assert len(values) <= len(self._inputs)
        arguments: list[object] = []
        for spec, value in zip_longest(self._inputs, values):
            if spec is not None:
                value = spec.check(value, sizes)
            elif isinstance(value, Bound):
                value.agree(sizes)
                value = value.address
            arguments.append(value)
        results = list[Tensor]()
        for result in self._results:
            results.append(torch.empty(result.shape(sizes), dtype=result.dtypes[0]))
            arguments.append(results[-1].data_ptr())
        for letter in self._letters:
            arguments.append(sizes[letter])
        check(self.native(*self._in_order(arguments)))
        return results


def check(status: int) -> None:
    """Raise what a native function's status says."""
    if status:
        refusal = _REFUSED.get(status)
        raise ValueError(refusal) if refusal else MemoryError("no memory for the kernels' work")
