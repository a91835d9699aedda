"""The instructions of ``tests.support.ptx``, as the manual of PTX describes them."""

import re
from functools import partial

import numpy as np

from tests.support.ptx import BASE, LANES, PtxError, Statement, loaded, stored

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {f"{kind}{8 * size}": UNSIGNED[size] for kind in "bu" for size in UNSIGNED}
TYPES |= {"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64}
TYPES |= {"f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64, "pred": bool}
SIZES = {kind: np.dtype(type_).itemsize for kind, type_ in TYPES.items()}
FLOATS, LANE = ("f16", "bf16", "f32", "f64"), np.arange(LANES)
NOTHING = {"fence", "membar", "griddepcontrol", "prefetch", "discard", "createpolicy"}


def numbers_of(bits, kind):
    """Numbers of a type from a register's bits, which may have more."""
    if kind == "pred":
        return bits
    if bits.dtype.itemsize != SIZES[kind]:
        bits = bits.astype(UNSIGNED[SIZES[kind]])
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(TYPES[kind])


def bits_of(numbers, kind, width):
    """A register of ``width`` bytes with these numbers."""
    if width == 0:
        return numbers
    if kind == "bf16":
        bits = numbers.astype(np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        numbers = np.where(np.isnan(numbers), 0x7FFF, rounded).astype(np.uint16)
    numbers = numbers.astype(TYPES[kind], copy=False)
    if kind in FLOATS:
        numbers = numbers.view(UNSIGNED[SIZES[kind]])
    return numbers.astype(UNSIGNED[width], copy=False)  # a signed number keeps its sign


def constant(text, kind):
    """A literal's bits, or None."""
    if text[:2] in ("0f", "0F") or text[:2] in ("0d", "0D"):
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
    bits = constant(text, kind)
    if bits is not None:
        numbers = numbers_of(bits, kind)
        return lambda gang: numbers
    if re.match(r"%(tid|ntid|ctaid|nctaid|laneid|warpid)\b", text):
        return lambda gang: numbers_of(gang.special[text], kind)
    if text.startswith("!"):
        return lambda gang: ~gang.regs[text[1:]]
    ones = constant("-1", kind)  # LLVM has no use for what it does not write; NaN as a float
    return lambda gang: numbers_of(gang.regs.get(text, ones), kind)


def listed(text):
    """Names in braces, or the only one."""
    return [name.strip() for name in text.strip("{}").split(",")]


def writer(statement, text, kind):
    """A function that puts numbers into a register."""
    if text == "_":
        return lambda gang, numbers: None
    width = statement.width(text)
    return lambda gang, numbers: gang.put(text, bits_of(numbers, kind, width))


def flushed(function):
    def flush(x):
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, x * np.float32(0), x)

    return lambda *inputs: flush(function(*map(flush, inputs)))


def computing(statement, function, kinds, output, skipped=0):
    """A step that writes a function of all operands but the first."""
    modifiers = statement.name.split(".")
    if "ftz" in modifiers and "f32" in (output, *kinds):
        function = flushed(function)
    if "sat" in modifiers and output in FLOATS:
        inner = function
        function = lambda *inputs: np.fmin(np.fmax(inner(*inputs), 0), 1)  # noqa: E731
    write = writer(statement, statement.operands[0], output)
    reads = [reader(text, kind) for text, kind in zip(statement.operands[1:], kinds, strict=True)]
    return lambda gang: write(gang, function(*[read(gang) for read in reads]))


# Arithmetic.


def divided(a, b):
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a) // np.where(b == 0, 1, np.abs(b))
    return np.where((a < 0) == (b < 0), quotient, -quotient).astype(a.dtype)


def remainder(a, b):
    return a - divided(a, b) * b


def least(a, b):
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


def greatest(a, b):
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def left(a, count):
    bits = 8 * a.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), 0)


def right(a, count):
    bits = 8 * a.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, 0)


def fused(a, b, c):
    """In float64, which rounds a sum's last bit wrongly once in 2**29 times."""
    return np.multiply(a, b, dtype=np.float64) + c


def wide(a):
    return a.astype(np.int64 if a.dtype.kind == "i" else np.uint64)


def high(a, b):
    return (wide(a) * wide(b)) >> (8 * a.itemsize)


