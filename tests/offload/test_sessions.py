"""Sessions on disk: reopened to the same bits, shared, bounded, and worth nothing where a file is
not what it claims to be."""

import errno
import os
import random
import shutil
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from slotmoe.errors import ConfigError, PlanError
from slotmoe.model.generate import Answer
from slotmoe.model.sampling import Sampling
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.sessions import blocks as blocks_module
from slotmoe.offload.sessions.blocks import BLOCK_TOKENS, BlockFolder, chain, shared_prefix
from slotmoe.offload.sessions.names import NamedSession, Saved, listing, remove
from slotmoe.quant.kernels.cpu.bindings import Kernels
from tests.support.blocks import per_token
from tests.support.engine import IDS, ask, decode
from tests.support.tiny import SAMPLE
from tests.support.twin import Twin

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


def computed(runtime, ids):
    """Logits after ``ids``, all computed anew, and kept nowhere."""
    return runtime.logits(ids)[-1:]


def kept(runtime, folder, ids):
    """Compute and keep a text: the logits after its last token."""
    said, logits = keeping(runtime, folder), decode(runtime, ids, [])
    assert not said
    return logits


def restored(runtime, ids):
    """How many tokens of ``ids`` were on disk, and the logits after the last one."""
    before = runtime.engine.batch.totals.reused_tokens
    logits = decode(runtime, ids, [])
    return runtime.engine.batch.totals.reused_tokens - before, logits


def files(folder):
    """The blocks, those of the beginning first."""
    paths = [path for path in (folder / "blocks").rglob("*-*") if path.is_file()]
    return sorted(paths, key=lambda path: path.name.split("-")[1:])


def size_of(folder):
    return sum(path.stat().st_size for path in files(folder))


@pytest.fixture(scope="module")
def store(runtime, tmp_path_factory):
    """A folder that holds ``TEXT``, and the logits after it."""
    folder = tmp_path_factory.mktemp("kept") / "sessions"
    return folder, kept(runtime, folder, TEXT)


@pytest.fixture
def copy(store, tmp_path):
    """A folder of its own with the same."""
    return shutil.copytree(store[0], tmp_path / "sessions")


# The same bits


def test_reopened_logits_are_bitwise_those_of_computing_anew(runtime, sample_export, store, copy):
    """Also where the context has less room than when they were kept."""
    with Runtime.open(sample_export, context=201, slots=60, threads=1) as reopened:
        said = keeping(reopened, copy)
        count, logits = restored(reopened, TEXT)
        assert (count, said) == (199, [])
        assert torch.equal(logits, store[1])
        after = decode(reopened, [*TEXT, 5], [])
        with pytest.raises(PlanError, match="the context holds 201"):
            reopened.generate([*TEXT, *TEXT], 4)
        assert reopened.stats()["sessions"]["restored_tokens"] == 199
        assert reopened.stats()["tokens"]["prefill_tokens"] == 2
    assert torch.equal(after, computed(runtime, [*TEXT, 5]))


def test_a_gpus_latents_come_back(on_twin, tmp_path):
    def logits():
        with on_twin(Twin()) as runtime:
            runtime.keep_in(tmp_path)
            count, _ = restored(runtime, IDS)
            first = runtime.engine.batch.sequences[0]
            return count, runtime.engine.call(lambda: first.state.saved(0, len(IDS) - 1))

    (none, first), (count, again) = logits(), logits()
    assert (none, count) == (0, len(IDS) - 1)
    assert torch.equal(first, again)


def test_a_prompt_that_differs_reuses_what_comes_before(runtime, copy):
    for same in (1, 63, 64, 100, 130, 199):
        ids, said = [*TEXT[:same], 3, *TEXT[same:150]], keeping(runtime, copy)
        count, logits = restored(runtime, ids)
        assert (count, said) == (same, [])
        assert torch.equal(logits, computed(runtime, ids))


# What is kept


def test_only_this_user_can_read_it(store):
    folder = store[0]
    for path in (folder, *folder.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o600 if path.is_file() else 0o700)


