"""Several texts at once: each is as it would be alone, whatever becomes of the others; experts are
read once for all, and no short prompt waits for a long one."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from queue import Empty
from unittest.mock import Mock

import pytest
import torch

from slotmoe.errors import ConfigError
from slotmoe.model.generate import Answer
from slotmoe.offload.engine import loading
from slotmoe.offload.engine.passes import Sequence
from slotmoe.offload.engine.requests import _WAIT_SECONDS, Forced, Request, wait_for
from slotmoe.offload.runtime import Runtime
from tests.support.engine import at_once, decode, failing, passes_of, together, until, whole, words

MORE = [7, 8, 300]  # what is decoded behind each prompt


def lengths(*counts):
    return [words(seed, count) for seed, count in enumerate(counts, 1)]


LOADS = [lengths(200, 45), lengths(130, 64, 17, 1, 270)]


@pytest.fixture(scope="module")
def runtime(sample_export, heavy):
    """Half of the experts fit, and a pass goes through each layer in steps of 16 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "PREFILL_CHUNK", 16)
        with Runtime.open(sample_export, context=1024, sequences=6, slots=112) as runtime:
            runtime.plan.__dict__["prefill_chunk"] = 128
            yield runtime


def test_a_text_takes_an_empty_sequence_before_another_text(runtime):
    engine, first = runtime.engine, words(7, 40)
    engine.empty()
    decode(runtime, first, [])
    engine.call(engine.batch._free.reverse)
    decode(runtime, words(8, 40), [])
    reused = engine.batch.totals.reused_tokens
    decode(runtime, first, [])
    assert engine.batch.totals.reused_tokens - reused == len(first) - 1


def test_who_waits_waits_as_long_as_asked():
    queue = Mock(**{"get.side_effect": Empty})
    with pytest.raises(Empty):
        wait_for(queue, lambda: True, 2.5 * _WAIT_SECONDS)
    assert sum(call.kwargs["timeout"] for call in queue.mock_calls) == 2.5 * _WAIT_SECONDS


@pytest.mark.parametrize("prompts", LOADS, ids=["two", "five"])
def test_prompts_together_are_each_as_alone(runtime, prompts, monkeypatch):
    alone = []
    for prompt in prompts:
        runtime.engine.empty()
        alone.append(decode(runtime, prompt, MORE))
    runtime.engine.empty()
    passes, wanted = passes_of(runtime, monkeypatch)
    found = together(runtime, prompts, MORE)
    assert max(map(len, passes)) > 1 and -sum(sum(rows) for rows in passes) > 0
    assert any(min(rows) < 0 < max(rows) for rows in passes) or len(prompts) < 5
    assert sum(wanted) == len(prompts)
    if runtime.stats()["kernels"] != "torch":
        assert all(map(torch.equal, found, alone))
    whole(runtime)


def test_a_prompt_waits_for_what_another_is_going_to_hold(runtime, monkeypatch):
    """Three answers to one prompt, and one that goes on from its first tokens: nothing is read
    twice."""
    monkeypatch.setitem(runtime.plan.__dict__, "prefill_chunk", 512)
    (prompt,), totals = lengths(400), runtime.engine.batch.totals
    other = [*prompt[:300], *words(9, 30)]
    runtime.engine.empty()
    before = totals.prompt_tokens
    logits = together(runtime, [prompt, prompt, prompt, other])
    assert totals.prompt_tokens - before == 400 + 2 + 30
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("finishes", [["error"] * 3, ["length", "cancelled", "length"]], ids=str)
def test_who_is_concerned_ends_and_the_others_go_on(runtime, finishes):
    """Of three requests, when memory is short at the third gate or one is cancelled."""
    prompts, engine, gates = lengths(60, 40, 30), runtime.engine, []
    engine.empty()
    wanted = [decode(runtime, prompt, MORE) for prompt in prompts]
    engine.empty()
    texts = [Forced(MORE, keeps=True) for _ in prompts]
    requests = [*map(Request, prompts, texts)]

    def third():
        gates.append(None)
        if len(gates) == 3 and "error" in finishes:
            raise MemoryError
        if len(gates) == 3:
            requests[1].cancel()

    with failing(runtime, third):
        assert [end.finish for end in at_once(runtime, *requests)] == finishes
    whole(runtime)
    if runtime.stats()["kernels"] != "torch":
        for finish, text, logits in zip(finishes, texts, wanted, strict=True):
            assert finish != "length" or torch.equal(torch.stack(text.logits), logits)
        assert all(map(torch.equal, together(runtime, prompts, MORE), wanted))


