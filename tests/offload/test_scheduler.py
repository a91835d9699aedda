"""Several answers at once: the same tokens as alone, places that come free, latents reused and
never across owners; any number of threads."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from slotmoe.errors import CLOSED, ConfigError, ExportError
from slotmoe.model.generate import Answer, Penalties, Stops
from slotmoe.model.sampling import Sampling
from slotmoe.offload.engine import engine as engines
from slotmoe.offload.engine import loading
from slotmoe.offload.engine.requests import Request
from slotmoe.offload.runtime import Runtime
from tests.support.engine import until

PROMPTS = ["My fellow citizens,", "It is a truth universally acknowledged, that a", "def main("]
PROMPTS += ["Call me", "To be or not to be", "Once upon a time", "import os", "The constitution of"]


class Caller:
    """Submits one prompt and collects its answer."""

    def __init__(self, runtime, ids, limit=24, owner="", at=None, **options):
        self.ids, self.text, self.last, self.ended = ids, "", None, threading.Event()
        sampling = Sampling(**options.pop("sampling", {}))
        fixed = runtime.tokenizer, runtime.eos_token_ids, sampling, limit
        self.answer = Answer(ids, *fixed, **options)
        self.at, self.job = at or (lambda caller: None), Request(ids, self.answer, self.emit, owner)
        runtime.engine.submit(self.job)

    def emit(self, piece):
        self.text += piece.text
        self.last = piece
        self.at(self)
        if piece.finish is not None:
            self.ended.set()

    def wait(self):
        assert self.ended.wait(30)
        return self


@pytest.fixture(scope="module")
def runtime(sample_export):
    with Runtime.open(sample_export, ram="2GiB", context=256, sequences=8) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def narrow(sample_export, heavy):
    """Half of the experts fit, and a long pass goes through each layer in steps of 16 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "PREFILL_CHUNK", 16)
        with Runtime.open(sample_export, context=256, sequences=8, slots=112) as runtime:
            yield runtime


@pytest.fixture
def in_steps(narrow):
    narrow.engine.empty()
    return narrow


# Threads


def test_threads_get_each_the_text_alone(narrow):
    """Texts and logits mix; each is what it is alone."""
    runtime = narrow
    prompts = [[*range(5 + n, 40 + 3 * n)] for n in range(8)]
    logits = runtime.logits(prompts[0])
    alone = [[token.id for token in runtime.generate(ids, 10)] for ids in prompts]

    def ask(number):
        if number % 4 == 3:
            return torch.equal(runtime.logits(prompts[0]), logits)
        ids = prompts[number % 8]
        made = [token.id for token in runtime.generate(ids, 10)]
        return runtime.stats()["kernels"] == "torch" or made == alone[number % 8]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(24)))


def test_a_text_goes_on_where_another_took_its_sequence(sample_export):
    """One sequence for two texts in turn, and for logits that come piece by piece."""
    ids = [5 + n for n in range(100)]
    with Runtime.open(sample_export, context=256) as runtime:
        whole = torch.cat([*runtime.logits_from(ids)])
        runtime.plan.__dict__["prefill_chunk"] = 20
        pieces = runtime.logits_from(ids)
        rows = [next(pieces)]
        first, second = runtime.generate([9, 8, 7], 30), runtime.generate([7, 8, 9], 30)
        texts = [[token.id for token in text] for text in (second, first)]
        rows += [*pieces]
        assert torch.equal(torch.cat(rows), whole)
        last_V = runtime.next_logits(ids)
        assert torch.equal(last_V, whole[-1]) or runtime.stats()["kernels"] == "torch"
        for ids, text in zip(([7, 8, 9], [9, 8, 7]), texts, strict=True):
            assert [token.id for token in runtime.generate(ids, 30)] == text