def test_long_answers_are_kept_as_they_grow(runtime, tmp_path, monkeypatch):
    """Once, and no file is touched for a token that fills no block."""
    keeping(runtime, tmp_path)
    monkeypatch.setattr(BlockFolder, "touch", lambda *_: pytest.fail("a file is touched"))
    answer, sizes = Answer(TEXT[:70], runtime.tokenizer, (), Sampling(), 70), []

    def note(_):
        sizes.append([path.name.split("-")[2] for path in files(tmp_path)])

    ask(runtime, TEXT[:70], answer, note)
    assert sizes[-2:] == [["64", "64"], ["64", "64", "11"]]
    assert runtime.sessions.stats()["written_bytes"] == size_of(tmp_path)


# Of whom it is


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
    with Runtime.open(sample_export, context=1024, kernels="torch") as other:
        assert count(other) == 0
    bits = runtime.stats()["sessions"]["bits"]
    for what in ("torch.backends.cpu.get_cpu_capability", f"{Kernels.__module__}.Kernels.digest"):
        with monkeypatch.context() as patch:  # of another machine
            patch.setattr(what, (lambda: "SSE") if "torch" in what else "other")
            assert count(runtime) == 0 and runtime.stats()["sessions"]["bits"] != bits
    with monkeypatch.context() as patch:
        patch.setitem(runtime.model.source.manifest, "checksum", "of another export")
        assert count(runtime) == 0
    monkeypatch.setattr("slotmoe.offload.sessions.store.version", lambda name: "9.9")
    assert count(runtime) == 0
    refused = pytest.raises(ConfigError, match="keeps no sessions")
    with Runtime.open(SAMPLE, quantize=False, context=64) as reference, refused:
        reference.keep_in(store[0])


# Files that are not what they claim to be


def flip(position):
    def damage(path):
        data = bytearray(path.read_bytes())
        data[position] ^= 4
        path.write_bytes(data)

    return damage


def swap(path):
    """Another, whole block under this one's name."""
    other = next(p for p in path.parents[1].rglob("*-00000000-*") if p != path)
    path.write_bytes(other.read_bytes())


def link(path):
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


