"""Runs PTX as Triton emits it, on the CPU; ``tests.support.ptx_ops`` knows the instructions.

A register is an array over the lanes of all warps that run at once.  Where a kernel goes its own
way in some lanes, a mask says which.  Between two barriers a random half of the warps goes first
and the others follow, so what a missing barrier allows does happen: a warp reads what another has
not written yet, or overwrites what another still has to read.  Shared memory begins as NaN.  What
``cp.async`` copies is NaN until its wait.  An address outside of a launch's tensors, or that is no
multiple of what is read there, is an error, as is a collective that part of a warp does not reach.

What this can not show: caches, an order of memory that is weaker than this one, and how a GPU
rounds what it only approximates.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

LANES = 32
BASE = 1024  # where shared memory begins, as on Hopper
END = np.iinfo(np.int32).max  # where a thread is that has returned
GANG = 128  # warps at once
ALL = np.array(-1, np.int32)  # lanes, as members of a collective
WIDTHS = {"pred": 0} | {f"{kind}{8 * size}": size for kind in "busf" for size in (1, 2, 4, 8)}
_OPERANDS = re.compile(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*")
_STATEMENT = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)


class PtxError(AssertionError):
    """A kernel does what a GPU would punish, or what this interpreter does not know."""


def _memory(size):
    """All memory of this process from ``_FIRST`` on, as numbers of ``size`` bytes."""
    described = {"version": 3, "data": (_FIRST, False), "typestr": f"<u{size}"}
    described["shape"] = ((1 << 47) // size,)
    return np.asarray(SimpleNamespace(__array_interface__=described))


_FIRST = 4096
_MEMORY = {size: _memory(size) for size in (1, 2, 4, 8)}


def loaded(places, size):
    return _MEMORY[size][(places - _FIRST) // size]


def stored(places, size, numbers):
    _MEMORY[size][(places - _FIRST) // size] = numbers


@dataclass
class Statement:
    """An instruction as it stands in the text, and ``where`` that is, in PTX and Triton."""

    name: str
    operands: list[str]
    where: str
    widths: dict[str, int]  # bytes of registers by what their names begin with; 0 of predicates

    def width(self, register):
        return self.widths[register.rstrip("0123456789")]

    def refuse(self):
        raise PtxError(f"{self.where}: {self.name} is not known here")


class Program:
    """A kernel: ``parameters`` in order, ``threads`` of a block, steps and labels."""

    def __init__(self, text, build):
        """``build`` makes a function of a ``Gang`` of a statement."""
        pattern = r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)^\{(.*)"
        entry = re.search(pattern, text, re.MULTILINE | re.DOTALL)
        assert entry is not None
        self.name, header, options, body = entry.groups()
        self.parameters = re.findall(r"\.param\s[^,]*?([\w$]+)\s*(?:,|$)", header)
        self.threads = int(re.findall(r"\.(?:req|max)ntid\s+(\d+)", options)[0])
        self.steps, self.labels = [], {}
        self.ends = {}  # steps that jump or wait, by index: (kind, guard, negated, operands)
        self._build, self._widths = build, dict[str, int]()
        self._read(body, text[: entry.start(4)].count("\n") + 1)
        self._leaders = {*self.labels.values(), len(self.steps)}

    def _read(self, body, line):
        source = pending = ""
        depth = 1  # inline assembly has braces of its own
        for number, text in enumerate(body.split("\n"), line):
            text, _, comment = (part.strip() for part in text.partition("//"))
            if text.startswith(".loc"):
                source = comment
            elif label := re.fullmatch(r"([$\w]+):", text):
                self.labels[label[1]] = len(self.steps)
            elif text in ("{", "}"):
                depth += 1 if text == "{" else -1
                if depth == 0:
                    return
            else:
                *whole, pending = f"{pending} {text}".split(";")
                for statement in whole:
                    self._add(statement.strip(), f"{self.name}, line {number}, {source}")

    def _add(self, text, where):
        if text.startswith(".reg"):
            kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
            for name in names.split(","):
                self._widths[name.strip().partition("<")[0].rstrip("0123456789")] = WIDTHS[kind]
        if text.startswith("."):
            return  # also .pragma
        negated, guard, name, rest = _STATEMENT.fullmatch(text).groups()
        operands = [token.strip() for token in _OPERANDS.findall(rest)]
        statement, kind = Statement(name, operands, where, self._widths), name.partition(".")[0]
        if kind in ("bra", "ret", "exit") or name.startswith(("bar.sync", "barrier.sync")):
            self.ends[len(self.steps)] = kind, guard, bool(negated), operands
            step = None
        elif guard:
            step = _guarded(self._build(statement), guard, bool(negated))
        else:
            step = self._build(statement)
        self.steps.append((step, where))

    def stretch(self, index):
        """Where the instructions that follow each other from ``index`` on end: the index of one
        that jumps or waits, or of a label's."""
        stop = index
        while stop not in self.ends and (stop == index or stop not in self._leaders):
            stop += 1
        return stop


