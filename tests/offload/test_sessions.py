"""Sessions on disk: reopened to the same bits, shared, bounded, and worth nothing where a file is
not what it claims to be."""

import errno
import os
import subprocess
import sys
import tempfile
import threading

import pytest
import torch

from slotmoe.errors import ConfigError, PlanError
from slotmoe.model.generate import Answer, Sampling
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.scheduler import Job, Scheduler
from slotmoe.offload.sequence import Sequence, shared_prefix
from slotmoe.offload.sessions import blocks as blocks_module
from slotmoe.offload.sessions.blocks import BLOCK_TOKENS, Block, BlockFolder, chain
from slotmoe.offload.sessions.names import NamedSession, Saved, listing, remove
from tests.support.disk import memory
from tests.support.engine import IDS
from tests.support.params import nth
from tests.support.tiny import SAMPLE, write_checkpoint
from tests.support.twin import Twin

TEXT = [id % 4000 for id in range(7, 7 + 13 * 200, 13)]  # 200 tokens: three blocks and a bit
ROOT, TOKEN_BYTES = bytes(16), 24


def opened(export, folder, **options):
    """A runtime that keeps its texts, and what it said."""
    runtime, said = Runtime.open(export, ram="2GiB", **{"context": 1024, **options}), []
    runtime.keep_in(folder, notify=said.append)
    return runtime, said


def kept(export, folder, ids, **options):
    """Compute and keep a text: the logits after its last token."""
    runtime, said = opened(export, folder, **options)
    with runtime:
        logits = runtime.sequences[0].append(ids)
        runtime.keep()
    assert not said
    return logits


def restored(runtime, ids):
    """How many tokens of ``ids`` were on disk, and the logits after the last one."""
    sequence = runtime.sequences[0]
    sequence.rewind(0)
    count = runtime.sessions.restore(sequence, ids[:-1])
    return count, sequence.append(ids[count:])


def files(folder):
    """The blocks, those of the beginning first."""
    paths = [path for path in (folder / "blocks").rglob("*-*") if path.is_file()]
    return sorted(paths, key=lambda path: path.name.split("-")[1:])


@pytest.fixture(scope="module")
def store(sample_export, tmp_path_factory):
    """A folder that holds ``TEXT``, and the logits after it."""
    folder = tmp_path_factory.mktemp("kept") / "sessions"
    return folder, kept(sample_export, folder, TEXT)


@pytest.fixture
def copy(store, tmp_path):
    """A folder of its own with the same."""
    subprocess.run(["cp", "-a", store[0], tmp_path / "sessions"], check=True)
    return tmp_path / "sessions"


# The same bits


def test_reopened_logits_are_bitwise_those_of_computing_anew(sample_export, store, tmp_path):
    folder, wanted = store
    runtime, said = opened(sample_export, folder, slots=60, threads=1)
    with runtime:
        count, logits = restored(runtime, TEXT)
        assert (count, said) == (199, [])
        assert torch.equal(logits, wanted)
        after = runtime.sequences[0].append([5])
        assert runtime.stats()["sessions"]["restored_tokens"] == 199
        assert runtime.stats()["tokens"]["prefill_tokens"] == 0
    with Runtime.open(sample_export, context=1024) as runtime:
        runtime.sequences[0].append([*TEXT])
        assert torch.equal(after, runtime.sequences[0].append([5]))


@pytest.mark.parametrize(("kernels", "length"), nth(2, [("auto", 200), ("torch", 20)]))
def test_text_goes_on_as_if_the_process_had_not_ended(sample_export, tmp_path, kernels, length):
    def generated(runtime, ids, count):
        tokens = [*runtime.generate(ids, count, temperature=0.8, seed=3)]
        return [token.id for token in tokens], [token.logprob for token in tokens]

    runtime, _ = opened(sample_export, tmp_path, kernels=kernels)
    with runtime:
        first = generated(runtime, TEXT[:length], 12)[0]
        wanted = generated(runtime, [*TEXT[:length], *first], 6)
        runtime.keep()
    runtime, _ = opened(sample_export, tmp_path, kernels=kernels)
    with runtime:
        assert generated(runtime, [*TEXT[:length], *first], 6) == wanted
        assert runtime.stats()["sessions"]["restored_tokens"] == length + 11