# In the magic, the parent, the address, the start, the count, a token, a latent, the sum.
BYTES = (0, 20, 40, 50, 52, 70, 2000, -1)
DAMAGES = {
    **{f"byte {position}": flip(position) for position in BYTES},
    "cut": lambda path: os.truncate(path, 3000),
    "empty": lambda path: os.truncate(path, 0),
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


# Writing


def fill(folder, tokens, root=ROOT):
    """Keep rows that say which tokens they are of; how many bytes were written."""
    return folder.add(list(chain(root, tokens)), per_token(TOKEN_BYTES), rows_of)


def rows_of(block):
    return memoryview(b"".join(token.to_bytes(TOKEN_BYTES, "little") for token in block.tokens))


def held(folder, tokens, root=ROOT):
    """How many of ``tokens`` are there, each with its row."""
    count = 0
    for block in chain(root, tokens):
        found = folder.read(block, per_token(TOKEN_BYTES))
        if found is None:
            return count
        assert found[1] == rows_of(found[0])
        count = block.start + shared_prefix(found[0].tokens, block.tokens)
        if count < block.end:
            return count
    return count


def texts(count, length=130):
    return [[1000 * index + position for position in range(length)] for index in range(count)]


def blocks_in(folder):
    return [path for path in files(folder) if path.name.count("-") == 3 and path.suffix != ".tmp"]


@pytest.mark.parametrize("seed", range(6))
def test_blocks_in_any_order_of_events(tmp_path, seed):
    """Of two processes, beside a list of texts: what is there is right, as much as there can be,
    counted and within the limit; strangers' files and damage cost what they hit."""
    chance, said, kept, flips = random.Random(seed), [], [()], 0
    limit = chance.choice([1 << 30, 6000])
    folders = [BlockFolder(tmp_path / "blocks", limit, said.append) for _ in range(2)]
    for _ in range(40):
        folder, other = chance.choice(folders), chance.choice(kept)
        text = [*other[: chance.randrange(len(other) + 1)]]
        text += [chance.randrange(3) for _ in range(chance.randrange(16, 200))]
        event = chance.choice(["add", "add", "read", "junk", "damage", "lost", "restart"])
        if event == "add":
            fill(folder, text)
            kept.append(text)
            starts = [path.name.split("-")[1] for path in blocks_in(tmp_path)]
            assert flips or limit == 6000 or starts.count("00000000") <= len(kept)
        elif event == "read":
            most, count = max(shared_prefix([*one], text) for one in kept), held(folder, text)
            assert count == most or (count < most and (limit == 6000 or flips))
        elif event == "junk" and blocks_in(tmp_path):
            path = chance.choice(blocks_in(tmp_path))
            path.with_name(f"{path.name}.tmp").write_text("half")
            path.with_name("notes-of-mine.txt").write_text("mine")
        elif event == "damage" and blocks_in(tmp_path) and chance.random() < 0.3:
            flip(-1)(chance.choice(blocks_in(tmp_path)))
            flips += 1
        elif event == "lost" and blocks_in(tmp_path) and chance.random() < 0.3:
            chance.choice(blocks_in(tmp_path)).unlink()  # nothing behind the gap serves
            flips += 1
        elif event == "restart":
            folders = [BlockFolder(tmp_path / "blocks", limit, said.append) for _ in range(2)]
            assert not [*tmp_path.rglob("*.tmp")]
        assert sum(path.stat().st_size for path in blocks_in(tmp_path)) <= folder.nbytes <= limit
    assert all("anew" in line or "have room" in line for line in said), said


def test_the_limit_evicts_what_was_unused_for_longest(tmp_path):
    said = []
    size = fill(BlockFolder(tmp_path / "probe", 1 << 20, print), texts(1)[0])
    folder = BlockFolder(tmp_path / "blocks", 3 * size, said.append)
    conversations = texts(4)
    for index, tokens in enumerate(conversations[:3]):
        fill(folder, tokens)
        for path in files(tmp_path):
            if path.stat().st_mtime > 10_000:
                os.utime(path, (index, index))
    assert held(folder, conversations[0]) == 130
    folder.touch(list(chain(ROOT, conversations[0]))[-1])
    fill(folder, conversations[3])
    assert [held(folder, tokens) for tokens in conversations] == [130, 0, 130, 130]
    assert folder.nbytes == 3 * size
    fill(folder, [*conversations[3], *range(9)])  # a little more: the end of the oldest goes
    assert [held(folder, tokens) for tokens in conversations] == [130, 0, 64, 130]
    assert not said


@pytest.mark.parametrize("call", ["open", "fsync", "rename", "pwrite"])
@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_what_cannot_be_written_is_said_once_and_tried_again(tmp_path, monkeypatch, call, problem):
    said, tokens = [], texts(1, 200)[0]
    folder = BlockFolder(tmp_path / "blocks", 1 << 20, said.append)
    fill(folder, tokens[:128])
    original = getattr(os, call)

    def fail(path, *arguments, **options):
        if call != "open" or (arguments and arguments[0] & os.O_CREAT):
            raise OSError(problem, os.strerror(problem), path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, call, fail)
    for _ in range(2):
        fill(folder, tokens)
    monkeypatch.undo()
    assert len(said) == 1 and os.strerror(problem) in said[0]
    assert held(folder, tokens) == 128
    assert not list(tmp_path.rglob("*.tmp"))
    fill(folder, tokens)
    assert held(folder, tokens) == 200


def test_a_lock_that_is_never_released_costs_a_save_and_no_more(tmp_path, monkeypatch):
    said, tokens = [], texts(1)[0]
    folder = BlockFolder(tmp_path / "blocks", 1 << 20, said.append)
    monkeypatch.setattr(blocks_module, "_LOCK_SECONDS", 0.02)
    with folder._locked():
        fill(BlockFolder(tmp_path / "blocks", 1 << 20, said.append), tokens)
    assert len(said) == 1 and "another process" in said[0]


def mounted(monkeypatch, folder, kind, options="rw"):
    """As if a file system of that kind were mounted at ``folder``."""
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4", opts="rw")]
    mounts += [SimpleNamespace(mountpoint=str(folder), fstype=kind, opts=options)]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)


UNSEEN = r"other machines do not see the locks.*"
MOUNTS = {
    ("fuse.sshfs", "rw"): UNSEEN + r"\(fuse.sshfs rw\)",
    ("nfs", "rw,vers=3,local_lock=all"): UNSEEN + "local_lock=all",
    ("cifs", "rw,nobrl"): UNSEEN + "nobrl",
    ("nfs4", "rw,vers=4.2,local_lock=none"): None,
    ("cifs", "rw"): None,
    ("fuse.glusterfs", "rw"): None,
}