def _guarded(step, guard, negated):
    def guarded(gang):
        outer, inner = gang.mask, gang.regs[guard]
        inner = ~inner if negated else inner
        mask = inner if outer is None else inner & outer
        if mask.all():
            step(gang)
        elif mask.any():
            gang.mask = np.broadcast_to(mask, (gang.warps, LANES))
            step(gang)
            gang.mask = outer

    return guarded


class Regions:
    """Memory that a launch may touch: ``held`` are (first address, end, name)."""

    def __init__(self, held):
        self._starts, self._ends, self._names = [], [], []
        for start, end, name in sorted(held):
            if self._ends and start < self._ends[-1]:  # two views of one tensor
                self._ends[-1] = max(end, self._ends[-1])
                self._names[-1] += f", {name}"
            elif start < end:
                for kept, value in ((self._starts, start), (self._ends, end), (self._names, name)):
                    kept.append(value)

    def outside(self, places, size):
        """Which of these places do not begin ``size`` bytes of a region."""
        index = bisect_right(self._starts, int(places.min())) - 1
        if index >= 0 and int(places.max()) + size <= self._ends[index]:
            return np.False_
        index = np.searchsorted(np.array(self._starts), places, "right") - 1
        return (index < 0) | (places + size > np.array(self._ends)[index])

    def nearest(self, place):
        index = max(0, bisect_right(self._starts, place) - 1)
        start, end = self._starts[index], self._ends[index]
        return f"{self._names[index]} has {end - start} bytes and this is byte {place - start}"


