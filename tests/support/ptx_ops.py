"""The instructions of ``tests.support.ptx``, as the manual of PTX describes them."""

import functools
import re
from functools import partial

import numpy as np

from tests.support.ptx import BASE, LANES, PtxError, loaded, stored

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {f"{kind}{8 * size}": UNSIGNED[size] for kind in "bu" for size in UNSIGNED}
TYPES |= {"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "pred": bool}
TYPES |= {"f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64}
SIZES = {kind: np.dtype(type_).itemsize for kind, type_ in TYPES.items()}
SIZES |= {"f16x2": 4, "bf16x2": 4, "f32x2": 8}
FLOATS, LANE = ("f16", "bf16", "f32", "f64"), np.arange(LANES)
NOTHING = ("fence", "membar", "griddepcontrol", "prefetch", "createpolicy")


def numbers_of(bits, kind):
    """Numbers of a type from a register's bits, which may have more."""
    if kind == "pred":
        return bits
    if bits.dtype.itemsize != SIZES[kind]:
        bits = bits.astype(UNSIGNED[SIZES[kind]])
    if kind.endswith("x2"):  # an axis more
        parts = np.ascontiguousarray(bits)[..., None].view(UNSIGNED[SIZES[kind] // 2])
        return numbers_of(parts, kind[:-2])
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(TYPES[kind])


def bits_of(numbers, kind, width):
    """A register of ``width`` bytes with these numbers."""
    if width == 0:
        return numbers
    if kind.endswith("x2"):
        parts = bits_of(numbers, kind[:-2], width // 2)
        return np.ascontiguousarray(parts).view(UNSIGNED[width])[..., 0]
    if kind == "bf16":
        bits = numbers.astype(np.float32).view(np.uint32)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        numbers = np.where(np.isnan(numbers), 0x7FFF, nearest)
    numbers = numbers.astype(TYPES[kind], copy=False)
    if kind in FLOATS:
        numbers = numbers.view(UNSIGNED[SIZES[kind]])
    return numbers.astype(UNSIGNED[width], copy=False)  # a signed number keeps its sign


def constant(text, kind):
    """A literal's bits, or None."""
    if re.match("0[fFdD]", text):
        bits = int(text[2:], 16)
    elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        bits = int(text.rstrip("U"), 0)
    elif text == "global_smem":
        bits = BASE
    else:
        return None
    if kind == "pred":
        return np.array([[bits != 0]])
    return np.array([[bits % (1 << 8 * SIZES[kind])]], UNSIGNED[SIZES[kind]])


def reader(text, kind):
    """A function of a gang: an operand's numbers."""
    if (bits := constant(text, kind)) is not None:
        numbers = numbers_of(bits, kind)
        return lambda gang: numbers
    if re.match(r"%(tid|ctaid|nctaid|laneid|warpid)\b", text):
        return lambda gang: numbers_of(gang.special[text], kind)
    ones = constant("-1", kind)  # what nothing has written, LLVM may read and not use: NaN
    return lambda gang: numbers_of(gang.regs.get(text, ones), kind)


def writer(statement, text, kind):
    """A function that puts numbers into a register."""
    if text == "_":
        return lambda gang, numbers: None
    width = statement.width(text)
    return lambda gang, numbers: gang.put(text, bits_of(numbers, kind, width))


def listed(text):
    """Names in braces, or the only one."""
    return [name.strip() for name in text.strip("{}").split(",")]


# Arithmetic: functions of numbers.


def divided(a, b):
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a) // np.where(b == 0, 1, np.abs(b))
    return np.where((a < 0) == (b < 0), quotient, -quotient).astype(a.dtype)


def folded(floats, others):
    """Of two numbers or three."""
    return lambda *x: functools.reduce(floats if x[0].dtype.kind == "f" else others, x)


def left(a, count):
    bits = 8 * a.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), 0)


def right(a, count):
    bits = 8 * a.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, 0)


def multiplied(a, b, c):
    """A float's sum in float64, which rounds the last bit wrongly once in 2**29 times."""
    return np.multiply(a, b, dtype=np.float64 if a.dtype.kind == "f" else None) + c


def widened(a, b, *c):
    type_ = np.int64 if a.dtype.kind == "i" else np.uint64
    return sum(c, a.astype(type_) * b.astype(type_))


def extracted(a, first, count):
    bits = 8 * a.itemsize
    first = np.minimum(first & 255, bits)
    size = np.minimum(count & 255, bits - first).astype(a.dtype)
    above = bits - first.astype(a.dtype) - size
    return np.where(size > 0, right(left(a, above), bits - size), 0)


def permuted(a, b, choice):
    both, result = a.astype(np.uint64) | b.astype(np.uint64) << 32, np.uint64(0)
    for place in range(4):
        chosen = (choice >> 4 * place & 15).astype(np.uint64)
        byte = both >> (chosen & 7) * 8 & 255
        sign = (byte >> 7) * 255
        result = result | np.where(chosen & 8, sign, byte) << 8 * place
    return result


def compared(relation, a, b):
    """What is not a number makes true what ends in u, and nothing else but ``nan``."""
    if a.dtype.kind != "f":
        return COMPARISONS[relation](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if relation in ("nan", "num"):
        return unordered ^ (relation == "num")
    result = COMPARISONS[relation.removesuffix("u")](a, b)
    return result | unordered if relation.endswith("u") else result & ~unordered


def converted(way, output, x):
    """An integer type takes the nearest number that it has, and 0 for NaN."""
    if way is not None:
        x = way(x.astype(np.float64))
    if output in FLOATS or x.dtype.kind != "f":
        return x
    limits = np.iinfo(TYPES[output])
    high = x >= float(limits.max)
    x = np.clip(np.where(np.isnan(x) | high, 0, x), float(limits.min), None)
    return np.where(high, limits.max, x.astype(TYPES[output]))


def packed(upper, lower, half):
    return bits_of(upper, half, 4) << 16 | bits_of(lower, half, 4)


def flushed(x):
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, x * np.float32(0), x)


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
COMPARISONS |= {"gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal}
COMPARISONS |= {"hi": np.greater, "hs": np.greater_equal}
WAYS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
# A function, its operands' types and its result's: T is the instruction's, W one twice as wide.
PURE = {name: (function, "T T T") for name, function in {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": divided, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "rem": lambda a, b: a - divided(a, b) * b,
    "min": folded(np.fmin, np.minimum), "min.NaN": folded(np.minimum, np.minimum),
    "max": folded(np.fmax, np.maximum), "max.NaN": folded(np.maximum, np.maximum),
    "min.xorsign": lambda a, b: np.copysign(np.fmin(abs(a), abs(b)), a) * np.copysign(1, b),
}.items()}  # fmt: skip
PURE |= {name: (function, "T T") for name, function in {
    "neg": np.negative, "abs": np.abs, "not": np.invert, "sqrt": np.sqrt, "mov": lambda x: x,
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x),
}.items()}  # fmt: skip
PURE |= {"fma": (multiplied, "T T T T"), "mad": (multiplied, "T T T T")}
PURE |= {"mul.wide": (widened, "T T W"), "mad.wide": (widened, "T T W W")}
PURE |= {"shl": (left, "T u32 T"), "shr": (right, "T u32 T"), "bfe": (extracted, "T u32 u32 T")}
PURE |= {"selp": (lambda a, b, p: np.where(p, a, b), "T T pred T")}
PURE |= {"prmt": (permuted, "b32 b32 b32 b32")}
IGNORED = {"rn", "approx", "full", "lo", "ftz", "NaN", "wide", "xorsign", "abs", *WAYS}


def pure(statement, base, modifiers, kind):
    """A step that writes a function of all operands but the first."""
    way = next((WAYS[name] for name in modifiers if name in WAYS), None)
    if base == "setp":
        function, kinds = partial(compared, modifiers.pop(0)), f"{kind} {kind} pred"
    elif base == "cvt" and modifiers[-1] in ("f16x2", "bf16x2"):
        half = modifiers.pop().removesuffix("x2")
        function, kinds = partial(packed, half=half), f"{kind} {kind} b32"
    elif base == "cvt":
        output = modifiers.pop()
        function, kinds = partial(converted, way, output), f"{kind} {output}"
    else:
        keys = [f"{base}.{name}" for name in modifiers] + [base]
        function, kinds = next(PURE[key] for key in keys if key in PURE)
        kinds = kinds.replace("T", kind).replace("W", kind[0] + str(16 * SIZES.get(kind, 0)))
    *kinds, output = kinds.split()
    if {*kinds} == {output}:
        kinds = [kind] * (len(statement.operands) - 1)
    if not IGNORED.issuperset(modifiers) or not {*kinds, output} <= {*SIZES}:
        statement.refuse()
    flushes = "ftz" in modifiers and "f32" in (*kinds, output)
    write = writer(statement, statement.operands[0], output)
    reads = [reader(text, kind) for text, kind in zip(statement.operands[1:], kinds, strict=True)]

    def step(gang):
        numbers = [read(gang) for read in reads]
        write(gang, flushed(function(*map(flushed, numbers))) if flushes else function(*numbers))

    return step


def move(statement, base, modifiers, kind):
    """Also of a register into parts, the lowest first, and of parts into one."""
    names = [listed(text) for text in statement.operands]
    if len(names[0]) == len(names[1]) == 1:
        return pure(statement, base, modifiers, kind)
    part = SIZES[kind] // max(map(len, names))
    kinds = [kind if len(some) == 1 else f"b{8 * part}" for some in names]
    writes = [writer(statement, name, kinds[0]) for name in names[0]]
    reads = [reader(name, kinds[1]) for name in names[1]]

    def step(gang):
        parts = [read(gang).astype(UNSIGNED[SIZES[kind]]) for read in reads]
        bits = sum(bits << 8 * part * index for index, bits in enumerate(parts))
        for index, write in enumerate(writes):
            write(gang, bits >> 8 * part * index)

    return step


# Memory.


def address_of(text):
    """A function of a gang: the address that stands in brackets."""
    name, _, offset = (part.strip() for part in text.strip("[]").partition("+"))
    read, offset = reader(name, "b64" if name.startswith("%rd") else "b32"), int(offset or "0", 0)
    return lambda gang: read(gang) + read(gang).dtype.type(offset) if offset else read(gang)


def space_of(statement):
    found = re.search(r"\.(global|shared|param)\b", statement.name)
    return found[1] if found else statement.refuse()


def load(statement, base, modifiers, kind):
    space, size = space_of(statement), SIZES[kind]
    writes = [writer(statement, name, kind) for name in listed(statement.operands[0])]
    if space == "param":
        parameter = statement.operands[1].strip("[]")
        return lambda gang: writes[0](gang, numbers_of(gang.arguments[parameter], kind))
    address = address_of(statement.operands[1])

    def step(gang):
        places = gang.places(space, address(gang), size * len(writes))
        for index, write in enumerate(writes):
            write(gang, numbers_of(loaded(places + index * size, size), kind))

    return step


def store(statement, base, modifiers, kind):
    """Of lanes that write to the same place any comes last."""
    space, size, address = space_of(statement), SIZES[kind], address_of(statement.operands[0])
    reads = [reader(name, f"b{8 * size}") for name in listed(statement.operands[1])]

    def step(gang):
        places, lanes = gang.places(space, address(gang), size * len(reads)), gang.lanes()
        for index, read in enumerate(reads):
            numbers = np.broadcast_to(read(gang), lanes.shape)[lanes]
            stored(np.broadcast_to(places, lanes.shape)[lanes] + index * size, size, numbers)

    return step


UPDATES = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and}
UPDATES |= {"or": np.bitwise_or, "xor": np.bitwise_xor, "exch": lambda old, new: new}


