"""Blocks: what up to 64 tokens leave behind, in one file, addressed by a chain of hashes.

A block's address is the hash of its parent's address and of its tokens, so it stands for all tokens
up to its end; the first parent, a root, stands for the model and the owner.  Conversations with the
same beginning share its blocks.  The latents of a token depend on earlier tokens alone, so the
first rows of a block serve a prompt that differs further on.

Where attention compresses, what the next token needs of the tokens before is more than what they
leave behind for good.  A snapshot is a file with the rest, for a place in the middle of a block or
at its end, under the address that a block has that ends there.

A file is written beside its place, made durable and renamed, by one process at a time.  Files that
are not what they claim to be are as good as none.  The format: docs/sessions.md.
"""

import hashlib
import os
import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from itertools import islice
from pathlib import Path

import xxhash

from slotmoe import system
from slotmoe.errors import ConfigError, informs, refused
from slotmoe.quant.export.writer import replace_file, temporary_name
from slotmoe.sizes import format_size
from slotmoe.system import take_lock

BLOCK_TOKENS = 64
ADDRESS_BYTES, _CHECKSUM_BYTES = 16, 16
_HEAD = struct.Struct("<16s16s16sIIQ")  # magic, parent, address, start, tokens, bytes behind them
FORMAT = b"slotmoe block 2\n"
_SNAPSHOT = b"slotmoe state 2\n"
_NAME = re.compile(r"([0-9a-f]{32})-([0-9]{8})-([0-9]{2})-([0-9a-f]{32})(-state)?")
_LEAST_TOKENS = 16  # of a conversation: reading fewer again costs less than a file
_MOST_SIBLINGS = 4096  # blocks of one parent that are looked at for the one most like a prompt
_LOCK_SECONDS = 0.5  # in which another process finishes its save
Notify = Callable[[str], None]


