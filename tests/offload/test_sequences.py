"""What a text leaves behind serves the next one, where attention compresses or has an indexer: in
memory, among several sequences, and on disk."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from slotmoe.offload.engine.batch import UnwantedError
from slotmoe.offload.engine.passes import Row
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.shapes import MARK_TOKENS, MOST_MARKS
from tests.support.engine import decode
from tests.support.v4 import export_of, state_bytes

NAMES = ("v4", "v3.2")
pytestmark = pytest.mark.usefixtures("heavy")


def words(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 4000, (count,), generator=generator).tolist()


@pytest.fixture(scope="module", params=NAMES)
def export(request, tmp_path_factory):
    return export_of(tmp_path_factory.mktemp("tiny"), request.param)


@pytest.fixture(scope="module")
def runtime(export):
    with Runtime.open(export, context=4096) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def fresh(export):
    """Another that keeps nothing: what a text gives that is computed anew."""
    with Runtime.open(export, context=4096) as other:

        def logits(ids):
            other.engine.empty()
            return decode(other, ids, [])

        yield logits


def counted(runtime, call):
    """What it gives, and how many tokens of prompts were not read for it."""
    totals = runtime.engine.batch.totals
    before = totals.reused_tokens
    return call(), totals.reused_tokens - before


def answer_to(runtime, prompt, count=12):
    """Tokens that follow, and how many of the prompt were reused."""
    return counted(runtime, lambda: [token.id for token in runtime.generate(prompt, count)])


# Turns


@pytest.mark.parametrize("keeps_answers", [True, False])
def test_ten_turns_read_nothing_twice(runtime, fresh, keeps_answers):
    """Also where the history leaves answers out, as it does reasoning; the last token of a prompt
    then becomes another."""
    runtime.engine.empty()
    prompt, held, reused = [], 0, []
    for turn in range(10):
        prompt = [*prompt, *words(turn, 190 + 7 * turn)]
        ids, count = answer_to(runtime, prompt)
        reused.append(count)
        assert count == held
        if keeps_answers:
            prompt, held = [*prompt, *ids], len(prompt) + len(ids) - 1
        else:
            prompt, held = [*prompt[:-1], 7], len(prompt) - 1
    logits, count = counted(runtime, lambda: decode(runtime, [*prompt, 9], []))
    assert count == held
    assert torch.equal(logits, fresh([*prompt, 9]))
    state = runtime.engine.batch.sequences[0].state
    assert len(state.marks) <= MOST_MARKS + 2 and state.used_bytes <= state_bytes(state)


def test_a_prompt_that_differs_reuses_the_last_mark_before(runtime, fresh):
    runtime.engine.empty()
    prompt = words(2, 700)
    answer_to(runtime, prompt)
    for same in (600, 400, 255):
        other = [*prompt[:same], 3, *words(same, 40)]
        logits, count = counted(runtime, lambda ids=other: decode(runtime, ids, []))
        compresses = bool(runtime.engine.batch.sequences[0].state.snapshot_bytes(same))
        assert count == (same // MARK_TOKENS * MARK_TOKENS if compresses else same)
        assert torch.equal(logits, fresh(other))


# Several sequences


# Passes that are given up


def test_rejected_drafts_leave_no_trace(runtime, fresh):
    for length in (127, 128, 131, 255, 256, 300):
        runtime.engine.empty()
        ids = words(length, length)
        decode(runtime, ids, [])
        batch, drafts = runtime.engine.batch, words(9, 16)

        def draft(batch=batch, drafts=drafts):
            for _ in range(2):
                batch.passes._run([Row(batch.sequences[0], [5], draft=drafts)])

        runtime.engine.call(draft)
        logits = decode(runtime, [*ids, 5, 5, 6], [])
        assert batch.sequences[0].length == length + 3
        assert torch.equal(logits, fresh([*ids, 5, 5, 6]))


@pytest.mark.parametrize("problem", [UnwantedError, OSError])
def test_a_pass_that_ends_in_the_middle_leaves_texts_right(runtime, fresh, monkeypatch, problem):
    """A long prefill and a pass of one token, in the third layer."""
    network, experts = runtime.model.network, runtime.model.experts
    calls = []

    class Failing:
        def __call__(self, layer, *inputs):
            calls.append(layer)
            if layer == 2 and calls.count(2) == 1:
                raise problem(errno.EIO, "the disk is gone")
            return experts(layer, *inputs)

        def __getattr__(self, name):
            return getattr(experts, name)

    runtime.engine.empty()
    ids = words(5, 400)
    decode(runtime, ids, [])
    for more in ([*ids, *words(6, 1000)], [*ids, *words(6, 1000), 3]):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(network, "experts", Failing())
            patch.setattr(network, "_decoder", None)
            if problem is OSError:
                with pytest.raises(Exception, match="the disk is gone"):
                    decode(runtime, more, [])
            logits = decode(runtime, more, [])
        assert 2 in calls
        assert torch.equal(logits, fresh(more))


# On disk


def files(folder, snapshots=False):
    paths = (folder / "blocks").rglob("*-*")
    return sorted(path for path in paths if path.name.endswith("-state") == snapshots)


@pytest.mark.parametrize("keeps_answers", [True, False])
def test_another_process_reads_nothing_twice(export, fresh, tmp_path, keeps_answers):
    prompt, held, said = [], 0, []
    for turn in range(4):
        prompt = [*prompt, *words(turn, 170 + turn)]
        with Runtime.open(export, context=2048 - turn) as runtime:
            runtime.keep_in(tmp_path, notify=said.append)
            ids, count = answer_to(runtime, prompt)
            assert count == held
            assert torch.equal(decode(runtime, [*prompt, 4], []), fresh([*prompt, 4]))
        if keeps_answers:
            prompt, held = [*prompt, *ids], len(prompt) + len(ids) - 1
        else:
            prompt, held = [*prompt[:-1], 7], len(prompt) - 1
    assert not said


@pytest.fixture(scope="module")
def kept(export, tmp_path_factory):
    """A folder with a text of 600 tokens, read in one pass, and an answer."""
    folder = tmp_path_factory.mktemp("kept") / "sessions"
    with Runtime.open(export, context=2048) as runtime:
        runtime.keep_in(folder)
        answer_to(runtime, words(8, 600))
    return folder


@pytest.fixture
def reopened(export, kept, tmp_path):
    """A runtime with such a folder of its own."""
    folder = shutil.copytree(kept, tmp_path / "sessions")
    with Runtime.open(export, context=1024) as runtime:
        said = []

        def restored(length):
            runtime.engine.empty()
            runtime.keep_in(folder, notify=said.append)
            return counted(runtime, lambda: decode(runtime, words(8, 600)[:length], []))

        yield SimpleNamespace(runtime=runtime, folder=folder, said=said, restored=restored)


def test_snapshots_of_a_long_pass_are_kept(reopened, fresh):
    """And none where no state needs any."""
    state = reopened.runtime.engine.batch.sequences[0].state
    starts = [path.name.split("-")[1:3] for path in files(reopened.folder, snapshots=True)]
    ends = sorted(int(start) + int(count) for start, count in starts)
    assert ends == ([256, 512, 599, 611] if state.snapshot_bytes(600) else [])
    for length in (600, 599, 580, 300, 257):
        logits, count = reopened.restored(length)
        ends = [256, 512, 599] if state.snapshot_bytes(600) else [length - 1]
        assert count == max(end for end in ends if end < length)
        assert torch.equal(logits, fresh(words(8, 600)[:length]))
    assert not reopened.said


def test_marks_of_another_text_do_not_come_back(reopened, fresh):
    """Its sequence takes what is on disk of a text that begins alike."""
    runtime, ids = reopened.runtime, words(8, 600)
    decode(runtime, [*ids[:200], *words(11, 400)], [])
    runtime.keep_in(reopened.folder, notify=reopened.said.append)
    decode(runtime, ids, [])
    ids = [*ids[:300], *words(12, 30)]
    assert torch.equal(decode(runtime, ids, []), fresh(ids))


def test_a_damaged_snapshot_is_dropped_and_one_before_it_serves(reopened, fresh):
    paths = [
        path for path in files(reopened.folder, snapshots=True) if "-00000576-23-" in path.name
    ]
    if not paths:
        pytest.skip("this state needs none")
    data = bytearray(paths[0].read_bytes())
    data[-100] ^= 1
    paths[0].write_bytes(data)
    logits, count = reopened.restored(600)
    assert count == 512 and torch.equal(logits, fresh(words(8, 600)))
    (line,) = reopened.said
    assert paths[0].name in line and "checksum" in line
    assert reopened.restored(600)[1] == 599  # it was kept again


def test_what_an_older_version_kept_is_passed_over(reopened, monkeypatch):
    monkeypatch.setattr("slotmoe.offload.sessions.store.FORMAT", b"slotmoe block 1\n")
    assert reopened.restored(600)[1] == 0
    assert not reopened.said


def test_snapshots_count_for_the_limit_and_go_with_their_text(reopened):
    folder = reopened.folder / "blocks"
    size = sum(path.stat().st_size for path in folder.rglob("*-*"))
    assert int((folder / "lock").read_bytes()) == size
    for path in folder.rglob("*-*"):
        os.utime(path, (1, 1))
    reopened.runtime.engine.empty()
    reopened.runtime.keep_in(reopened.folder, limit=size, notify=reopened.said.append)
    answer_to(reopened.runtime, words(9, 500))
    there = [path for path in folder.rglob("*-*") if path.stat().st_mtime > 1]
    assert sum(path.stat().st_size for path in folder.rglob("*-*")) <= size
    assert there and not reopened.said
    assert counted(reopened.runtime, lambda: decode(reopened.runtime, words(9, 500), []))[1] == 499