def update(statement, base, modifiers, kind):
    """An atomic, of all lanes in a random order."""
    names = [name for name in modifiers if name in UPDATES]
    operation = UPDATES[names[0]] if names else statement.refuse()
    space, size, returns = space_of(statement), SIZES[kind], base == "atom"
    target, number = statement.operands[returns:]
    address, read = address_of(target), reader(number, kind)
    write = writer(statement, statement.operands[0], kind) if returns else None

    def step(gang):
        lanes = gang.lanes()
        places = np.broadcast_to(gang.places(space, address(gang), size), lanes.shape)
        given, old = np.broadcast_to(read(gang), lanes.shape), np.zeros(lanes.shape, TYPES[kind])
        for at in map(tuple, gang.chance.permutation(np.argwhere(lanes))):
            old[at] = numbers_of(loaded(places[at][None], size), kind)[0]
            new = np.array(operation(old[at], given[at]), TYPES[kind])
            stored(places[at], size, new.view(UNSIGNED[size]))
        if write is not None:
            write(gang, old)

    return step


def copy(statement, base, modifiers, kind):
    """``cp.async``: bytes from global to shared memory, zeros behind those that the source has."""
    if "commit_group" in modifiers:
        return committed
    if "wait_group" in modifiers or "wait_all" in modifiers:
        operands = statement.operands
        return partial(arrived, kept=int(operands[0]) if operands else -1)
    target, source, size, *used = statement.operands
    target, source, size = address_of(target), address_of(source), int(size, 0)
    if {*modifiers} - {"async", "ca", "cg", "shared", "shared::cta", "global"} or size % 4:
        statement.refuse()
    used = reader(used[0] if used else str(size), "u32")

    def step(gang):
        lanes = gang.lanes()
        targets = np.broadcast_to(gang.places("shared", target(gang), size), lanes.shape)[lanes]
        count = np.broadcast_to(used(gang), lanes.shape)
        sources = gang.places("global", source(gang), size, lanes & (count > 0))[lanes]
        warp = np.nonzero(lanes)[0]
        gang.copies.append((warp, gang.groups[warp], targets, sources, count[lanes], size))
        for place in range(0, size, 4):
            stored(targets + place, 4, 0xFFFFFFFF)

    return step


