"""Sessions on disk: reopened to the same bits, shared, bounded, and worth nothing where a file is
not what it claims to be."""

import hashlib
import os
import random
import shutil
import struct
import threading
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import xxhash

from slotmoe.errors import ConfigError
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.sessions import store as store_module
from slotmoe.offload.sessions.blocks import BlockFolder, chain, shared_prefix
from slotmoe.offload.sessions.names import NamedSession, Saved, remove
from slotmoe.system import take_lock
from tests.support.disk import per_token
from tests.support.engine import decode
from tests.support.hostile import flip
from tests.support.tiny import SAMPLE

TEXT = [id % 4000 for id in range(7, 7 + 13 * 200, 13)]  # 200 tokens: three blocks and a bit
ROOT, TOKEN_BYTES = bytes(16), 24


@pytest.fixture(scope="module")
def runtime(sample_export):
    with Runtime.open(sample_export, ram="2GiB", context=1024) as runtime:
        yield runtime


def keeping(runtime, folder):
    """Let ``runtime`` keep its texts in ``folder``, with none in memory; what it says."""
    said = []
    runtime.keep_in(folder, notify=said.append)
    runtime.engine.empty()
    return said


def restored(runtime, ids):
    """How many tokens of ``ids`` were on disk, and the logits after the last one."""
    before = runtime.engine.batch.totals.reused_tokens
    logits = decode(runtime, ids, [])
    return runtime.engine.batch.totals.reused_tokens - before, logits


def files(folder):
    """The blocks, those of the beginning first."""
    paths = [path for path in (folder / "blocks").rglob("*-*") if path.is_file()]
    return sorted(paths, key=lambda path: path.name.split("-")[1:])


@pytest.fixture(scope="module")
def store(runtime, tmp_path_factory):
    """A folder that holds ``TEXT``, and the logits after it."""
    folder = tmp_path_factory.mktemp("kept") / "sessions"
    keeping(runtime, folder)
    logits = decode(runtime, TEXT, [])
    for path in (folder, *folder.rglob("*")):  # only this user can read it
        assert path.stat().st_mode & 0o777 == (0o600 if path.is_file() else 0o700)
    return folder, logits


@pytest.fixture
def copy(store, tmp_path):
    """A folder of its own with the same."""
    return shutil.copytree(store[0], tmp_path / "sessions")


def test_reopened_logits_are_bitwise_those_of_computing_anew(runtime, sample_export, store, copy):
    """Also where the context has less room than when they were kept."""
    with Runtime.open(sample_export, context=201, slots=60, threads=1) as reopened:
        said = keeping(reopened, copy)
        count, logits = restored(reopened, TEXT)
        assert (count, said) == (199, [])
        assert torch.equal(logits, store[1])
        after = decode(reopened, [*TEXT, 5], [])
        assert reopened.stats()["sessions"]["restored_tokens"] == 199
        assert reopened.stats()["tokens"]["prefill_tokens"] == 2
    assert torch.equal(after, runtime.logits([*TEXT, 5])[-1:])


def test_owners_models_and_versions_do_not_share(runtime, sample_export, store, monkeypatch):
    """And the reference path keeps nothing."""

    def count(runtime, owner=""):
        said = keeping(runtime, store[0])
        engine = runtime.engine
        restore = partial(
            engine.batch.sessions.restore, engine.batch.sequences[0], TEXT[:-1], owner
        )
        found = engine.call(restore)
        assert not said
        return found

    assert count(runtime) == 199
    assert count(runtime, owner="another key") == 0
    bits = set()
    for threads in (1, 2):  # by which the sums of torch's kernels have another order
        with Runtime.open(sample_export, context=256, kernels="torch", threads=threads) as other:
            assert count(other) == 0
            bits.add(other.stats()["sessions"]["bits"])
    assert len(bits) == 2
    model = runtime.model
    for place, name, value, there in (
        (model.source.manifest, "source", {"files": "as they are elsewhere"}, 199),
        (model.source.manifest, "layers", "of another export", 0),
        (vars(store_module), "version", lambda name: "9.9", 0),
        (vars(torch), "__version__", "9.9", 0),
        (vars(store_module), "load", lambda: SimpleNamespace(digest="of other kernels"), 0),
        (vars(torch.backends.cpu), "get_cpu_capability", lambda: "SSE", 0),
        (vars(model.device), "name", "another", 0),
        (vars(model.backend), "name", "another", 0),
        (vars(model.config), "num_experts_per_tok", 5, 0),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(place, name, value)
            assert count(runtime) == there, name
    refused = pytest.raises(ConfigError, match="keeps no sessions")
    with Runtime.open(SAMPLE, quantize=False, context=64) as reference, refused:
        reference.keep_in(store[0])


def test_a_save_waits_for_no_other_and_says_so_once(runtime, tmp_path, monkeypatch):
    """What it leaves out comes with the next."""
    said, waits = keeping(runtime, tmp_path), []
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: waits.append(threading.current_thread().name))
        lock = take_lock(tmp_path / "blocks" / "lock", 0)
        decode(runtime, TEXT[:60], TEXT[60:])  # the end of four blocks
    (line,) = said
    assert "another process is saving" in line and "slotmoe-engine" not in waits
    os.close(lock)
    decode(runtime, [*TEXT, 5], [])
    runtime.engine.empty()
    assert (restored(runtime, [*TEXT, 5, 6])[0], len(said)) == (201, 1)