def test_several_texts_by_one_call_and_in_an_event_loop(runtime, processes):
    wanted = [[*runtime.generate(text, 6)] for text in PROMPTS[:3]]
    texts = runtime.generate_all(PROMPTS[:3], max_new_tokens=6)
    assert [[*text] for text in texts] == wanted

    async def collect(text):
        return [token async for token in runtime.stream(text, max_new_tokens=6)]

    async def together():
        return await asyncio.gather(*map(collect, PROMPTS[:3]))

    assert asyncio.run(together()) == wanted


def test_who_closes_forgets_or_leaves_a_text_cancels_it(runtime):
    before = runtime.engine.batch.totals.finished.get("cancelled", 0)

    def idle():
        until(lambda: runtime.engine.batch.running == {})
        return runtime.engine.batch.totals.finished.get("cancelled", 0) - before

    stream = runtime.generate([5, 6], None)
    assert stream.wait()
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


def test_prefix_is_reused_by_the_same_owner_only(runtime):
    runtime.engine.empty()
    text = "The people of the United States have a government of laws and not of men, and"
    ids = runtime.tokenizer.encode(text)
    first, other, again = (Caller(runtime, ids, owner=owner).wait() for owner in "aba")
    longer = Caller(runtime, [*ids, *first.answer.ids[:-1], 5], owner="a").wait()
    reused = [caller.job.reused for caller in (first, other, again, longer)]
    assert reused == [0, 0, len(ids) - 1, len(ids) + 23]
    if runtime.stats()["kernels"] != "torch":
        assert first.answer.ids == other.answer.ids == again.answer.ids


def test_an_answer_ends_where_the_context_does_or_nobody_wants_it(runtime):
    caller = Caller(runtime, [5] * 250, 100).wait()
    assert (caller.last.finish, len(caller.answer.ids)) == ("length", 7)

    def leave(caller):
        if len(caller.answer.ids) == 3:
            caller.job.cancel()

    caller = Caller(runtime, [5, 6, 7], 200, at=leave).wait()
    assert (caller.last.finish, len(caller.answer.ids)) == ("cancelled", 3)
    assert runtime.engine.batch.running == {}


def test_closing_ends_answers_with_a_reason(sample_export):
    runtime = Runtime.open(sample_export, context=256)
    engine = runtime.engine
    running = Caller(runtime, [5, 6, 7], 200, at=lambda caller: engine.stop())
    waiting = Caller(runtime, [5, 6, 7], 200)
    assert {running.wait().last.finish, waiting.wait().last.finish} == {"shutdown"}
    runtime.close()
    with pytest.raises(ConfigError, match=CLOSED):
        Caller(runtime, [5])