def committed(gang):
    gang.groups[gang.lanes().any(1)] += 1


def arrived(gang, kept):
    """What all groups but the latest ``kept`` of these warps have copied is there."""
    waits, pending, gang.copies = gang.lanes().any(1), gang.copies, []
    for *arrays, size in pending:
        warp, group, *_ = arrays
        here = waits[warp] & (group < gang.groups[warp] - kept)
        _, _, targets, sources, count = (array[here] for array in arrays)
        for place in range(0, size, 4):
            bits = np.where(count > place, loaded(sources + place, 4), 0)
            stored(targets + place, 4, bits)
        if not here.all():
            gang.copies.append((*(array[~here] for array in arrays), size))


def matrices(statement, base, modifiers, kind):
    """``ldmatrix`` and ``stmatrix``: rows of 16 bytes, whose addresses neighbouring lanes give."""
    stores, across = base == "stmatrix", "trans" in modifiers
    address, names = address_of(statement.operands[not stores]), statement.operands[stores]
    if "m8n8" not in modifiers or kind != "b16":
        statement.refuse()
    reads = [reader(name, "b32") for name in listed(names)]
    writes = [] if stores else [writer(statement, name, "b32") for name in listed(names)]
    pair, number = [LANE % 4 * 2, LANE % 4 * 2 + 1], [LANE // 4] * 2
    halves = list(zip(*((pair, number) if across else (number, pair)), strict=True))

    def step(gang):
        gang.whole_warps()
        lanes = gang.lanes()
        given, begins = lanes & (8 * len(reads) > LANE), np.broadcast_to(address(gang), lanes.shape)
        rows = gang.places("shared", begins, 16, given)
        for index, read in enumerate(reads):
            places = [rows[:, 8 * index + row] + 2 * column for row, column in halves]
            if stores:
                bits = np.broadcast_to(read(gang), lanes.shape)[lanes]
                for half, place in enumerate(places):
                    stored(place[lanes], 2, (bits >> 16 * half).astype(np.uint16))
            else:
                low, high = (loaded(place, 2).astype(np.uint32) for place in places)
                writes[index](gang, low | high << 16)

    return step


# Collectives.


def exchange(statement, base, modifiers, kind):
    """``shfl.sync``, without the predicate that says whether a lane was there."""
    mode, source = modifiers[1], reader(statement.operands[1], "b32")
    write = writer(statement, statement.operands[0], "b32")
    by, clamp, members = (reader(text, "s32") for text in statement.operands[2:])

    def step(gang):
        gang.whole_warps(members(gang))
        segment, last, b = clamp(gang) >> 8 & 31, clamp(gang) & 31, by(gang) & 31
        least, most = LANE & segment, LANE & segment | last & ~segment
        lane = {"up": LANE - b, "down": LANE + b, "bfly": LANE ^ b, "idx": least | b & ~segment}
        there = lane["up"] >= most if mode == "up" else lane[mode] <= most
        bits = np.broadcast_to(source(gang), (gang.warps, LANES))
        chosen = np.broadcast_to(np.where(there, lane[mode], LANE), bits.shape)
        write(gang, np.take_along_axis(bits, chosen, 1))

    return step


def reduce(statement, base, modifiers, kind):
    write = writer(statement, statement.operands[0], kind)
    read, members = reader(statement.operands[1], kind), reader(statement.operands[2], "s32")
    function = UPDATES[modifiers[1]]

    def step(gang):
        gang.whole_warps(members(gang))
        numbers = np.broadcast_to(read(gang), (gang.warps, LANES))
        write(gang, function.reduce(numbers, axis=1, keepdims=True, dtype=numbers.dtype))

    return step


def product(statement, base, modifiers, kind):
    """``mma.sync``: how lanes hold the operands follows from the sizes of a tile."""
    pattern = r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.([fs]32)\.(b?f16|tf32|s8)\.\3\.\2"
    found = re.fullmatch(pattern, statement.name) or statement.refuse()
    K, output, kind = int(found[1]), found[2], found[3].removeprefix("t")
    each = 4 // SIZES[kind]  # numbers in a register
    targets, *sources = map(listed, statement.operands)
    writes = [writer(statement, name, output) for name in targets]
    reads = [[reader(name, "b32") for name in names] for names in sources]

    def operand(gang, which):
        """[warps, row of lanes, column of lanes, register, number in it]"""
        shape = gang.warps, LANES
        bits = np.stack([np.broadcast_to(read(gang), shape) for read in reads[which]], -1)
        if which == 2:
            return bits.view(TYPES[output]).reshape(gang.warps, 8, 4, 2, 2)
        bits = bits & np.uint32(0xFFFFE000) if kind == "f32" else bits
        numbers = numbers_of(bits.view(UNSIGNED[SIZES[kind]]), kind).astype(TYPES[output])
        return numbers.reshape(gang.warps, 8, 4, -1, each)

    def step(gang):
        gang.whole_warps()
        a, b, c = (operand(gang, which) for which in range(3))
        a = a.reshape(gang.warps, 8, 4, -1, 2, each).transpose(0, 4, 1, 3, 2, 5)
        b = b.transpose(0, 3, 2, 4, 1).reshape(gang.warps, K, 8)
        sums = (a.reshape(gang.warps, 16, K) @ b).reshape(gang.warps, 2, 8, 4, 2)
        sums = (sums.transpose(0, 2, 3, 1, 4) + c).reshape(gang.warps, LANES, 4)
        for index, write in enumerate(writes):
            write(gang, np.ascontiguousarray(sums[..., index]))

    return step


def stop(gang):
    raise PtxError(f"{gang.where}: the kernel stops itself")


STEPS = {"mov": move, "ld": load, "st": store, "atom": update, "red": update, "cp": copy}
STEPS |= {"ldmatrix": matrices, "stmatrix": matrices, "shfl": exchange, "redux": reduce}
STEPS |= {"mma": product, "setp": pure, "cvt": pure}


def build(statement):
    """What ``Program`` makes of a statement: a function of a gang."""
    base, *modifiers = statement.name.split(".")
    if base in NOTHING or statement.name == "bar.warp.sync":
        return lambda gang: None
    if base == "trap":
        return stop
    if base not in STEPS and base not in {name.partition(".")[0] for name in PURE}:
        statement.refuse()
    *modifiers, kind = modifiers or ["none"]
    given = [*modifiers, kind] if base == "cp" else modifiers
    return STEPS.get(base, pure)(statement, base, given, kind)