def test_a_folder_whose_locks_others_do_not_see_is_refused(runtime, tmp_path, monkeypatch):
    for (kind, options), refused in MOUNTS.items():
        mounted(monkeypatch, tmp_path, kind, options)
        with nullcontext() if refused is None else pytest.raises(ConfigError, match=refused):
            runtime.keep_in(tmp_path / "sessions")


def test_a_folder_without_locks_is_refused(runtime, tmp_path, monkeypatch):
    def flock(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(ConfigError, match="has no locks"):
        runtime.keep_in(tmp_path)


# Names


def saved(tokens, text="Call me"):
    return Saved(ROOT, list(tokens), "text", [{"role": "text", "content": text}])


def test_a_named_session_comes_back(tmp_path):
    folder = tmp_path / "sessions"
    with NamedSession(folder, "plans") as session:
        assert session.saved is None
        session.save(saved([1, 2], "\ud800"))
        with pytest.raises(ConfigError, match="session plans: is in use"):
            NamedSession(folder, "plans")
    with NamedSession(folder, "plans") as session:
        assert session.saved == saved([1, 2], "\ud800")
    assert session.path.stat().st_mode & 0o777 == 0o600
    tokens = [*range(163_840)]  # a long conversation with many values
    with NamedSession(folder, "later") as session:
        session.save(saved(tokens, "a, b, " * 20_000))
    with NamedSession(folder, "later") as session:
        assert session.saved.tokens == tokens
    os.utime(session.path, (1, 1))
    assert [listed.name for listed in listing(folder)] == ["plans", "later"]


def test_names_are_no_paths(tmp_path):
    for name in ("", "..", "a/b", ".x", "x" * 65, "ä", "a\n", "-x", "con", "NUL.x", "Com1"):
        with pytest.raises(ConfigError, match="is no name of a session"):
            NamedSession(tmp_path, name)


HARMS = [
    (b"Call", b"Cbll"),
    (b'"version": 1', b'"version": 2'),
    (b'"tokens": "AQ', b'"tokens": "!'),
    (b"{", b"["),
    (b'"text"', b'"x"'),
]


@pytest.mark.parametrize(("old", "new"), HARMS)
def test_a_damaged_session_is_refused_and_can_be_removed(tmp_path, old, new):
    with NamedSession(tmp_path, "plans") as session:
        session.save(saved([1, 2]))
    session.path.write_bytes(session.path.read_bytes().replace(old, new))
    with pytest.raises(ConfigError, match=r"plans\.json: "):
        NamedSession(tmp_path, "plans")
    assert listing(tmp_path)[0].saved is None
    remove(tmp_path, ["plans"])
    assert not list((tmp_path / "names").iterdir())


def test_removing_a_session_removes_its_blocks(tmp_path):
    folder, (first, second, unnamed) = BlockFolder(tmp_path / "blocks", 1 << 20, print), texts(3)
    second = [*first[:BLOCK_TOKENS], *second]
    for tokens in (first, second, unnamed):
        fill(folder, tokens)
    for name, tokens in (("first", first), ("second", second)):
        with NamedSession(tmp_path, name) as session:
            session.save(saved([*tokens, 5]))
    with NamedSession(tmp_path, "first"), pytest.raises(ConfigError, match="in use"):
        remove(tmp_path, ["first"])
    with pytest.raises(ConfigError, match="holds no session 'thirst'"):
        remove(tmp_path, ["first", "thirst"])
    assert held(folder, first) == 130
    before = folder.nbytes
    freed = remove(tmp_path, ["first"])
    assert freed > 0 and folder.nbytes == before - freed
    assert (held(folder, first), held(folder, unnamed)) == (BLOCK_TOKENS, 0)
    assert held(folder, second) >= len(second) // BLOCK_TOKENS * BLOCK_TOKENS
    assert [listed.name for listed in listing(tmp_path)] == ["second"]
    remove(tmp_path, ["second"])
    assert folder.nbytes == 0 and not files(tmp_path)