def in_double(function):
    return lambda x: function(x.astype(np.float64))


BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": divided}
BINARY |= {"rem": remainder, "min": least, "max": greatest, "and": np.bitwise_and}
BINARY |= {"or": np.bitwise_or, "xor": np.bitwise_xor, "copysign": lambda a, b: np.copysign(b, a)}
UNARY = {"neg": np.negative, "abs": np.abs, "not": np.invert, "popc": np.bitwise_count}
UNARY |= {"sqrt": np.sqrt, "ex2": in_double(np.exp2), "lg2": in_double(np.log2)}
UNARY |= {"rcp": in_double(lambda x: 1 / x), "rsqrt": in_double(lambda x: 1 / np.sqrt(x))}
UNARY |= {"sin": in_double(np.sin), "cos": in_double(np.cos), "tanh": in_double(np.tanh)}
PLAIN = {"rn", "ftz", "sat", "full", "approx", "lo", "NaN"}
COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
COMPARISONS |= {"gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal}
COMPARISONS |= {"hi": np.greater, "hs": np.greater_equal}


def arithmetic(statement):
    base, *modifiers, kind = statement.name.split(".")
    operation, count = (BINARY, 2) if base in BINARY else (UNARY, 1)
    function, output = operation[base], kind
    if "NaN" in modifiers:
        function = {"min": np.minimum, "max": np.maximum}[base]
    if "wide" in modifiers:
        function = lambda a, b: wide(a) * wide(b)  # noqa: E731
        output = kind[0] + str(16 * SIZES[kind])
    elif "hi" in modifiers:
        function = high
    if base == "popc":
        output = "u32"
    if kind not in TYPES or not PLAIN.issuperset({*modifiers} - {"wide", "hi"}):
        statement.refuse()
    return computing(statement, function, [kind] * count, output)


def multiply_add(statement):
    base, *modifiers, kind = statement.name.split(".")
    if kind not in TYPES or not PLAIN.issuperset({*modifiers} - {"wide", "hi"}):
        statement.refuse()
    if "wide" in modifiers:
        output = kind[0] + str(16 * SIZES[kind])
        return computing(
            statement, lambda a, b, c: wide(a) * wide(b) + c, [kind, kind, output], output
        )
    function = fused if kind in FLOATS else lambda a, b, c: a * b + c
    if "hi" in modifiers:
        function = lambda a, b, c: high(a, b).astype(a.dtype) + c  # noqa: E731
    return computing(statement, function, [kind] * 3, kind)


def shift(statement):
    base, kind = statement.name.split(".")
    return computing(statement, left if base == "shl" else right, [kind, "u32"], kind)


def compare(statement):
    """Of numbers that are not ordered only ``ne`` with u, and what ends in u, is true."""
    _, relation, *modifiers, kind = statement.name.split(".")
    if {*modifiers} - {"ftz", "and", "or", "xor"}:
        statement.refuse()
    ordered = relation.removesuffix("u")
    function = {"num": np.equal, "nan": np.equal}.get(relation) or COMPARISONS[ordered]

    def compared(a, b, *more):
        result = function(a, b)
        if kind in FLOATS:
            nan = np.isnan(a) | np.isnan(b)
            result = nan if relation == "nan" else ~nan if relation == "num" else result
            if relation not in ("nan", "num"):
                result = result | nan if relation.endswith("u") else result & ~nan
        for other in more:
            joined = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
            result = joined[modifiers[0]](result, other)
        return result

    kinds = [kind, kind] + ["pred"] * (len(statement.operands) - 3)
    return computing(statement, compared, kinds, "pred")


def select(statement):
    kind = statement.name.partition(".")[2]
    return computing(statement, lambda a, b, p: np.where(p, a, b), [kind, kind, "pred"], kind)


def extract(statement):
    kind = statement.name.partition(".")[2]
    bits = 8 * SIZES[kind]

    def extracted(a, first, count):
        first, count = first & 255, count & 255
        size = np.minimum(np.minimum(count, bits - np.minimum(first, bits)), bits).astype(a.dtype)
        up = bits - np.minimum(first, bits).astype(a.dtype) - size
        return np.where(count > 0, right(left(a, up), bits - size), 0)

    return computing(statement, extracted, [kind, "u32", "u32"], kind)


def insert(statement):
    kind = statement.name.partition(".")[2]

    def inserted(a, b, first, count):
        one = b.dtype.type(1)
        mask = left(left(one, count) - one, first)
        return (b & ~mask) | (left(a, first) & mask)

    return computing(statement, inserted, [kind, kind, "u32", "u32"], kind)


def permute(statement):
    def permuted(a, b, choice):
        both, result = a.astype(np.uint64) | b.astype(np.uint64) << 32, np.uint64(0)
        for place in range(4):
            chosen = (choice >> 4 * place & 15).astype(np.uint64)
            byte = both >> (chosen & 7) * 8 & 255
            byte = np.where(chosen & 8, byte >> 7 & 1, byte) * np.where(chosen & 8, 255, 1).astype(
                np.uint64
            )
            result = result | byte << 8 * place
        return result

    if statement.name != "prmt.b32":
        statement.refuse()
    return computing(statement, permuted, ["b32"] * 3, "b32")


def logic(statement):
    def looked_up(a, b, c, table):
        result = np.uint32(0)
        for index in range(8):
            if table[0, 0] >> index & 1:
                parts = (x if index & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1)))
                result = result | np.bitwise_and.reduce(np.broadcast_arrays(*parts))
        return result

    return computing(statement, looked_up, ["b32"] * 4, "b32")