def test_memory_goes_back_once_nobody_asks(sample_export, monkeypatch):
    """Once after the last answer, and not on and on."""
    given = threading.Semaphore(0)
    monkeypatch.setattr(engines, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(engines, "give_back_memory", given.release)
    with Runtime.open(sample_export, context=256) as runtime:
        assert given.acquire(timeout=30)
        Caller(runtime, [5, 6], limit=1).wait()
        assert given.acquire(timeout=30)
    assert not given.acquire(blocking=False)


@pytest.mark.parametrize(
    ("raised", "goes_on"),
    [
        (ExportError("experts/layer-00001: is damaged"), True),
        (MemoryError("no memory"), True),
        (OSError(5, "Input/output error"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (ZeroDivisionError("a defect"), False),
    ],
)
def test_what_fails_in_a_pass_ends_its_requests_and_a_defect_all(
    sample_export, monkeypatch, raised, goes_on
):
    ended = threading.Event()
    with Runtime.open(sample_export, context=256, sequences=2) as runtime:
        want = [token.id for token in runtime.generate([5, 6, 7], 8)]
        engine = runtime.engine
        engine.ended = ended.set

        def fail(route):
            stop()
            raise raised

        stop = runtime.model.experts.on_layer(fail)
        caller = Caller(runtime, [5, 9, 7])
        assert caller.wait().last.finish == "error" and caller.job.problem is raised
        if goes_on:
            assert str(raised) in caller.last.error
            assert [token.id for token in runtime.generate([5, 6, 7], 8)] == want
            stop = runtime.model.experts.on_layer(fail)
            with pytest.raises(type(raised)):
                list(runtime.generate([8, 6, 7], 8))
            assert [token.id for token in runtime.generate([5, 6, 7], 8)] == want
        else:
            assert ended.wait(30) and engine.problem is raised
            with pytest.raises(ConfigError, match=r"failed \(ZeroDivisionError\('a defect'\)\)"):
                runtime.generate([5])


def test_stop_strings_are_cut_out_and_count_outside_of_tool_calls(runtime):
    def stopped(text, *strings, calls="<call>"):
        """What is shown, the finish, and what has stopped it."""
        ids, pieces = runtime.tokenizer.encode(text, add_bos=False), []
        stops = Stops(strings, calls)
        answer = Answer([0], runtime.tokenizer, (1,), Sampling(), len(ids), stops=stops)
        for id in ids:
            logits_V = torch.zeros(4096)
            logits_V[id] = 9.0
            pieces.append(answer.take(logits_V))
            if pieces[-1].finish is not None:
                break
        return "".join(piece.text for piece in pieces), pieces[-1].finish, pieces[-1].stopped_by

    text = "One two. Three four. Five"  # a stop string over several tokens
    assert stopped(text, " Three four", "never") == ("One two.", "stop", " Three four")
    assert stopped(text, "Five!") == (text, "length", None)
    assert stopped("a b <call>b c", "b c", calls="") == ("a b <call>", "stop", "b c")
    assert stopped("a b <call>b c", "b") == ("a ", "stop", "b")
    for stop in ("b c", "<", "<call>", "call", " <c"):  # in the call, and in what begins the calls
        assert stopped("a b <call>b c", stop) == ("a b <call>b c", "length", None), stop
    for text in ("a b <calm>", "a b <cal"):  # that was no call, nor could it become one
        assert stopped(text, "<") == ("a b ", "stop", "<")


def test_penalties_and_bias_change_the_choice():
    logits = torch.tensor([2.0, 1.9, -1.0, 1.0])
    assert Penalties(Sampling(), [0])(logits) is logits
    both = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    for sampling, prompt, answer, wanted in (
        (both, [1], [0, 0], [1.0, 1.9, -1.0, 1.0]),
        (Sampling(repetition_penalty=2.0), [0, 9], [2, 2], [1.0, 1.9, -2.0, 1.0]),
        (Sampling(logit_bias=((3, 5.0),)), [1], [3], [2.0, 1.9, -1.0, 6.0]),
    ):
        penalties = Penalties(sampling, prompt)
        penalties(logits)
        for token_id in answer:
            penalties.add(token_id)
        assert penalties(logits).tolist() == pytest.approx(wanted)
    assert logits.tolist() == pytest.approx([2.0, 1.9, -1.0, 1.0])


@pytest.mark.parametrize("end", ["cancelled", "closed"])
def test_a_long_pass_ends_when_nobody_waits_for_it(in_steps, end, sample_export):
    """And leaves everything as it was."""
    gates, ids, runtime = [], [5 + n for n in range(200)], in_steps
    if end == "closed":
        runtime = Runtime.open(sample_export, context=256, slots=112)

    def third(route):
        gates.append(route)
        if len(gates) == 3 and end == "cancelled":
            caller.job.cancel()
        elif len(gates) == 3:
            runtime.engine.stop()

    stop = runtime.engine.call(lambda: runtime.model.experts.on_layer(third))
    sequence = runtime.engine.batch.sequences[0]
    caller = Caller(runtime, ids, owner=end)
    assert (caller.wait().last.finish, len(gates)) in (("cancelled", 3), ("shutdown", 3))
    assert sequence.length == 0
    if end == "closed":
        return runtime.close()
    runtime.engine.call(stop)
    assert runtime.logits(ids).isfinite().all()
