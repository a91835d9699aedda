"""What a text leaves behind serves the next one, where attention compresses or has an indexer: in
memory, among several sequences, and on disk."""

import os
import random
from types import SimpleNamespace

import pytest
import torch

from slotmoe.network.shapes import MARKS
from slotmoe.offload.runtime import Runtime
from tests.support.engine import decode, failing, words
from tests.support.hostile import flip
from tests.support.params import nth
from tests.support.v4 import export_of, state_bytes

NAMES = ("v4", "v3.2", "windows", "delta", "kimi")
pytestmark = pytest.mark.usefixtures("heavy")


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


def answer_to(runtime, prompt):
    """Tokens that follow, and how many of the prompt were reused."""
    return counted(runtime, lambda: [token.id for token in runtime.generate(prompt, 12)])


@pytest.mark.parametrize("keeps_answers", [True, False])
def test_ten_turns_read_nothing_twice(runtime, fresh, keeps_answers):
    """Also where the history leaves answers out, as it does reasoning; the last token of a prompt
    then becomes another."""
    runtime.engine.empty()
    prompt, held = [], 0
    for turn in range(10):
        prompt = [*prompt, *words(turn, 190 + 7 * turn)]
        ids, count = answer_to(runtime, prompt)
        assert count == held
        if keeps_answers:
            prompt, held = [*prompt, *ids], len(prompt) + len(ids) - 1
        else:
            prompt, held = [*prompt[:-1], 7], len(prompt) - 1
    logits, count = counted(runtime, lambda: decode(runtime, [*prompt, 9], []))
    assert count == held
    assert torch.equal(logits, fresh([*prompt, 9]))
    state = runtime.engine.batch.sequences[0].state
    assert len(state.marks) <= MARKS.most + 2 and state.used_bytes <= state_bytes(state)


def test_a_pass_that_ends_in_the_middle_leaves_texts_right(runtime, fresh):
    """A long prefill and a pass of one token, in a layer behind the first."""

    layers = set()

    def fail():
        if len(layers) > 1:
            raise MemoryError

    def stopped(text):
        layers.clear()
        stop = runtime.model.experts.on_layer(lambda route: layers.add(route.moe_layer))
        with failing(runtime, fail), pytest.raises(MemoryError):
            decode(runtime, text, [])
        stop()

    runtime.engine.empty()
    ids, other = words(5, 400), words(6, 1000)
    decode(runtime, ids, [])
    for more in ([*ids, *other], [*ids, *other, 3]):
        stopped(more)
        assert torch.equal(decode(runtime, more, []), fresh(more))
    # A state that a pass has begun to write is no place to go on from.
    for begun, text, most in ((ids[:9], other, 0), (ids, [*ids, 9], len(ids))):
        decode(runtime, begun, [5])
        stopped([*begun, 5, *other[:30]])
        logits, count = counted(runtime, lambda: decode(runtime, text, []))  # noqa: B023
        assert 0 <= count <= most and torch.equal(logits, fresh(text))
    decode(runtime, more, [])
    # From a mark that a long pass has made or a decoder, or anywhere if none is needed; with a
    # delta rule they are rarer, and where a text has ended.
    for text, *marks in (more[:1300], 1280, 1023), (more[:800], 768, 400):
        assert counted(runtime, lambda: decode(runtime, text, []))[1] in (*marks, len(text) - 1)  # noqa: B023
    decode(runtime, ids[:250], ids[250:])
    assert counted(runtime, lambda: decode(runtime, ids[:260], []))[1] in (256, 259, 249)


@pytest.mark.parametrize("seed", nth(2, range(3)))
def test_texts_in_any_order(export, fresh, tmp_path, seed):
    """Beginnings of earlier ones, in two sequences and from the disk."""
    chance, texts, said = random.Random(seed), [[]], []
    with Runtime.open(export, context=2048, sequences=2) as runtime:
        for number in range(10):
            if number % 4 == 0:  # as another process
                runtime.engine.empty()
                runtime.keep_in(tmp_path, notify=said.append)
            other = chance.choice(texts)
            text = [*other[: chance.randrange(len(other) + 1)]]
            text += words(seed << 8 | number, chance.choice([1, 40, 300]))
            texts.append([*text, *answer_to(runtime, text)[0]])
            assert torch.equal(decode(runtime, text, []), fresh(text))
        assert not said and runtime.engine.batch.totals.reused_tokens > 500


@pytest.fixture
def kept(export, tmp_path):
    """A runtime, and a folder with a text of 600 tokens, read in one pass, and an answer."""
    folder, said = tmp_path / "sessions", []
    with Runtime.open(export, context=2048) as runtime:
        runtime.keep_in(folder, notify=said.append)
        answer_to(runtime, words(8, 600))

        def restored(length):
            runtime.engine.empty()
            runtime.keep_in(folder, notify=said.append)
            return counted(runtime, lambda: decode(runtime, words(8, 600)[:length], []))

        yield SimpleNamespace(runtime=runtime, folder=folder, said=said, restored=restored)


def test_a_damaged_snapshot_is_dropped_and_one_before_it_serves(kept, fresh):
    paths = [path for path in kept.folder.rglob("*-state") if "-00000576-23-" in path.name]
    if not paths:
        pytest.skip("this state needs none")
    flip(paths[0], -100)
    logits, count = kept.restored(600)
    before = kept.runtime.model.plan.marks.between(0, 598)
    assert count == max(before, default=0) and torch.equal(logits, fresh(words(8, 600)))
    (line,) = kept.said
    assert paths[0].name in line and "checksum" in line
    assert kept.restored(600)[1] == 599  # it was kept again


def test_snapshots_count_for_the_limit_and_go_with_their_text(kept, fresh):
    folder = kept.folder / "blocks"
    for length in (600, 580, 257):
        assert torch.equal(kept.restored(length)[0], fresh(words(8, 600)[:length]))
    size = sum(path.stat().st_size for path in folder.rglob("*-*"))
    assert int((folder / "lock").read_bytes()) == size
    for path in folder.rglob("*-*"):
        os.utime(path, (1, 1))
    kept.runtime.engine.empty()
    kept.runtime.keep_in(kept.folder, limit=size, notify=kept.said.append)
    answer_to(kept.runtime, words(9, 500))
    there = [path for path in folder.rglob("*-*") if path.stat().st_mtime > 1]
    assert sum(path.stat().st_size for path in folder.rglob("*-*")) <= size
    assert there and not kept.said


def test_unknown_tokens_have_rows_of_every_layer(runtime):
    state = runtime.engine.batch.sequences[0].state
    for kept in state._kept:
        kept.rows.zero_()
    runtime.engine.empty(300)
    for kept in state._kept:
        assert all(rows.any() for rows in kept.between(0, 300))