def test_experts_are_read_once_for_all_prompts(sample_export, heavy, monkeypatch):
    prompts, read = lengths(100, 100, 100, 100), []

    monkeypatch.setattr(loading, "PREFILL_CHUNK", 512)
    with Runtime.open(sample_export, context=512, sequences=4, slots=24) as runtime:
        for ask in (together, lambda *given: [decode(given[0], ids, []) for ids in given[1]]):
            runtime.engine.empty()
            ask(runtime, prompts)
            read.append(runtime.stats()["io"]["disk"]["bytes"])
    assert 2.5 * read[0] < read[1] - read[0]


@pytest.mark.parametrize("gate", [3, 48])
def test_a_short_prompt_overtakes_a_long_one(runtime, gate, monkeypatch):
    """It comes at a gate of the first pass, which ends if it has just begun."""
    engine, gates, order, (passes, _) = runtime.engine, [], [], passes_of(runtime, monkeypatch)

    def ask(count):
        request = Request(words(count, count), Forced(()), owner=str(count))
        request.emit = lambda delta: order.append(count) if delta.finish else None
        engine.submit(request)

    def arrive(route):
        gates.append(route)
        if len(gates) == gate:
            ask(40)

    engine.empty()
    stop = engine.call(lambda: runtime.model.experts.on_layer(arrive))
    ask(400)
    until(lambda: len(order) == 2)
    engine.call(stop)
    assert order == [40, 400]
    assert (sum(map(sum, passes)) < -440) == (gate == 3)


def test_threads_get_each_the_text_alone(runtime):
    """Texts and logits mix; each is what it is alone."""
    prompts = [[*range(5 + n, 40 + 3 * n)] for n in range(8)]
    logits = runtime.logits(prompts[0])
    alone = [[token.id for token in runtime.generate(ids, 10)] for ids in prompts]

    def ask(number):
        if number % 4 == 3:
            return torch.equal(runtime.logits(prompts[0]), logits)
        made = [token.id for token in runtime.generate(prompts[number % 8], 10)]
        return runtime.stats()["kernels"] == "torch" or made == alone[number % 8]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(24)))


def test_who_closes_forgets_or_leaves_a_text_cancels_it(runtime):
    before = runtime.engine.batch.totals.finished.get("cancelled", 0)

    def idle():
        until(lambda: runtime.engine.batch.running == {})
        return runtime.engine.batch.totals.finished.get("cancelled", 0) - before

    stream = runtime.generate([5, 6], None)
    next(stream)
    stream.close()
    assert [*stream] == [] and idle() == 1
    stream = runtime.generate([5, 6], None)
    next(stream)
    del stream
    assert idle() == 2

    async def leave():
        tokens = runtime.stream([5, 6], max_new_tokens=None)
        await anext(tokens)
        await tokens.aclose()

    asyncio.run(leave())
    assert idle() == 3


PROBLEMS = [  # where something is raised, and whether the engine goes on
    ("a pass", RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
    ("a pass", ZeroDivisionError("a defect"), False),
    ("a pass", OSError(5, "a defect, of no disk"), False),
    ("a pass", ConfigError("a defect, of no refusal"), False),
    ("a sampler", OSError(5, "not the engine's"), True),
    ("who gets the answer", OSError(28, "not the engine's"), True),
    ("a save", MemoryError(), True),
    ("a prompt's end", MemoryError(), True),
]


@pytest.mark.parametrize(("where", "raised", "goes_on"), PROBLEMS, ids=str)
def test_whose_an_error_is_says_what_it_ends(
    small_export, monkeypatch, tmp_path, where, raised, goes_on
):
    def fail(*_):
        patch.undo()
        raise raised

    def begin():
        stream = runtime.generate([5, 9, 7], 8)
        stream.wake.extend([fail] * (where == "who gets the answer"))
        return stream

    with (
        Runtime.open(small_export, context=256, sequences=2) as runtime,
        monkeypatch.context() as patch,
    ):
        began, batch = time.monotonic() - 1, runtime.engine.batch
        want = [token.id for token in runtime.generate([5, 6, 7], 8)]
        runtime.keep_in(tmp_path)
        for place, (owner, name) in {
            "a pass": (batch.passes, "run"),
            "a sampler": (Answer, "take"),
            "a save": (batch.sessions, "keep"),
            "a prompt's end": (Sequence, "mark"),
        }.items():
            if place == where:
                patch.setattr(owner, name, fail)
        with nullcontext() if where == "a save" else pytest.raises(type(raised)):
            runtime.engine.call(begin).read()
        with nullcontext() if goes_on else pytest.raises(ConfigError, match="the engine failed"):
            assert [token.id for token in runtime.generate([5, 6, 7], 8)] == want
        assert 0 < batch.seconds <= time.monotonic() - began  # as the first guess says, or less
