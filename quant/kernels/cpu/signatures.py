"""What the native functions take, in one table: arguments are checked and results allocated by it,
before the native side sees a pointer.

A row of `SIGNATURES` is a function's C arguments in order:

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
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from operator import itemgetter

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
_SOURCE = "source:source[N,K] type N K"
_LEVELS = "levels:f32[L] L"

SIGNATURES = {
    # y = x W^T; each of G groups of W's rows multiplies its own row of a token
    "linear": "w:bound x:f32[T,G,K] T G >y:f32[T,N]",
    "pack_int8": f"w:i8[N,K] N K packed:{INT8}",
    # y = x / sqrt(mean(x^2) + eps) * weight
    "rms_norm": "x:f32[T,K] weight?:f32[K] T K eps:float >y:f32[T,K]",
    "layer_norm": "x:f32[T,K] weight:f32[K] bias:f32[K] T K eps:float >y:f32[T,K]",
    # y = residual + (others + down(activation(gate x, up x))), one rounding a sum, as torch adds
    "mlp": "w:bound x:f32[T,H] T residual?:f32[T,H] others?:f32[T,H] >y:f32[T,H]",
    # x through those of each token's experts whose slot is a row of the slab, into y, unweighted;
    # where it is negative, y is left as it is
    "experts_by_slot": "record:bound x:f32[T,H] T K indices:i64[T,K] slots:i32[E] E"
    " slab:pointer S B y:f32[T,K,H]",
    # the products are added one by one in order, from zero
    "weighted_sum": "outputs:f32[T,K,H] weights:f32[T,K] T K H >y:f32[T,H]",
    "store_latents": "latent:f32[T,W] T R P cache:pointer stride:size",
    "mla": "q:f32[T,A,W] T A cache:pointer C stride:size R P scale:float >y:f32[T,A,R]",
    "attend": "q:f32[T,A,W] T A cache:pointer C stride:size others:pointer D others_stride:size"
    " lists:i32[T,N] N R P scale:float sinks?:f32[A] >y:f32[T,A,R]",
    "grouped": "q:f32[T,A,Z] T A cache:pointer G group_bytes:size S stride:size first:size Z"
    " scale:float window:size sinks?:f32[A] >y:f32[T,A,Z]",
    "index": "q:f32[T,A,R] weights:f32[T,A] T A R keys:pointer S stride:size counts:i32[T] K"
    " >y:i32[T,K]",
    # M residual streams of DeepSeek-V4, L = (2 + M) M: what goes into a block, with the factors of
    # its result and of the streams; the streams behind it; what goes to the head, by fn [M, M, D]
    "hyper_in": "h:f32[T,M,D] fn:f32[L,M,D] base:f32[L] scale:f32[3] T M D L eps:float"
    " iterations:size hc_eps:float >x:f32[T,D] >post:f32[T,M] >comb:f32[T,M,M]",
    "hyper_out": "y:f32[T,D] h:f32[T,M,D] post:f32[T,M] comb:f32[T,M,M] T M D >h:f32[T,M,D]",
    "hyper_head": "h:f32[T,M,D] fn:f32[M,M,D] base:f32[M] scale:f32[1] T M D eps:float"
    " hc_eps:float >x:f32[T,D]",
    # a norm of each window's rows, weighted by the softmax over them of gate + bias
    "compress": "kv:f32[T,J,Z] gate:f32[T,J,Z] bias:f32[J,Z] norm:f32[Z] T J Z eps:float"
    " >y:f32[T,Z]",
    # a gated delta rule, see delta.cpp; G heads of keys, the state's columns in blocks of 32
    "delta": "inputs:f32[S,X] z:f32[T,A,V] convolution:f32[4,C] decay:f32[A] bias:f32[B]"
    " norm:f32[V] before:f32[A,K,V] after:f32[A,K,V] S X C T G A K V B past:size folded:size"
    " by_channel:size eps:float >y:f32[T,A,V]",
    "gated": "x:f32[T,K] gate:f32[T,K] T K >y:f32[T,K]",
    # each head's query times its first N rows of kv_b; its latent through the other V rows
    "absorb_query": "kv_b:bound q:f32[T,A,N] T >y:f32[T,A,R]",
    "absorb_value": "kv_b:bound latent:f32[T,A,R] T >y:f32[T,A,V]",
    # the pairs (x0, x1), (x2, x3), ..., or of two halves, times the table
    "rotate": "x:f32[T,A,P] table:c64[T,P/2] halves:size T A P >y:f32[T,A,P]",
    # (cos, sin) of positions times frequencies, the same bits on every system
    "rotations": "positions:f32[T] frequencies:f32[C] T C scale:float >y:c64[T,C]",
    # best first, of equals the lower index; the bias takes part in the choice alone
    "route": "router:bound logits:f32[T,E] bias?:f32[E] chosen?:i64[T,K] T E >weights:f32[T,K]"
    " >indices:i64[T,K]",
    # checked by hand, which is quicker: it runs once a token
    "decode": "decoder:pointer first:size count:size h:pointer tokens:pointer slots:pointer"
    " slab:pointer records:size record_stride:size record:pointer x:pointer experts:pointer"
    " post:pointer comb:pointer y:pointer norms:pointer weights:pointer indices:pointer"
    " reached:pointer seconds:pointer",
    # of offload/policy/cache.py, which gives addresses of its own arrays
    "judge": "policy:pointer layer:size used:pointer T K now:size x:pointer F D signs:pointer",
    "least": "policy:pointer id:size now:size found:pointer",
    # an id that is drawn, -1 where that is not certain
    "choose": "x:f32[V] V temperature:double top_p:double top_k:size min_p:double number:double"
    " >chosen:i64[1]",
    "quantize_nf4": f"{_SOURCE} levels:f32[16] >codes:u8[N/16,K/64,512] >absmax:f16[N/16,K/64,16]",
    "quantize_int8": f"{_SOURCE} >w:i8[N,K] >scale:f32[N]",
    "coded_error": "w:bound source:source[N,K] type >sums:f64[N/16,2]",
    # of encode.h; B columns share a scale
    "fit_rows": f"{_SOURCE} weights:f32[K] {_LEVELS} starts:f32[C] C B >scales:f32[N,X]",
    "code_rows": f"{_SOURCE} scales:f32[N,X] {_LEVELS} B >codes:u8[N,Y]",
    "fit_columns": f"x:f32[B,N] B N weights:f32[B] {_LEVELS} starts:f32[C] C >scales:f32[N]",
    "feed_back": f"x:f32[B,N] B N u:f32[B,B] scales:f32[N] {_LEVELS} >q:f32[B,N] >errors:f32[B,N]",
    "descend": f"gradient:f32[B,N] B N h:f32[B,B] scales:f32[N] {_LEVELS} q:f32[B,N]",
    "int8_error": f"{_SOURCE} w:i8[N,K] scale:f32[N] >sums:f64[N,2]",
}
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
        self._native = getattr(library, f"slotmoe_{name}")
        self._native.argtypes = [C_TYPES.get(kind, ctypes.c_int64) for kind in kinds]

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
        self.run(*self._in_order(arguments))
        return results

    def run(self, *arguments: object) -> None:
        """Call the function with its C arguments, unchecked, and raise what its status says."""
        if status := self._native(*arguments):
            refusal = _REFUSED.get(status)
            raise ValueError(refusal) if refusal else MemoryError("no memory for the kernels' work")
