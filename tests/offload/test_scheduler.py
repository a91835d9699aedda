"""Several answers at once: the same tokens as alone, places that come free, latents reused and
never across owners."""

import threading

import pytest
import torch

from slotmoe.errors import PlanError
from slotmoe.model.generate import Answer, Sampling, Stops, penalize
from slotmoe.offload import loading, scheduler
from slotmoe.offload.runtime import Runtime, Sequence
from slotmoe.offload.scheduler import Job, QueueFullError, Scheduler
from tests.support.engine import until

PROMPTS = ["My fellow citizens,", "It is a truth universally acknowledged, that a", "def main("]
PROMPTS += ["Call me", "To be or not to be", "Once upon a time", "import os", "The constitution of"]


class Caller:
    """Submits one prompt and collects its answer."""

    def __init__(self, batch, runtime, ids, limit=24, owner="", at=None, **options):
        self.ids, self.text, self.last, self.ended = ids, "", None, threading.Event()
        sampling = Sampling(**options.pop("sampling", {}))
        fixed = runtime.tokenizer, runtime.eos_token_ids, sampling, limit
        self.answer = Answer(ids, *fixed, **options)
        self.at, self.job = at or (lambda caller: None), Job(ids, self.answer, self.emit, owner)
        batch.submit([self.job])

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
def in_steps(narrow, monkeypatch):
    monkeypatch.setattr(scheduler, "PREFILL_CHUNK", 16)
    return narrow


@pytest.fixture
def batch(runtime):
    batch = Scheduler(runtime, 8, 4)
    yield batch
    batch.close()
    assert batch.problem is None


@pytest.mark.parametrize(("room", "limit"), [("runtime", 16), ("narrow", 6)])
def test_answers_together_are_token_for_token_those_alone(request, room, limit):
    """Prompts of one token and of more than a shared piece, so that decoding and filling
    interleave."""
    runtime = request.getfixturevalue(room)
    batch = Scheduler(runtime, 8, 4)
    long = runtime.tokenizer.encode("The people of the United States have a government. " * 16)
    prompts = [*(runtime.tokenizer.encode(text) for text in PROMPTS[:6]), long, [0]]
    together = [Caller(batch, runtime, ids, limit) for ids in prompts]
    found = [caller.wait().answer.ids for caller in together]
    batch.close()
    if runtime.stats()["kernels"] != "torch":
        assert found == [[token.id for token in runtime.generate(ids, limit)] for ids in prompts]
    totals = batch.totals
    assert limit < totals.steps < 8 * limit
    assert totals.prompt_tokens + totals.reused_tokens == sum(map(len, prompts))
    assert totals.answer_tokens == sum(map(len, found))


def test_one_step_reaches_the_same_logits(runtime):
    if runtime.stats()["kernels"] == "torch":
        pytest.skip("torch's products depend on the number of rows")
    ids = [runtime.tokenizer.encode(text) for text in PROMPTS]
    alone = []
    for index, (sequence, prompt) in enumerate(zip(runtime.sequences, ids, strict=True)):
        sequence.rewind(0)
        sequence.append(prompt)
        alone.append(sequence.append([7 + index]))
        sequence.rewind(len(prompt))
    together = runtime.append_each(runtime.sequences, [7 + index for index in range(8)])
    assert torch.equal(together, torch.cat(alone))


def test_queue_is_bounded_and_all_or_nothing(runtime, batch):
    gate = threading.Event()
    ids = runtime.tokenizer.encode("Call me")
    callers = [Caller(batch, runtime, ids, 200, at=lambda _: gate.wait(30)) for _ in range(12)]
    with pytest.raises(QueueFullError):
        Caller(batch, runtime, ids)
    for caller in callers:
        caller.job.cancelled = True
    gate.set()
    assert {caller.wait().last.finish for caller in callers} == {"cancelled"}
    assert Caller(batch, runtime, ids, 2).wait().last.finish == "length"


def test_prefix_is_reused_by_the_same_owner_only(runtime, batch):
    text = "The people of the United States have a government of laws and not of men, and"
    ids = runtime.tokenizer.encode(text)
    first, other, again = (Caller(batch, runtime, ids, owner=owner).wait() for owner in "aba")
    longer = Caller(batch, runtime, [*ids, *first.answer.ids[:-1], 5], owner="a").wait()
    reused = [caller.job.reused for caller in (first, other, again, longer)]
    assert reused == [0, 0, len(ids) - 1, len(ids) + 23]
    if runtime.stats()["kernels"] != "torch":
        assert first.answer.ids == other.answer.ids == again.answer.ids


def test_an_answer_ends_where_the_context_does_or_nobody_wants_it(runtime, batch):
    caller = Caller(batch, runtime, [5] * 250, 100).wait()
    assert (caller.last.finish, len(caller.answer.ids)) == ("length", 7)

    def leave(caller):
        caller.job.cancelled |= len(caller.answer.ids) == 3

    caller = Caller(batch, runtime, [5, 6, 7], 200, at=leave).wait()
    assert (caller.last.finish, len(caller.answer.ids), batch.running) == ("cancelled", 3, 0)


def test_closing_ends_answers_with_a_reason(runtime):
    batch = Scheduler(runtime, 8, 4)
    caller = Caller(batch, runtime, [5, 6, 7], 200, at=lambda caller: batch.stop())
    assert caller.wait().last.finish == "shutdown"
    batch.close()
    with pytest.raises(QueueFullError):
        Caller(batch, runtime, [5])