@pytest.mark.usefixtures("twin")
def test_a_gpus_latents_come_back(on_twin, tmp_path):
    def logits():
        with on_twin(Twin()) as runtime:
            runtime.keep_in(tmp_path)
            count = runtime.sessions.restore(runtime.sequences[0], IDS[:-1])
            row = runtime.sequences[0].append(IDS[count:])
            runtime.keep()
            return count, runtime.sequences[0].latents(0, len(IDS) - 1), row

    (none, first, _), (count, again, _) = logits(), logits()
    assert (none, count) == (0, len(IDS) - 1)
    assert torch.equal(first, again)


@pytest.mark.parametrize("same", [1, 63, 64, 100, 130, 199])
def test_a_prompt_that_differs_reuses_what_comes_before(sample_export, store, same):
    ids = [*TEXT[:same], 3, *TEXT[same:150]]
    runtime, said = opened(sample_export, store[0])
    with runtime:
        count, logits = restored(runtime, ids)
        assert (count, said) == (same, [])
        with Runtime.open(sample_export, context=1024) as fresh:
            assert torch.equal(logits, fresh.sequences[0].append(ids))


def test_what_is_in_memory_is_not_read(sample_export, store):
    runtime, _ = opened(sample_export, store[0])
    with runtime:
        runtime.sequences[0].append(TEXT[:100])
        list(runtime.generate(TEXT, 1))
        stats = runtime.stats()["sessions"]
        assert stats["restored_tokens"] == 99
        assert stats["read_bytes"] < sum(path.stat().st_size for path in files(store[0])[1:])


# What is kept


@pytest.mark.usefixtures("processes")
def test_the_same_beginning_is_kept_once(sample_export, copy):
    other = [*TEXT[:140], *TEXT[:60]]
    kept(sample_export, copy, other)
    starts = [int(path.name.split("-")[1]) for path in files(copy)]
    assert starts == [0, 64, 128, 128, 192, 192]
    total = sum(path.stat().st_size for path in files(copy))
    assert BlockFolder(copy / "blocks", 1 << 30, print).nbytes == total


def test_bytes_are_those_of_the_files(tmp_path):
    folder, tokens = BlockFolder(tmp_path / "blocks", 1 << 20, print), texts(1, 200)[0]
    for length in (20, 50, 64, 70, 130, 200):
        fill(folder, tokens[:length])
        assert folder.nbytes == sum(p.stat().st_size for p in (tmp_path / "blocks").rglob("*-*"))


@pytest.mark.usefixtures("processes")
def test_a_text_that_grows_leaves_no_short_block(sample_export, copy):
    kept(sample_export, copy, [*TEXT, 9])
    assert [path.name.split("-")[1:3] for path in files(copy)] == [
        ["00000000", "64"],
        ["00000064", "64"],
        ["00000128", "64"],
        ["00000192", "09"],
    ]
    kept(sample_export, copy, TEXT)  # is in there
    assert len(files(copy)) == 4


def test_only_this_user_can_read_it(store):
    folder = store[0]
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o600}
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}


def test_an_interrupted_prefill_is_kept(sample_export, tmp_path, monkeypatch):
    ids = [*TEXT, *TEXT, *TEXT]
    runtime, _ = opened(sample_export, tmp_path)
    with runtime:
        original, passes = type(runtime.passes).forward, []

        def forward(self, *arguments):
            if passes:
                raise KeyboardInterrupt
            passes.append(1)
            return original(self, *arguments)

        monkeypatch.setattr(type(runtime.passes), "forward", forward)
        with pytest.raises(KeyboardInterrupt):
            next(runtime.generate(ids, 4))
        runtime.keep()
        done = runtime.sequences[0].length
        assert 0 < done < len(ids)
    monkeypatch.undo()
    runtime, _ = opened(sample_export, tmp_path)
    with runtime:
        count, logits = restored(runtime, ids)
        assert count == done
        runtime.sequences[0].rewind(0)
        assert torch.equal(logits, runtime.sequences[0].append(ids))