def funnel(statement):
    base, way, mode, kind = statement.name.split(".")

    def shifted(a, b, count):
        both = a.astype(np.uint64) | b.astype(np.uint64) << 32
        count = (count & 31 if mode == "wrap" else np.minimum(count, 32)).astype(np.uint64)
        return both >> count if way == "r" else both << count >> 32

    return computing(statement, shifted, [kind, kind, "u32"], kind)


# Conversions and moves.


def rounded(numbers, modifiers, output):
    """A float to an integer type: the nearest that it has, 0 of NaN."""
    ways = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    (way,) = (ways[name] for name in modifiers if name in ways)
    limits = np.iinfo(TYPES[output])
    whole = np.nan_to_num(way(numbers.astype(np.float64)), nan=0.0)
    inside = np.clip(whole, float(limits.min), float(limits.max))
    return np.where(inside >= float(limits.max), limits.max, inside.astype(TYPES[output]))


def convert(statement):
    *modifiers, output, kind = statement.name.split(".")[1:]
    if output in ("f16x2", "bf16x2"):
        half = output.removesuffix("x2")

        def packed(upper, lower):
            up, low = (bits_of(x, half, 4) for x in (upper, lower))
            return up << 16 | low

        if modifiers != ["rn"]:
            statement.refuse()
        return computing(statement, packed, [kind, kind], "b32")
    if output not in TYPES or kind not in TYPES:
        statement.refuse()
    if kind in FLOATS and output not in FLOATS:
        function = partial(rounded, modifiers=modifiers, output=output)
    elif {"rni", "rzi", "rmi", "rpi"} & {*modifiers}:
        ways = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
        function = ways[next(name for name in modifiers if name in ways)]
    elif {*modifiers} - {"rn", "ftz", "sat"} or ("sat" in modifiers and output not in FLOATS):
        statement.refuse()
    else:
        function = lambda x: x  # noqa: E731
    return computing(statement, function, [kind], output)


def move(statement):
    kind = statement.name.split(".")[-1]
    target, source = statement.operands
    if target.startswith("{"):  # into parts, the lowest first
        names = listed(target)
        read, part = reader(source, kind), SIZES[kind] // len(names)
        writes = [writer(statement, name, f"b{8 * part}") for name in names]

        def unpack(gang):
            bits = read(gang)
            for index, write in enumerate(writes):
                write(gang, bits >> 8 * part * index)

        return unpack
    if source.startswith("{"):
        names = listed(source)
        part = SIZES[kind] // len(names)
        reads = [reader(name, f"b{8 * part}") for name in names]
        write = writer(statement, target, kind)

        def pack(gang):
            parts = [read(gang).astype(UNSIGNED[SIZES[kind]]) for read in reads]
            bits = parts[0]
            for index, more in enumerate(parts[1:], 1):
                bits = bits | more << 8 * part * index
            write(gang, bits)

        return pack
    return computing(statement, lambda x: x, [kind], kind)