def test_memory_goes_back_once_nobody_asks(runtime, monkeypatch):
    """Once after the last answer, and not on and on."""
    given = threading.Semaphore(0)
    monkeypatch.setattr(scheduler, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(scheduler, "give_back_memory", given.release)
    batch = Scheduler(runtime, 8, 4)
    assert given.acquire(timeout=30)
    Caller(batch, runtime, [5, 6], limit=1).wait()
    assert given.acquire(timeout=30)
    batch.close()
    assert not given.acquire(blocking=False)


def test_failed_model_ends_every_answer_and_the_batch(runtime, monkeypatch):
    ended = threading.Event()
    batch = Scheduler(runtime, 8, 4, ended.set)
    monkeypatch.setattr(Sequence, "append", lambda *_: 1 / 0)
    caller = Caller(batch, runtime, [5, 6, 7])
    assert caller.wait().last.finish == "error"
    assert ended.wait(30) and isinstance(batch.problem, ZeroDivisionError)


def test_caches_of_all_sequences_are_in_the_plan(runtime, sample_export):
    nbytes = sum(cache.nbytes for cache in runtime.model.caches)
    assert runtime.plan.components["latent KV cache"] == 8 * 256 * (80 + 16) * 8 == nbytes
    with pytest.raises(PlanError, match="latent KV cache"):
        Runtime.open(sample_export, ram="350MiB", context=1024, sequences=256)


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
    assert penalize(logits, Sampling(), [0], {0: 1}) is logits
    both = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    for sampling, prompt, counts, wanted in (
        (both, [1], {0: 2}, [1.0, 1.9, -1.0, 1.0]),
        (Sampling(repetition_penalty=2.0), [0, 2], {}, [1.0, 1.9, -2.0, 1.0]),
        (Sampling(logit_bias=((3, 5.0),)), [], {}, [2.0, 1.9, -1.0, 6.0]),
    ):
        assert penalize(logits, sampling, prompt, counts).tolist() == pytest.approx(wanted)
    assert logits.tolist() == pytest.approx([2.0, 1.9, -1.0, 1.0])


def test_rows_that_others_overwrote_are_not_taken_for_the_prompt(runtime):
    prompt = [5, 9, 300, 17, 2, 40, 8, 21]
    wanted = [token.id for token in runtime.generate(prompt, 8)]
    first, second = runtime.sequences[:2]
    second.rewind(0)
    second.append([7, 7, 7, 7, 7, 7, 7])
    first.take(second, 6)
    assert [token.id for token in runtime.generate(prompt, 8)] == wanted
    first.take(first, 2)
    runtime.append_each([first, second], [77, 78])
    assert [token.id for token in runtime.generate(prompt, 8)] == wanted


@pytest.mark.parametrize("end", ["cancelled", "shutdown"])
def test_a_long_pass_ends_when_nobody_waits_for_it(in_steps, end):
    gates, ids, batch = [], [5 + n for n in range(200)], Scheduler(in_steps, 1, 4)

    def third(route):
        gates.append(route)
        if len(gates) == 3 and end == "cancelled":
            batch._filling.cancelled = True
        elif len(gates) == 3:
            batch.stop()

    in_steps.sequences[0].rewind(0)
    stop = in_steps.model.experts.on_layer(third)
    caller = Caller(batch, in_steps, ids, owner=end).wait()
    batch.close()
    stop()
    assert (caller.last.finish, len(gates), batch.problem) == (end, 3, None)
    assert in_steps.sequences[0].length == 0
    assert in_steps.logits(ids).isfinite().all()


def test_a_short_prompt_overtakes_a_long_one_which_gets_a_piece_after_each(in_steps, monkeypatch):
    """What is cached of a prompt does not count."""
    runtime = in_steps
    long, shorts = [5 + n for n in range(240)], [[7 + n, 8, 9] for n in range(3)]
    shorts[0] = [*long[:100], *shorts[0]]
    gates, order, callers, pieces = [], [], [], []

    def ask(batch, ids, limit, owner=""):
        return Caller(batch, runtime, ids, limit, owner, lambda caller: order.append(len(ids)))

    wanted = [token.id for token in runtime.generate(long, 2)]
    for sequence in runtime.sequences:
        sequence.rewind(0)
    batch = Scheduler(runtime, 2, 8)
    Caller(batch, runtime, long[:100], limit=1).wait()
    fill = batch._fill

    def note(job, shared):
        sequence = batch._running[job]
        before = sequence.length
        fill(job, shared)
        pieces.append((len(job.prompt), sequence.length - before))

    def arrive(route):
        gates.append(route)
        if len(gates) == 3:
            callers.extend(ask(batch, ids, 1) for ids in shorts)

    monkeypatch.setattr(batch, "_fill", note)
    stop = runtime.model.quantized("a test").on_layer(arrive)
    callers.append(ask(batch, long, 2, "another"))
    until(lambda: len(callers) == 4)
    for caller in callers:
        caller.wait()
    batch.close()
    stop()
    assert batch.problem is None and callers[0].answer.ids == wanted
    assert order == [*map(len, shorts), 240, 240]
    assert pieces[0] == (240, 0)  # the pass under way ended, and only that one
    assert pieces[1:7] == [(len(shorts[0]), 3), (240, 16), (3, 3), (240, 16), (3, 3), (240, 16)]
    assert {count for length, count in pieces[7:]} == {16}