def swap(path):
    """Another, whole block under this one's name."""
    other = next(p for p in path.parents[1].rglob("*-00000000-*") if p != path)
    path.write_bytes(other.read_bytes())


def link(path):
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


DAMAGES = {
    **{f"byte {position}": partial(flip, place=position, bit=4) for position in (0, 52, 70, -1)},
    "cut": lambda path: os.truncate(path, 3000),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "swapped": swap,
    "link": link,
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_block_is_a_miss_with_one_line(runtime, store, copy, damage):
    (path,) = (path for path in files(copy) if "-00000064-" in path.name)
    damage(path)
    said = keeping(runtime, copy)
    count, logits = restored(runtime, TEXT)
    assert torch.equal(logits, store[1])
    assert count == 64
    (line,) = said
    assert path.name in line and "\n" not in line and "anew" in line
    if path.is_dir() or path.is_symlink():  # not ours to remove
        return
    said = keeping(runtime, copy)
    assert (restored(runtime, TEXT)[0], said) == (199, [])


def rows_of(block):
    """Rows that say which tokens they are of."""
    return memoryview(b"".join(token.to_bytes(TOKEN_BYTES, "little") for token in block.tokens))


def fill(folder, tokens):
    """How many bytes were written."""
    return folder.add(list(chain(ROOT, tokens)), per_token(TOKEN_BYTES), rows_of)


def held(folder, tokens):
    """How many of ``tokens`` are there, each with its row."""
    count = 0
    for block in chain(ROOT, tokens):
        if (found := folder.read(block, per_token(TOKEN_BYTES))) is None:
            break
        assert found[1] == rows_of(found[0])
        count = block.start + shared_prefix(found[0].tokens, block.tokens)
        if count < block.end:
            break
    return count


def test_files_are_as_documented(tmp_path):
    folder, (first, last) = BlockFolder(tmp_path, 1 << 20, pytest.fail), chain(ROOT, [*range(70)])
    behind = last.begun(3, is_snapshot=True)
    given = [first, last], per_token(TOKEN_BYTES), rows_of, [behind]
    assert folder.add(*given) > folder.add(*given) == 0
    assert fill(folder, [*range(67)]) == 0  # which a longer block begins with
    for block in (first, last, behind):
        count, start, rows = len(block.tokens), block.tokens[0], rows_of(block)
        ids = struct.pack(f"<{count}I", *block.tokens)
        own = hashlib.sha256(block.parent + ids).digest()[:16]
        magic, end = (b"state", "-state") if block.is_snapshot else (b"block", "")
        data = b"slotmoe %b 2\n" % magic + block.parent + own
        data += struct.pack("<IIQ", start, count, len(rows)) + ids + rows
        name = f"{block.parent.hex()}-{start:08}-{count:02}-{own.hex()}{end}"
        assert (tmp_path / name[:2] / name).read_bytes() == data + xxhash.xxh3_128_digest(data)


@pytest.mark.parametrize("seed", range(6))
def test_blocks_in_any_order_of_events(tmp_path, seed):
    """Of two processes, beside a list of texts: what is there is right, as much as there can be,
    counted and within the limit; strangers' files and damage cost what they hit."""
    chance, said, kept, harmed = random.Random(seed), [], [()], 0
    limit = chance.choice([1 << 30, 6000])
    for _ in range(40):
        event = chance.choice(["restart", "add", "add", "read", "junk", "damage", "cut", "lost"])
        if event == "restart" or len(kept) == 1:
            folders = [BlockFolder(tmp_path / "blocks", limit, said.append) for _ in range(2)]
            assert not [*tmp_path.rglob("*.tmp")]
        folder, other, paths = chance.choice(folders), chance.choice(kept), blocks_in(tmp_path)
        text = [*other[: chance.randrange(len(other) + 1)]]
        text += [chance.randrange(3) for _ in range(chance.randrange(16, 200))]
        if event == "add" or not paths:
            fill(folder, text)
            kept.append(text)
        elif event == "read":
            most, count = max(shared_prefix([*one], text) for one in kept), held(folder, text)
            assert count == most or (count < most and (limit == 6000 or harmed))
        elif event == "junk":
            path = chance.choice(paths)
            path.with_name(f"{path.name}.tmp").write_text("half")
            path.with_name("notes-of-mine.txt").write_text("mine")
        elif event != "restart" and chance.random() < 0.3:
            path = chance.choice(paths)
            path.unlink() if event == "lost" else flip(path, -1, 4)
            if event == "cut":
                os.truncate(path, chance.randrange(path.stat().st_size))
            harmed += 1
        assert sum(path.stat().st_size for path in blocks_in(tmp_path)) <= folder.nbytes <= limit
    assert all("anew" in line or "have room" in line for line in said), said


def blocks_in(folder):
    return [path for path in files(folder) if path.name.count("-") == 3 and path.suffix != ".tmp"]


def test_the_limit_evicts_what_was_unused_for_longest(tmp_path):
    """And of that the end first."""
    texts = [[*range(1000 * index, 1000 * index + 130)] for index in range(4)]
    probe = BlockFolder(tmp_path / "probe", 1 << 20, print)
    assert fill(probe, [*range(9000, 9015)]) == 0  # too few to be worth a file
    assert fill(BlockFolder(tmp_path / "few", 1 << 20, print), [*range(16)])
    assert fill(probe, texts[0][:100]) and fill(probe, texts[0])
    folder = BlockFolder(tmp_path / "blocks", 3 * probe.nbytes, pytest.fail)
    for index, tokens in enumerate(texts[:3]):
        fill(folder, tokens)
        for path in files(tmp_path):
            if path.stat().st_mtime > 10_000:
                os.utime(path, (index, index))
    folder.touch(list(chain(ROOT, texts[0]))[-1])
    fill(folder, texts[3])
    assert [held(folder, tokens) for tokens in texts] == [130, 0, 130, 130]
    fill(folder, [*texts[3], *range(9)])
    assert [held(folder, tokens) for tokens in texts] == [130, 0, 64, 130]


UNSEEN = r"other machines do not see the locks.*"
MOUNTS = {
    ("fuse.sshfs", "rw"): UNSEEN + r"\(fuse.sshfs rw\)",
    ("nfs", "rw,vers=3,local_lock=all"): UNSEEN + "local_lock=all",
    ("nfs4", "rw,vers=4.2,local_lock=none"): None,
}


def test_a_folder_whose_locks_others_do_not_see_is_refused(runtime, tmp_path, monkeypatch):
    for (kind, options), refused in MOUNTS.items():
        mounts = ("/", "ext4", "rw"), (str(tmp_path), kind, options)
        found = [SimpleNamespace(mountpoint=p, fstype=t, opts=o) for p, t, o in mounts]
        monkeypatch.setattr("psutil.disk_partitions", lambda all, found=found: found)
        with nullcontext() if refused is None else pytest.raises(ConfigError, match=refused):
            runtime.keep_in(tmp_path / "sessions")


def saved(tokens, text="Call me"):
    return Saved(ROOT, list(tokens), "text", [{"role": "text", "content": text}])


def test_a_named_session_comes_back(tmp_path):
    with NamedSession(tmp_path, "plans") as session:
        assert session.saved is None
        session.save(saved(range(20_000), "\ud800 a, b, " * 999))
        with pytest.raises(ConfigError, match="session plans: is in use"):
            NamedSession(tmp_path, "plans")
    with NamedSession(tmp_path, "plans") as session:
        assert session.saved == saved(range(20_000), "\ud800 a, b, " * 999)
    assert session.path.stat().st_mode & 0o777 == 0o600
    for name in ("", "..", "a/b", ".x", "x" * 65, "ä", "a\n", "-x", "con", "NUL.x"):
        with pytest.raises(ConfigError, match="is no name of a session"):
            NamedSession(tmp_path, name)


HARMS = [(b"Call", b"Cbll"), (b'"version": 1', b'"version": 2'), (b"{", b"[")]


@pytest.mark.parametrize(("old", "new"), HARMS)
def test_a_damaged_session_is_refused_and_can_be_removed(tmp_path, old, new):
    with NamedSession(tmp_path, "plans") as session:
        session.save(saved([1, 2]))
    session.path.write_bytes(session.path.read_bytes().replace(old, new))
    with pytest.raises(ConfigError, match=r"plans\.json: "):
        NamedSession(tmp_path, "plans")
    remove(tmp_path, ["plans"])
    assert not list((tmp_path / "names").iterdir())