def test_a_server_stopped_in_the_middle_of_a_prompt_keeps_what_it_read(
    sample_export, tmp_path, monkeypatch
):
    ids, ended = [*TEXT, *TEXT, *TEXT], threading.Event()
    runtime, _ = opened(sample_export, tmp_path)
    with runtime:
        batch = Scheduler(runtime, 1, 1)
        original = Sequence.append

        def append(sequence, piece):
            batch.stop()
            return original(sequence, piece)

        monkeypatch.setattr(Sequence, "append", append)
        parts = runtime.tokenizer, runtime.eos_token_ids, Sampling(), 4
        batch.submit([Job(ids, Answer(ids, *parts), lambda delta: ended.set(), "a key")])
        assert ended.wait(30)
        batch.close()
        done = runtime.sequences[0].length
        assert 0 < done < len(ids)
    monkeypatch.undo()
    runtime, _ = opened(sample_export, tmp_path)
    with runtime:
        assert runtime.sessions.restore(runtime.sequences[0], ids, "a key") == done


def test_long_conversations_with_many_values_come_back(tmp_path):
    tokens = [*range(163_840)]
    with NamedSession(tmp_path, "long") as session:
        session.save(saved(tokens, "a, b, " * 20_000))
    with NamedSession(tmp_path, "long") as session:
        assert session.saved.tokens == tokens


def test_long_answers_are_kept_as_they_grow(sample_export, tmp_path):
    runtime, _ = opened(sample_export, tmp_path)
    with runtime:
        tokens = runtime.generate(TEXT[:60], 100)
        for _ in range(80):
            next(tokens)
        assert [path.name.split("-")[2] for path in files(tmp_path)] == ["64", "64"]


# Of whom it is


def test_owners_models_and_versions_do_not_share(sample_export, store, tmp_path, monkeypatch):
    def count(export, owner="", **options):
        runtime, said = opened(export, store[0], **options)
        with runtime:
            found = runtime.sessions.restore(runtime.sequences[0], TEXT[:-1], owner)
        assert not said
        return found

    assert count(sample_export) == 199
    assert count(sample_export, owner="another key") == 0
    assert count(sample_export, kernels="torch") == 0
    quantize(SAMPLE, tmp_path / "export", resident="bf16")
    assert count(tmp_path / "export") == 0
    monkeypatch.setattr("slotmoe.offload.sessions.store.version", lambda name: "9.9")
    assert count(sample_export) == 0


def test_a_longer_context_than_there_is(sample_export, store):
    runtime, _ = opened(sample_export, store[0], context=128)
    with runtime:
        with pytest.raises(PlanError, match="the context holds 128"):
            runtime.generate(TEXT, 4)
        ids = TEXT[:120]
        tokens = [token.id for token in runtime.generate(ids, 4)]
        assert runtime.stats()["sessions"]["restored_tokens"] == 119
    with Runtime.open(sample_export, context=1024) as runtime:
        assert tokens == [token.id for token in runtime.generate(ids, 4)]


def test_the_reference_path_keeps_nothing(tmp_path):
    write_checkpoint(tmp_path / "checkpoint")
    refused = pytest.raises(ConfigError, match="keeps no sessions")
    with Runtime.open(tmp_path / "checkpoint", quantize=False, context=64) as runtime, refused:
        runtime.keep_in(tmp_path / "sessions")


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