# Memory.


def address_of(text):
    """A function of a gang: the address that stands in brackets."""
    name, _, offset = (part.strip() for part in text.strip("[]").partition("+"))
    read, offset = reader(name, "b64" if name.startswith("%rd") else "b32"), int(offset or "0", 0)
    return lambda gang: read(gang) + read(gang).dtype.type(offset) if offset else read(gang)


def space_of(statement):
    modifiers = re.split(r"\.|::", statement.name)
    spaces = [name for name in ("global", "shared", "param") if name in modifiers]
    return spaces[0] if spaces else statement.refuse()


def load(statement):
    modifiers, space = statement.name.split("."), space_of(statement)
    kind, names = modifiers[-1], listed(statement.operands[0])
    writes, size = [writer(statement, name, kind) for name in names], SIZES[kind]
    if space == "param":
        parameter = statement.operands[1].strip("[]")
        return lambda gang: writes[0](gang, numbers_of(gang.arguments[parameter], kind))
    address = address_of(statement.operands[1])

    def step(gang):
        places = gang.places(space, address(gang), size * len(writes))
        for index, write in enumerate(writes):
            write(gang, numbers_of(loaded(places + index * size, size), kind))

    return step


def store(statement):
    modifiers, space = statement.name.split("."), space_of(statement)
    kind, address = modifiers[-1], address_of(statement.operands[0])
    size, reads = (
        SIZES[kind],
        [reader(x, f"b{8 * SIZES[kind]}") for x in listed(statement.operands[1])],
    )

    def step(gang):
        places = gang.places(space, address(gang), size * len(reads))
        for index, read in enumerate(reads):
            written(gang, places + index * size, size, read(gang))

    return step


def written(gang, places, size, numbers):
    """Of lanes that write to the same place any comes last."""
    if gang.mask is not None:
        numbers = np.broadcast_to(numbers, gang.mask.shape)[gang.mask]
        stored(places[gang.mask], size, numbers)
    else:
        places, numbers = np.broadcast_arrays(places, numbers)
        stored(places, size, numbers)


UPDATES = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and}
UPDATES |= {"or": np.bitwise_or, "xor": np.bitwise_xor, "exch": lambda old, new: new}


def update(statement):
    """An atomic, of all lanes in a random order."""
    base, *modifiers, kind = statement.name.split(".")
    space, targets = space_of(statement), statement.operands[base == "atom" :]
    name = next((x for x in modifiers if x in UPDATES or x == "cas"), None) or statement.refuse()
    address, size = address_of(targets[0]), SIZES[kind]
    reads = [reader(text, kind) for text in targets[1:]]
    write = writer(statement, statement.operands[0], kind) if base == "atom" else None

    def step(gang):
        shape = gang.warps, LANES
        places = np.broadcast_to(gang.places(space, address(gang), size), shape)
        given, old = (
            [np.broadcast_to(read(gang), shape) for read in reads],
            np.zeros(shape, TYPES[kind]),
        )
        active = np.argwhere(np.ones(shape, bool) if gang.mask is None else gang.mask)
        for at in map(tuple, gang.chance.permutation(active)):
            old[at] = numbers_of(loaded(places[at][None], size), kind)[0]
            new = given[-1][at] if name == "cas" else UPDATES[name](old[at], given[0][at])
            if name != "cas" or old[at] == given[0][at]:
                stored(places[at], size, np.array(new, TYPES[kind]).view(UNSIGNED[size]))
        if write is not None:
            write(gang, old)

    return step


def copy(statement):
    """``cp.async``: bytes from global to shared memory, zeros behind those that the source has."""
    if "commit_group" in statement.name:
        return committed
    if "wait" in statement.name:
        kept = int(statement.operands[0]) if "wait_group" in statement.name else -1
        return partial(arrived, kept=kept)
    target, source, size, *used = statement.operands
    target, source, size = address_of(target), address_of(source), int(size, 0)
    if not statement.name.startswith(("cp.async.ca.shared", "cp.async.cg.shared")) or size % 4:
        statement.refuse()
    used = reader(used[0] if used else str(size), "u32")

    def step(gang):
        shape = gang.warps, LANES
        mask = np.ones(shape, bool) if gang.mask is None else gang.mask
        targets = np.broadcast_to(gang.places("shared", target(gang), size), shape)
        count = np.broadcast_to(used(gang), shape)
        sources = gang.places("global", source(gang), size, mask & (count > 0))
        warp = np.broadcast_to(np.arange(gang.warps)[:, None], shape)[mask]
        gang.copies.append(
            (warp, gang.groups[warp], targets[mask], sources[mask], count[mask], size)
        )
        for place in range(0, size, 4):
            stored(targets[mask] + place, 4, 0xFFFFFFFF)

    return step