class Gang:
    """Some blocks of a launch while they run: ``ids`` are theirs [blocks, 3]."""

    def __init__(self, program, ids, grid, shared, arguments, regions, chance):
        self.program, self.regions, self.chance = program, regions, chance
        self.per_block = program.threads // LANES
        self.warps = len(ids) * self.per_block
        self.regs, self.arguments = {}, arguments
        self.mask = None  # of lanes [warps, 32] that take part; None: all
        self.pc = np.zeros((self.warps, LANES), np.int32)
        self.waiting = np.zeros(self.warps, bool)
        self.copies, self.groups = [], np.zeros(self.warps, np.int64)
        self.where, self.pitch, self.shared = "", (shared // 16 + 2) * 16, shared
        self._shared = np.full(len(ids) * self.pitch + 64, 0xFF, np.uint8)
        self._nowhere = self._shared.ctypes.data + len(ids) * self.pitch + 15 & -16
        begin = self._shared.ctypes.data + 15 & -16
        self._begins = begin + np.arange(len(ids)).repeat(self.per_block)[:, None] * self.pitch
        thread = np.arange(len(ids) * program.threads).reshape(self.warps, LANES) % program.threads
        self.special = {"%tid.x": thread, "%laneid": np.arange(LANES)[None]}
        self.special |= {"%warpid": thread[:, :1] // LANES, "%tid.y": [[0]], "%tid.z": [[0]]}
        for axis, name in enumerate("xyz"):
            self.special[f"%ctaid.{name}"] = ids[:, axis].repeat(self.per_block)[:, None]
            self.special[f"%nctaid.{name}"] = [[grid[axis]]]
        self.special = {name: np.asarray(x, np.uint32) for name, x in self.special.items()}

    def put(self, register, bits):
        if self.mask is not None:
            before = self.regs.get(register)
            if before is None:
                before = bits.dtype.type(-1 if bits.dtype == bool else np.iinfo(bits.dtype).max)
            bits = np.where(self.mask, bits, before)
        self.regs[register] = bits

    def lanes(self):
        """Those that take part [warps, 32]."""
        return np.ones((self.warps, LANES), bool) if self.mask is None else self.mask

    def whole_warps(self, members=ALL):
        """A collective needs all lanes of a warp."""
        parted = self.mask is not None and (self.mask != self.mask[:, :1]).any()
        if parted or (members != ALL).any():
            raise PtxError(f"{self.where}: part of a warp does not come here")

    def places(self, space, address, size, mask=None):
        """Addresses in this process of ``size`` bytes each; of lanes that do not take part, a place
        where nothing is."""
        mask = self.mask if mask is None else mask
        address = address.view(np.int64) if address.dtype == np.uint64 else address.astype(np.int64)
        if mask is not None:
            address = np.broadcast_to(address, mask.shape)
        active = (address if mask is None else address[mask]).ravel()
        if not len(active):
            return np.full(address.shape, self._nowhere)
        if space == "shared":
            bad = (active < BASE) | (active + size > BASE + self.shared)
            places = address - BASE + self._begins
        else:
            bad, places = self.regions.outside(active, size), address
        bad = bad | (active % size != 0)
        if bad.any():
            taken = np.nonzero(np.ones(address.shape, bool) if mask is None else mask)
            warp, lane = (int(axis[bad][0]) for axis in taken)
            self._refuse(space, int(active[bad][0]), size, warp, lane)
        return places if mask is None else np.where(mask, places, self._nowhere)

    def _refuse(self, space, address, size, warp, lane):
        block = [int(self.special[f"%ctaid.{axis}"][warp, 0]) for axis in "xyz"]
        text = f"shared memory has {self.shared} bytes, from {BASE} on"
        text = self.regions.nearest(address) if space == "global" else text
        raise PtxError(
            f"{self.where}: {size} bytes at {address:#x} for block {block}, warp "
            f"{warp % self.per_block}, lane {lane} are not in {space} memory or not aligned: {text}"
        )

    def run(self):
        while True:
            ready = ~self.waiting & (self.pc != END).any(1)
            if not ready.any():
                assert not self.waiting.any()
                return
            first = ready & (self.chance.random(self.warps) < 0.5)
            for some in (first, ready & ~first):
                self._go(some)
            gone = (self.pc == END).all(1)
            arrived = (self.waiting | gone).reshape(-1, self.per_block).all(1)
            self.waiting &= ~arrived.repeat(self.per_block)

    def _go(self, some):
        """These warps go on until each waits or has returned; of lanes that go different ways those
        that are behind come first, and meet the others."""
        while (live := (some & ~self.waiting)[:, None] & (self.pc != END)).any():
            at = int(self.pc.min(where=live, initial=END))
            mask = live & (self.pc == at)
            stop = self.program.stretch(at)
            self.mask = None if mask.all() else mask
            for step, where in self.program.steps[at:stop]:
                self.where = where
                step(self)
            self._end(stop, mask)

    def _end(self, at, mask):
        if at not in self.program.ends:  # a label, or behind the last
            self.pc[mask] = at if at < len(self.program.steps) else END
            return
        self.where = self.program.steps[at][1]
        kind, guard, negated, operands = self.program.ends[at]
        self.pc[mask] = at + 1
        if guard is not None:
            mask = mask & (self.regs[guard] ^ negated)
        if kind == "bra":
            self.pc[mask] = self.program.labels[operands[0]]
        elif kind in ("ret", "exit"):
            self.pc[mask] = END
        else:
            self.mask = mask
            self.whole_warps()
            self.waiting |= mask.any(1)


def launch(program, grid, shared, arguments, regions, seed):
    """All blocks in a random order; ``arguments`` are the bits of the parameters by name."""
    chance = np.random.default_rng(seed)
    ids = np.indices(grid).reshape(3, -1).T[chance.permutation(int(np.prod(grid)))]
    count = max(1, GANG * LANES // program.threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(ids), count):
            some = ids[first : first + count]
            Gang(program, some, grid, shared, arguments, regions, chance).run()