def address(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Of the block that holds ``tokens`` behind ``parent``."""
    return hashlib.sha256(parent + packed(tokens)).digest()[:ADDRESS_BYTES]


def packed(tokens: Sequence[int]) -> bytes:
    """Token ids in 32 bits each, little-endian."""
    return struct.pack(f"<{len(tokens)}I", *tokens)


def unpacked(data: bytes) -> list[int]:
    """The same back; a last one that is cut off is left out."""
    return list(struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4]))


@dataclass(frozen=True)
class TokenBlock:
    """``tokens`` from position ``start`` on, or the snapshot behind them."""

    parent: bytes
    start: int
    tokens: list[int]
    is_snapshot: bool = False

    @cached_property
    def address(self) -> bytes:
        return address(self.parent, self.tokens)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def begun(self, count: int, is_snapshot: bool = False) -> "TokenBlock":
        """The block of its first ``count`` tokens, or the snapshot behind them."""
        return TokenBlock(self.parent, self.start, self.tokens[:count], is_snapshot)

    def head(self, nbytes: int) -> bytes:
        """How its file begins, where ``nbytes`` follow before the checksum."""
        magic, count = _SNAPSHOT if self.is_snapshot else FORMAT, len(self.tokens)
        head = _HEAD.pack(magic, self.parent, self.address, self.start, count, nbytes)
        return head + packed(self.tokens)


def chain(root: bytes, tokens: list[int]) -> Iterator[TokenBlock]:
    """The blocks of ``tokens``; the last one may be short."""
    parent = root
    for start in range(0, len(tokens), BLOCK_TOKENS):
        block = TokenBlock(parent, start, tokens[start : start + BLOCK_TOKENS])
        yield block
        parent = block.address


Size = Callable[[TokenBlock], int]
"""Bytes of what a block holds."""


@dataclass(frozen=True)
class Entry:
    """A block's or snapshot's file as the folder shows it, its bytes, and when it was ``used``."""

    path: Path
    parent: bytes
    start: int
    count: int
    address: bytes
    is_snapshot: bool
    nbytes: int
    used: float


class BlockFolder:
    """The blocks in ``folder``, of all models and owners, of at most ``limit`` bytes; what was
    unused for longest goes first.  ``notify`` gets a line where a file is damaged or something
    can't be kept.  Raises ``ConfigError`` if there is no such folder and none can be made."""

    def __init__(self, folder: Path, limit: int, notify: Notify):
        self.folder, self.limit, self._notify = folder, limit, informs(notify)
        self.damaged = 0
        self._remark = ""  # the latest one: what goes on and on is said once
        self._left = list[OSError]()  # of what could not be removed lately
        make_private(folder)
        with suppress(OSError), self._locked() as lock:
            self._set_total(lock, self._tidy((), limit))

    # Reading

    def read(self, block: TokenBlock, size: Size) -> tuple[TokenBlock, memoryview] | None:
        """The block in the place of ``block`` that has most of its tokens at its beginning, whole,
        and its latents; None where no block has the first of them, or what has is damaged."""
        path = self._path(block)
        if not os.path.exists(path):  # nor where the disk does not answer
            block, path = self._closest(block)
        data = self._load(path, block, size(block)) if block.tokens else None
        return None if data is None else (block, data)

    def snapshot(self, block: TokenBlock, size: Size) -> tuple[TokenBlock, memoryview] | None:
        """The undamaged snapshot behind most of the tokens of ``block``, if there is one."""
        there = {one.address for one in self._children(block.parent, snapshots=True)}
        for count in range(len(block.tokens) if there else 0, 0, -1):
            begun = block.begun(count, is_snapshot=True)
            if begun.address in there:
                data = self._load(self._path(begun), begun, size(begun))
                if data is not None:
                    return begun, data
        return None

    def _load(self, path: Path, block: TokenBlock, nbytes: int) -> memoryview | None:
        """What is in the file of ``block``; None where that is nothing to use."""
        head = block.head(nbytes)
        size = len(head) + nbytes + _CHECKSUM_BYTES
        try:
            with open(path, "rb", opener=_no_link) as file:
                if (there := os.fstat(file.fileno()).st_size) != size:
                    raise ValueError(f"has {there} bytes, expected {size}")
                data = memoryview(bytearray(size))
                file.readinto(data)
            content = data[:-_CHECKSUM_BYTES]
            if xxhash.xxh3_128_digest(content) != data[-_CHECKSUM_BYTES:]:
                raise ValueError("its checksum is wrong")
            if content[: len(head)] != head:
                raise ValueError("is another block than its name says")
            return content[len(head) :]
        except FileNotFoundError:  # another process has just evicted it
            return None
        except OSError as problem:
            self._say(f"{path}: can't be read ({problem.strerror}); its tokens are computed anew")
        except ValueError as problem:
            self.damaged += 1
            self._say(f"{path}: {problem}; it is dropped, and its tokens are computed anew")
            self._unlink(path)
        return None

    def _closest(self, block: TokenBlock) -> tuple[TokenBlock, Path]:
        """The one in the place of ``block`` that begins with most of its tokens, empty for none."""
        best, most = (block.begun(0), self.folder), 0
        for entry in islice(self._children(block.parent), _MOST_SIBLINGS):
            held = _tokens(entry)
            if (common := shared_prefix(held, block.tokens)) > most:
                best, most = (TokenBlock(block.parent, block.start, held), entry.path), common
        return best

    def touch(self, block: TokenBlock) -> None:
        """The chain up to ``block`` was used now."""
        with suppress(OSError):  # evicted meanwhile, or a folder that can only be read
            os.utime(self._path(block))

    def _path(self, block: TokenBlock) -> Path:
        parent, state = block.parent.hex(), "-state" * block.is_snapshot
        name = f"{parent}-{block.start:08}-{len(block.tokens):02}-{block.address.hex()}{state}"
        return self.folder / parent[:2] / name

    def _children(self, parent: bytes, snapshots: bool = False) -> Iterator[Entry]:
        folder = self.folder / parent.hex()[:2]
        names = glob(f"{parent.hex()}-*", root_dir=folder)  # none of a folder that can't be read
        entries = filter(None, map(_entry, map(folder.joinpath, names)))
        return (entry for entry in entries if entry.is_snapshot == snapshots)

    # Writing

    def add(
        self,
        blocks: list[TokenBlock],
        size: Size,
        content: Callable[[TokenBlock], memoryview],
        snapshots: Iterable[TokenBlock] = (),
    ) -> int:
        """Keep the ``blocks`` of one chain, from its root on, and ``snapshots`` in them;
        ``content`` is asked of those that are not there.  What can't be written, or has no room, is
        not kept, nor is what comes behind it, and nothing while another process writes: the next
        call keeps that too, and the engine waits for nobody.  Returns the bytes written."""
        kept = [*blocks, *snapshots]
        missing = [block for block in kept if not os.path.exists(self._path(block))]
        if missing and (last := blocks[-1]) in missing and self._is_covered(last):
            missing.remove(last)
        if not missing or blocks[-1].end < _LEAST_TOKENS:
            self.touch(blocks[-1])
            return 0
        written = 0
        try:
            with self._locked() as lock:
                for block in sorted(missing, key=lambda block: block.start):
                    if os.path.exists(self._path(block)):  # another process has just kept it
                        continue
                    head, nbytes = block.head(size(block)), size(block)
                    needed = len(head) + nbytes + _CHECKSUM_BYTES
                    if not self._reserve(lock, needed, kept):
                        room = f"{format_size(self.limit)} have room for {block.start:,} tokens"
                        self._say(f"{self.folder}: {room} of this text; --session-limit sets it")
                        break
                    freed = self._write(block, head, content(block))
                    self._set_total(lock, self._total(lock) - freed)
                    written += needed
        except OSError as problem:
            reason = problem.strerror or str(problem)
            self._say(f"{self.folder}: can't be written ({reason}), so it is kept in part only")
        return written

    def _is_covered(self, block: TokenBlock) -> bool:
        """Whether a longer block begins with its tokens."""
        count = len(block.tokens)
        longer = (one for one in self._children(block.parent) if one.count > count)
        return any(_tokens(one)[:count] == block.tokens for one in longer)

    def _write(self, block: TokenBlock, head: bytes, content: memoryview) -> int:
        """Write a block, and remove what it has grown out of.  Returns the bytes that frees."""
        digest = xxhash.xxh3_128(head)
        digest.update(content)
        write_private(self._path(block), [head, content, digest.digest()])
        freed = 0
        for entry in [] if block.is_snapshot else [*self._children(block.parent)]:
            is_shorter = entry.count < len(block.tokens)
            if is_shorter and entry.address == address(block.parent, block.tokens[: entry.count]):
                freed += entry.nbytes * self._unlink(entry.path)
        return freed

    def sweep(self, wanted: Iterable[TokenBlock]) -> tuple[int, list[OSError]]:
        """Remove all but ``wanted`` blocks and their snapshots; bytes freed, and errors."""
        with self._locked(_LOCK_SECONDS) as lock:
            before, total = self._tidy((), self.limit), self._tidy(wanted, 0)
            self._set_total(lock, total)
        return before - total, self._left

    @contextmanager
    def _locked(self, seconds: float = 0) -> Iterator[int]:
        """No other process changes the folder meanwhile.  Raises ``OSError`` where one does for so
        many seconds."""
        try:
            handle = take_lock(self.folder / "lock", seconds)
        except BlockingIOError:
            raise OSError("another process is saving") from None
        try:
            yield handle
        finally:
            os.close(handle)

    # The limit.  The lock's file holds the bytes of all blocks, so that not every save counts them.
    # Bytes are added before a file is written: after a kill they are too many, until counted again.

    def _reserve(self, lock: int, size: int, kept: Iterable[TokenBlock]) -> bool:
        """Count ``size`` more bytes, evicting others than ``kept`` where they have no room."""
        total = self._total(lock)
        if total + size > self.limit:
            total = self._tidy(kept, self.limit - size)
        has_room = total + size <= self.limit
        self._set_total(lock, total + size * has_room)
        return has_room

    def _total(self, lock: int) -> int:
        """As noted; as much as there may be, so that it is counted, where nothing is."""
        noted = bytearray(20)
        system.read_at(lock, memoryview(noted), 0)
        return int(noted) if noted.isdigit() else self.limit

    def _set_total(self, lock: int, total: int) -> None:
        system.write_at(lock, memoryview(b"%020d" % total), 0)

    def _tidy(self, kept: Iterable[TokenBlock], limit: int) -> int:
        """Remove what killed writers left, then the blocks used longest ago but ``kept`` and their
        snapshots, down to ``limit`` bytes.  Returns the bytes that are left.  A block was used when
        its latest descendant was, and one whose parent is gone never."""
        self._left.clear()
        entries = sorted(self._entries(), key=lambda entry: -entry.start)
        used = defaultdict[bytes, float](float)
        for entry in entries:
            used[entry.address] = max(entry.used, used[entry.address])
            used[entry.parent] = max(used[entry.address], used[entry.parent])
        reached = set[bytes]()
        for entry in reversed(entries):
            if entry.start == 0 or entry.parent in reached:
                reached.add(entry.address)
        total = sum(entry.nbytes for entry in entries)

        def order(entry: Entry) -> tuple[float, int, bool]:
            last = used[entry.address] if entry.address in reached else 0.0
            return last, -entry.start, not entry.is_snapshot

        # A block is kept, and each snapshot behind a beginning of its tokens.
        texts = defaultdict[bytes, list[list[int]]](list)  # behind each parent
        for block in kept:
            texts[block.parent].append(block.tokens)

        def is_kept(entry: Entry) -> bool:
            there = (t for t in texts[entry.parent] if entry.is_snapshot or entry.count == len(t))
            return any(entry.address == address(entry.parent, t[: entry.count]) for t in there)

        for entry in sorted(entries, key=order):
            if total <= limit:
                break
            if not is_kept(entry) and self._unlink(entry.path):
                total -= entry.nbytes
        return total

    def _entries(self) -> Iterator[Entry]:
        """All blocks.  Removes files that were never finished, so the caller has the lock."""
        for path in list(self.folder.glob("[0-9a-f][0-9a-f]/*")):
            if path.name.endswith(".tmp"):
                self._unlink(path)
            elif (entry := _entry(path)) is not None:
                yield entry

    def _unlink(self, path: Path) -> bool:
        try:
            system.patiently(path.unlink)
            return True
        except OSError as problem:
            if not isinstance(problem, FileNotFoundError):  # a reader drops a damaged one
                self._left.append(problem)
            return False

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, as counted last."""
        with suppress(OSError, ValueError):
            return int((self.folder / "lock").read_bytes()[:20])
        return 0

    def _say(self, remark: str) -> None:
        if remark != self._remark:
            self._remark = remark
            self._notify(remark)


def make_private(folder: Path) -> None:
    """Make ``folder`` for this user alone.  Raises ``ConfigError``."""
    with refused(folder, ConfigError, "can't keep sessions there"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)


def write_private(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Replace ``path`` by the ``parts`` after each other, durably and never half, for this user
    alone; only one process may write it at a time.  Raises ``OSError``."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    system.patiently(temporary_name(path).unlink, True)
    alone = os.O_EXCL | system.NO_LINK
    replace_file(path, *parts, opener=lambda name, flags: os.open(name, flags | alone, 0o600))


def _entry(path: Path) -> Entry | None:
    """What the file's name says; None if it is no block's, or has just gone."""
    if (match := _NAME.fullmatch(path.name)) is not None:
        parent, start, count, own, state = match.groups()
        with suppress(OSError):
            size, used = (file := path.lstat()).st_size, file.st_mtime
            place = bytes.fromhex(parent), int(start), int(count)
            return Entry(path, *place, bytes.fromhex(own), state is not None, size, used)
    return None


def _tokens(entry: Entry) -> list[int]:
    """The block's tokens, unchecked; none if the file can't be read."""
    with suppress(OSError), open(entry.path, "rb", buffering=0, opener=_no_link) as file:
        file.seek(_HEAD.size)
        return unpacked(file.read(4 * entry.count))
    return []


def _no_link(path: str, flags: int) -> int:
    return system.open_file(path, flags | system.NO_LINK)


def shared_prefix(cached: list[int], prompt: list[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    limit = min(len(cached), len(prompt))
    if cached[:limit] == prompt[:limit]:
        return limit
    return next(index for index in range(limit) if cached[index] != prompt[index])