DAMAGES = {
    "magic": flip(0),
    "parent": flip(20),
    "address": flip(40),
    "start": flip(50),
    "count": flip(52),
    "row": flip(57),
    "token": flip(70),
    "latent": flip(2000),
    "checksum": flip(-1),
    "cut": lambda path: os.truncate(path, 3000),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "swapped": swap,
    "link": link,
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_block_is_a_miss_with_one_line(sample_export, store, copy, damage):
    (path,) = (path for path in files(copy) if "-00000064-" in path.name)
    damage(path)
    runtime, said = opened(sample_export, copy)
    with runtime:
        count, logits = restored(runtime, TEXT)
        assert torch.equal(logits, store[1])
        assert count == 64
        (line,) = said
        assert path.name in line and "\n" not in line and "anew" in line
        runtime.keep()
    if path.is_dir() or path.is_symlink():  # not ours to remove
        return
    runtime, said = opened(sample_export, copy)
    with runtime:
        assert restored(runtime, TEXT)[0] == 199
        assert not said


@pytest.mark.usefixtures("processes")
def test_other_files_do_not_matter(sample_export, store, copy):
    (copy / "blocks" / "notes.txt").write_text("mine")
    (files(copy)[0].parent / "0-0-0-0").write_text("x")
    (files(copy)[0].parent / f"{files(copy)[0].name}.tmp").write_text("half")
    (copy / "blocks" / "lock").write_text("nonsense")
    runtime, said = opened(sample_export, copy)
    with runtime:
        assert restored(runtime, TEXT)[0] == 199
    assert not said
    assert not list(copy.rglob("*.tmp"))


# Writing


def fill(folder, tokens, root=ROOT):
    """Keep rows that say which tokens they are of; how many bytes were written."""
    return folder.add(list(chain(root, tokens)), TOKEN_BYTES, rows_of)


def rows_of(block):
    return memoryview(b"".join(token.to_bytes(TOKEN_BYTES, "little") for token in block.tokens))


def held(folder, tokens, root=ROOT):
    """How many of ``tokens`` are there, each with its row."""
    count, parent = 0, root
    for block in chain(root, tokens):
        found = folder.read(parent, block.start, block.tokens, TOKEN_BYTES)
        if found is None:
            return count
        assert found[1] == rows_of(found[0])
        count = block.start + shared_prefix(found[0].tokens, block.tokens)
        if count < block.end:
            return count
        parent = block.address
    return count


def texts(count, length=130):
    return [[1000 * index + position for position in range(length)] for index in range(count)]


def test_the_limit_evicts_what_was_unused_for_longest(tmp_path):
    said = []
    size = fill(BlockFolder(tmp_path / "probe", 1 << 20, print), texts(1)[0])
    folder = BlockFolder(tmp_path / "blocks", 3 * size, said.append)
    conversations = texts(4)
    for index, tokens in enumerate(conversations[:3]):
        fill(folder, tokens)
        for path in (tmp_path / "blocks").rglob("*-*"):
            if f"-{TOKEN_BYTES}" not in path.name and path.stat().st_mtime > 10_000:
                os.utime(path, (index, index))
    assert held(folder, conversations[0]) == 130
    folder.touch(list(chain(ROOT, conversations[0]))[-1])
    fill(folder, conversations[3])
    there = [held(folder, tokens) for tokens in conversations]
    assert there == [130, 0, 130, 130]
    assert folder.nbytes == 3 * size
    fill(folder, [*conversations[3], *range(9)])  # a little more: the end of the oldest goes
    assert [held(folder, tokens) for tokens in conversations] == [130, 0, 64, 130]
    assert not said


def test_a_limit_below_one_conversation_keeps_its_beginning(tmp_path):
    said, tokens = [], texts(1, 640)[0]
    folder = BlockFolder(tmp_path / "blocks", 6000, said.append)
    for end in (200, 400, 640):
        fill(folder, tokens[:end])
    assert held(folder, tokens) == 192
    room = "5.9 KiB have room for 192 tokens of this text; --session-limit sets it"
    assert said == [f"{tmp_path / 'blocks'}: {room}"]
    assert folder.nbytes <= 6000
    assert sum(path.stat().st_size for path in (tmp_path / "blocks").rglob("*-*")) <= 6000


@pytest.mark.usefixtures("processes")
def test_a_lower_limit_is_kept_at_once(copy):
    before = len(files(copy))
    limit = sum(path.stat().st_size for path in files(copy)) - 1
    assert BlockFolder(copy / "blocks", limit, print).nbytes <= limit
    assert len(files(copy)) == before - 1 and files(copy)[0].name.split("-")[1] == "00000000"


@pytest.mark.parametrize("call", ["open", "fsync", "rename", "pwrite"])
@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_what_cannot_be_written_is_said_once_and_tried_again(tmp_path, monkeypatch, call, problem):
    said, tokens = [], texts(1, 200)[0]
    folder = BlockFolder(tmp_path / "blocks", 1 << 20, said.append)
    fill(folder, tokens[:128])
    original = getattr(os, call)

    def fail(path, *arguments, **options):
        writes = call != "open" or (arguments and arguments[0] & os.O_CREAT)
        if writes:
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


def test_two_processes_keep_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks_module, "_LOCK_SECONDS", 30)
    said, conversations = [], texts(8, 300)
    folders = [BlockFolder(tmp_path / "blocks", 60_000, said.append) for _ in range(4)]

    def work(index):
        for _ in range(3):
            for tokens in conversations[index % 4 :: 2]:
                fill(folders[index], tokens)
                held(folders[index], tokens)

    threads = [threading.Thread(target=work, args=[index]) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not said
    size = sum(path.stat().st_size for path in (tmp_path / "blocks").rglob("*-*"))
    assert size == folders[0].nbytes <= 60_000
    assert sum(held(folders[0], tokens) for tokens in conversations) > 0


def test_a_lock_that_is_never_released_costs_a_save_and_no_more(tmp_path, monkeypatch):
    said, tokens = [], texts(1)[0]
    folder = BlockFolder(tmp_path / "blocks", 1 << 20, said.append)
    monkeypatch.setattr(blocks_module, "_LOCK_SECONDS", 0.02)
    with folder._locked():
        fill(BlockFolder(tmp_path / "blocks", 1 << 20, said.append), tokens)
    assert len(said) == 1 and "another process" in said[0]


KILLED = """
import os, sys
from pathlib import Path
from slotmoe.offload.sessions.blocks import BlockFolder
from tests.offload.test_sessions import fill, held, texts
folder, (tokens, other) = Path(sys.argv[1]), texts(2, 200)
for moment in range(1, 1000):
    place = folder / str(moment)
    fill(BlockFolder(place, 9000, print), tokens[:70])
    child = os.fork()
    if child == 0:
        calls = 0
        def count(name, original):
            def call(*arguments, **options):
                global calls
                calls += 1
                if calls == moment:
                    if name == "write":
                        original(arguments[0], arguments[1][:9])
                    os._exit(9)
                return original(*arguments, **options)
            return call
        for name in ("open", "fsync", "rename", "pwrite", "unlink"):
            setattr(os, name, count(name, getattr(os, name)))
        opened = BlockFolder(place, 9000, print)
        fill(opened, tokens)
        fill(opened, other)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    reopened = BlockFolder(place, 9000, print)
    assert held(reopened, tokens) >= 0
    assert not list(place.rglob("*.tmp")), moment
    size = sum(path.stat().st_size for path in place.rglob("*-*"))
    assert size == reopened.nbytes <= 9000, moment
    fill(reopened, tokens)
    assert held(reopened, tokens) == 200, moment
    if status == 0:
        break
print(moment)
"""


@pytest.mark.usefixtures("processes")
def test_killed_at_any_moment_of_a_save():
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        command = [sys.executable, "-W", "error", "-c", KILLED, folder]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


# Names


def saved(tokens=(), text="Call me", **others):
    messages = [{"role": "text", "content": text}]
    return Saved(ROOT, list(tokens), "text", messages, **others)


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
    with NamedSession(folder, "later") as session:
        session.save(saved())
    os.utime(session.path, (1, 1))
    assert [listed.name for listed in listing(folder)] == ["plans", "later"]


@pytest.mark.parametrize("name", ["", "..", "a/b", ".x", "x" * 65, "ä", "a\n", "-x"])
def test_names_are_no_paths(tmp_path, name):
    with pytest.raises(ConfigError, match="is no name of a session"):
        NamedSession(tmp_path, name)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"Call", b"Cbll"),
        (b'"version": 1', b'"version": 2'),
        (b'"tokens": "AQ', b'"tokens": "BQ'),
        (b'"tokens": "AQ', b'"tokens": "!'),
        (b"{", b"["),
        (b'"text"', b'"x"'),
    ],
)
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
    assert folder.nbytes == 0 and not list((tmp_path / "blocks").rglob("*-*"))


def test_blocks_of_a_chain_have_addresses_of_all_that_comes_before():
    one, two = list(chain(ROOT, TEXT))[1], list(chain(b"x" * 16, TEXT))[1]
    assert one.tokens == two.tokens and one.address != two.address
    assert Block(ROOT, 0, [1]).address != Block(ROOT, 0, [2]).address