def committed(gang):
    gang.groups[slice(None) if gang.mask is None else gang.mask.any(1)] += 1


def arrived(gang, kept):
    """What all groups but the latest ``kept`` of these warps have copied is there."""
    waits, still = np.ones(gang.warps, bool) if gang.mask is None else gang.mask.any(1), []
    for warp, group, targets, sources, count, size in gang.copies:
        here = waits[warp] & (group < gang.groups[warp] - kept)
        for place in range(0, size, 4):
            there = loaded(sources[here] + place, 4)
            stored(targets[here] + place, 4, np.where(count[here] > place, there, 0))
        if not here.all():
            rest = (x[~here] for x in (warp, group, targets, sources, count))
            still.append((*rest, size))
    gang.copies = still


def matrices(statement):
    """``ldmatrix`` and ``stmatrix``: rows of 16 bytes, whose addresses neighbouring lanes give."""
    stores, modifiers = statement.name.startswith("st"), statement.name.split(".")
    texts = statement.operands[::-1] if stores else statement.operands
    names, address, across = listed(texts[0]), address_of(texts[1]), "trans" in modifiers
    if "m8n8" not in modifiers or modifiers[-1] != "b16":
        statement.refuse()
    reads = [reader(name, "b32") for name in names]
    writes = [] if stores else [writer(statement, name, "b32") for name in names]

    def step(gang):
        gang.whole_warps()
        shape, count = (gang.warps, LANES), 8 * len(names)
        mask = np.ones(shape, bool) if gang.mask is None else gang.mask
        begins = np.broadcast_to(address(gang), shape)
        rows = gang.places("shared", begins, 16, mask & (count > LANE))
        for index in range(len(names)):
            pair, number = LANE % 4 * 2, LANE // 4
            halves = (pair, pair + 1) if across else (number, number)
            columns = (number, number) if across else (pair, pair + 1)
            places = [rows[:, 8 * index + r] + 2 * c for r, c in zip(halves, columns, strict=True)]
            if stores:
                bits = np.broadcast_to(reads[index](gang), shape)
                for half, place in enumerate(places):
                    stored(place[mask], 2, (bits >> 16 * half)[mask].astype(np.uint16))
            else:
                low, up = (loaded(place, 2).astype(np.uint32) for place in places)
                writes[index](gang, low | up << 16)

    return step


# Collectives.


def exchange(statement):
    """``shfl.sync``, without the predicate that says whether a lane was there."""
    mode, source = statement.name.split(".")[2], reader(statement.operands[1], "b32")
    write = writer(statement, statement.operands[0], "b32")
    by, clamp, members = (reader(text, "s32") for text in statement.operands[2:])

    def step(gang):
        gang.whole_warps()
        assert (members(gang) == -1).all()
        segment, last, b = clamp(gang) >> 8 & 31, clamp(gang) & 31, by(gang) & 31
        least_, most = LANE & segment, LANE & segment | last & ~segment
        if mode == "up":
            lane = LANE - b
            lane = np.where(lane >= most, lane, LANE)
        else:
            lane = {"down": LANE + b, "bfly": LANE ^ b, "idx": least_ | b & ~segment}[mode]
            lane = np.where(lane <= most, lane, LANE)
        bits = np.broadcast_to(source(gang), (gang.warps, LANES))
        write(gang, np.take_along_axis(bits, np.broadcast_to(lane, bits.shape), 1))

    return step


def reduce(statement):
    *_, name, kind = statement.name.split(".")
    write, read = (
        writer(statement, statement.operands[0], kind), reader(statement.operands[1], kind),
    )  # fmt: skip
    members = reader(statement.operands[2], "s32")

    def step(gang):
        gang.whole_warps()
        assert (members(gang) == -1).all()
        numbers = np.broadcast_to(read(gang), (gang.warps, LANES))
        write(gang, UPDATES[name].reduce(numbers, axis=1, keepdims=True, dtype=numbers.dtype))

    return step


def vote(statement):
    mode = statement.name.split(".")[2]
    write = writer(statement, statement.operands[0], "b32" if mode == "ballot" else "pred")
    read, members = reader(statement.operands[1], "pred"), reader(statement.operands[2], "s32")

    def step(gang):
        gang.whole_warps()
        assert (members(gang) == -1).all()
        flags = np.broadcast_to(read(gang), (gang.warps, LANES))
        if mode == "ballot":
            write(gang, (flags.astype(np.uint32) << LANE.astype(np.uint32)).sum(1, keepdims=True))
        else:
            write(gang, {"any": flags.any, "all": flags.all}[mode](1, keepdims=True))

    return step


def product(statement):
    """``mma.sync``: how lanes hold the operands follows from the sizes of a tile."""
    shape = re.match(
        r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.(\w+)\.(\w+)\.(\w+)\.(\w+)$", statement.name
    )
    if shape is None or shape[2] != shape[5] or shape[3] != shape[4]:
        statement.refuse()
    K, output, kind = int(shape[1]), shape[2], shape[3]
    kinds = {"f16": "f16", "bf16": "bf16", "tf32": "f32", "s8": "s8", "u8": "u8"}
    if kind not in kinds or output not in ("f32", "s32"):
        statement.refuse()
    size = SIZES[kinds[kind]]
    each = 4 // size  # numbers in a register
    parts = K // (4 * each)
    targets, *sources = map(listed, statement.operands)
    writes = [writer(statement, name, output) for name in targets]
    reads = [[reader(name, "b32") for name in names] for names in sources]

    def operand(gang, which):
        """[warps, row of lanes, column of lanes, register, number in it]"""
        whole = gang.warps, LANES
        bits = np.stack([np.broadcast_to(read(gang), whole) for read in reads[which]], -1)
        if which == 2:
            return bits.view(TYPES[output]).reshape(gang.warps, 8, 4, 2, 2)
        if kind == "tf32":
            bits &= np.uint32(0xFFFFE000)
        numbers = numbers_of(bits.view(UNSIGNED[size]), kinds[kind]).astype(TYPES[output])
        return numbers.reshape(gang.warps, 8, 4, -1, each)

    def step(gang):
        gang.whole_warps()
        a, b, c = (operand(gang, which) for which in range(3))
        a = a.reshape(gang.warps, 8, 4, parts, 2, each).transpose(0, 4, 1, 3, 2, 5)
        b = b.transpose(0, 3, 2, 4, 1).reshape(gang.warps, K, 8)
        sums = (a.reshape(gang.warps, 16, K) @ b).reshape(gang.warps, 2, 8, 4, 2)
        sums = (sums.transpose(0, 2, 3, 1, 4) + c).reshape(gang.warps, LANES, 4)
        for index, write in enumerate(writes):
            write(gang, np.ascontiguousarray(sums[..., index]))

    return step


def trap(statement):
    def step(gang):
        raise PtxError(f"{gang.where}: the kernel stops itself")

    return step


STEPS = {"fma": multiply_add, "mad": multiply_add, "shl": shift, "shr": shift, "setp": compare}
STEPS |= {"selp": select, "bfe": extract, "bfi": insert, "prmt": permute, "lop3": logic}
STEPS |= {"shf": funnel, "cvt": convert, "mov": move, "cvta": move, "ld": load, "st": store}
STEPS |= {"atom": update, "red": update, "cp": copy, "ldmatrix": matrices, "stmatrix": matrices}
STEPS |= {"shfl": exchange, "redux": reduce, "vote": vote, "mma": product, "trap": trap}
STEPS |= dict.fromkeys([*BINARY, *UNARY], arithmetic)


def build(statement):
    """What ``Program`` makes of a statement."""
    base = statement.name.partition(".")[0]
    if base in NOTHING or statement.name == "bar.warp.sync":
        return lambda gang: None
    return STEPS.get(base, Statement.refuse)(statement)
