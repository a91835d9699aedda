"""Several answers at once: the same tokens as alone, places that come free, latents reused and
never across owners."""

import gc
import threading
import time
import weakref

import pytest
import torch

from slotmoe.errors import PlanError
from slotmoe.model.generate import Answer, Sampling, Stops
from slotmoe.offload import scheduler
from slotmoe.offload.runtime import Runtime, Sequence
from slotmoe.offload.scheduler import Job, QueueFullError, Scheduler
from tests.support.served import until

PROMPTS = [
    "My fellow citizens,",
    "It is a truth universally acknowledged, that a",
    "def main(",
    "Call me",
    "To be or not to be",
    "Once upon a time there was a small",
    "import os",
    "The constitution of",
]


class Caller:
    """Submits one prompt and collects its answer."""

    def __init__(self, batch, runtime, ids, limit=24, owner="", at=None, **options):
        self.ids, self.text, self.last, self.ended = ids, "", None, threading.Event()
        self.answer = Answer(
            ids,
            runtime.tokenizer,
            runtime.eos_token_ids,
            Sampling(**options.pop("sampling", {})),
            limit,
            **options,
        )
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
def tight(sample_export):
    """Half of the experts fit."""
    with Runtime.open(sample_export, ram="2GiB", context=256, sequences=8, slots=112) as runtime:
        yield runtime


@pytest.fixture
def batch(runtime):
    batch = Scheduler(runtime, 8, 4)
    yield batch
    batch.close()
    assert batch.problem is None


@pytest.mark.parametrize("which", ["runtime", "tight"])
def test_answers_together_are_token_for_token_those_alone(which, request):
    """Prompts of one token and of more than a shared piece, so that decoding and filling
    interleave."""
    runtime = request.getfixturevalue(which)
    batch = Scheduler(runtime, 8, 4)
    long = runtime.tokenizer.encode("The people of the United States have a government. " * 16)
    assert len(long) > 128
    prompts = [*(runtime.tokenizer.encode(one) for one in PROMPTS[:6]), long, [0]]
    together = [Caller(batch, runtime, ids) for ids in prompts]
    found = [caller.wait().answer.ids for caller in together]
    batch.close()
    if runtime.stats()["kernels"] != "torch":
        assert found == [[token.id for token in runtime.generate(ids, 24)] for ids in prompts]
    assert batch.totals.steps < 8 * 24


def test_one_step_reaches_the_same_logits(runtime):
    if runtime.stats()["kernels"] == "torch":
        pytest.skip("torch's products depend on the number of rows")
    ids = [runtime.tokenizer.encode(one) for one in PROMPTS]
    alone = []
    for index, (sequence, prompt) in enumerate(zip(runtime.sequences, ids, strict=True)):
        sequence.rewind(0)
        sequence.append(prompt)
        alone.append(sequence.append([7 + index]))
        sequence.rewind(len(prompt))
    together = runtime.append_each(runtime.sequences, [7 + index for index in range(8)])
    assert torch.equal(together, torch.cat(alone))


def test_place_of_who_left_is_free_within_one_step(runtime, batch):
    def leave(caller):
        if len(caller.answer.ids) == 3:
            caller.job.cancelled = True

    caller = Caller(batch, runtime, runtime.tokenizer.encode("Call me"), 200, at=leave).wait()
    assert (caller.last.finish, len(caller.answer.ids), batch.running) == ("cancelled", 3, 0)


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
    ids = runtime.tokenizer.encode(
        "The people of the United States have a government of laws and not of men, and"
    )
    first = Caller(batch, runtime, ids, owner="a").wait()
    other = Caller(batch, runtime, ids, owner="b").wait()
    again = Caller(batch, runtime, ids, owner="a").wait()
    longer = Caller(batch, runtime, [*ids, *first.answer.ids[:-1], 5], owner="a").wait()
    assert [one.job.reused for one in (first, other, again, longer)] == [
        0,
        0,
        len(ids) - 1,
        len(ids) + 23,
    ]
    if runtime.stats()["kernels"] != "torch":
        assert first.answer.ids == other.answer.ids == again.answer.ids


def test_answer_ends_where_the_context_does(runtime, batch):
    caller = Caller(batch, runtime, [5] * 250, 100).wait()
    assert (caller.last.finish, len(caller.answer.ids)) == ("length", 7)


def test_closing_ends_answers_with_a_reason(runtime):
    batch = Scheduler(runtime, 8, 4)
    caller = Caller(batch, runtime, [5, 6, 7], 200, at=lambda one: batch.stop())
    assert caller.wait().last.finish == "shutdown"
    batch.close()
    with pytest.raises(QueueFullError):
        Caller(batch, runtime, [5])


def test_memory_goes_back_once_nobody_asks(runtime, monkeypatch):
    """Also what only a cycle holds; once after the last answer, and not on and on."""

    class Cycle:
        pass

    given, give_back = [], scheduler.give_back_memory
    monkeypatch.setattr(scheduler, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(scheduler, "give_back_memory", lambda: given.append(give_back()))
    batch = Scheduler(runtime, 8, 4)
    gc.disable()
    try:
        for count in (1, 2):
            until(lambda count=count: len(given) == count)
            time.sleep(0.2)
            assert len(given) == count
            cycle = Cycle()
            cycle.itself = cycle
            gone = weakref.ref(cycle)
            del cycle
            Caller(batch, runtime, [5, 6], limit=1).wait()
        until(lambda: gone() is None)
    finally:
        gc.enable()
        batch.close()


def test_failed_model_ends_every_answer_and_the_batch(runtime, monkeypatch):
    ended = threading.Event()
    batch = Scheduler(runtime, 8, 4, ended.set)
    monkeypatch.setattr(Sequence, "append", lambda *_: 1 / 0)
    caller = Caller(batch, runtime, [5, 6, 7])
    assert caller.wait().last.finish == "error"
    assert ended.wait(5) and isinstance(batch.problem, ZeroDivisionError)


def test_caches_of_all_sequences_are_in_the_plan(runtime, sample_export):
    assert (
        runtime.plan.components["latent KV cache"]
        == 8 * 256 * (80 + 16) * 8
        == sum(cache.nbytes for cache in runtime.model.caches)
    )
    with pytest.raises(PlanError, match="latent KV cache"):
        Runtime.open(sample_export, ram="350MiB", context=1024, sequences=256)


def text_of(runtime, ids, **options):
    answer, pieces = Answer([0], runtime.tokenizer, (1,), Sampling(), len(ids), **options), []
    for one in ids:
        logits = torch.zeros(4096)
        logits[one] = 9.0
        pieces.append(answer.take(logits))
        if pieces[-1].finish is not None:
            break
    return pieces


def test_stop_string_over_several_tokens_is_cut_out_and_never_shown(runtime):
    ids = runtime.tokenizer.encode("One two. Three four. Five", add_bos=False)
    pieces = text_of(runtime, ids, stops=Stops((" Three four", "never")))
    assert ("".join(one.text for one in pieces), pieces[-1].finish, pieces[-1].stopped_by) == (
        "One two.",
        "stop",
        " Three four",
    )
    whole = text_of(runtime, ids, stops=Stops(("Five!",)))
    assert ("".join(one.text for one in whole), whole[-1].finish) == (
        "One two. Three four. Five",
        "length",
    )
    assert [token.id for piece in whole for token in piece.tokens] == ids


def test_penalties_and_bias_change_the_choice():
    from slotmoe.model.generate import penalize

    logits = torch.tensor([2.0, 1.9, -1.0, 1.0])
    assert penalize(logits, Sampling(), [0], {0: 1}) is logits
    assert (
        penalize(logits, Sampling(presence_penalty=0.5, frequency_penalty=0.25), [1], {0: 2})[0]
        == 1.0
    )
    assert penalize(logits, Sampling(repetition_penalty=2.0), [0, 2], {}).tolist() == pytest.approx(
        [1.0, 1.9, -2.0, 1.0]
    )
    assert penalize(logits, Sampling(logit_bias=((3, 5.0),)), [], {}).tolist() == pytest.approx(
        [2.0, 1.9, -1.0, 6.0]
    )
    assert logits.tolist() == pytest.approx([2.0, 1.9, -1.0, 1.0])


def test_min_p_keeps_what_is_likely_enough():
    from slotmoe.model.generate import random_source, sample

    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    drawn = {sample(logits, Sampling(1.0, min_p=0.5), random_source(seed)) for seed in range(60)}
    assert drawn == {0, 1}


def test_rows_that_others_overwrote_are_not_taken_for_the_prompt(sample_export):
    prompt = [5, 9, 300, 17, 2, 40, 8, 21]
    with Runtime.open(sample_export, context=64, sequences=2) as runtime:
        wanted = [token.id for token in runtime.generate(prompt, 8)]
        first, second = runtime.sequences
        second.append([7, 7, 7, 7, 7, 7, 7])
        first.take(second, 6)
        assert [token.id for token in runtime.generate(prompt, 8)] == wanted
        first.take(first, 2)
        runtime.append_each([first, second], [77, 78])
        assert [token.id for token in runtime.generate(prompt, 8)] == wanted


def test_stop_strings_count_outside_of_tool_calls(runtime):
    def told(text, *strings, calls="<call>"):
        ids = runtime.tokenizer.encode(text, add_bos=False)
        pieces = text_of(runtime, ids, stops=Stops(strings, calls))
        return "".join(piece.text for piece in pieces), pieces[-1].finish, pieces[-1].stopped_by

    assert told("a b <call>b c", "b c") == ("a b <call>b c", "length", None)
    assert told("a b <call>b c", "b c", calls="") == ("a b <call>", "stop", "b c")
    assert told("a b <call>b c", "b") == ("a ", "stop", "b")
    for stop in ("<", "<call>", "call", " <c"):  # in what begins the calls
        assert told("a b <call>b c", stop) == ("a b <call>b c", "length", None), stop
    assert told("a b <calm>", "<") == ("a b ", "stop", "<")  # that was no call
    assert told("a b <cal", "<") == ("a b ", "stop", "<")  # nor could it become one
    assert told("a b <cal", "x") == ("a b <cal", "length", None)


@pytest.mark.parametrize("end", ["cancelled", "shutdown"])
def test_a_long_pass_ends_when_nobody_waits_for_it(sample_export, monkeypatch, end):
    for module in ("loading", "scheduler"):
        monkeypatch.setattr(f"slotmoe.offload.{module}.PREFILL_CHUNK", 16)
    gates, ids = [], [5 + n for n in range(200)]
    with Runtime.open(sample_export, context=256, slots=100) as runtime:
        batch = Scheduler(runtime, 1, 4)

        def third(route):
            gates.append(route)
            if len(gates) == 3 and end == "cancelled":
                batch._filling.cancelled = True
            elif len(gates) == 3:
                batch.stop()

        runtime.model.experts.on_route(third)
        caller = Caller(batch, runtime, ids).wait()
        batch.close()
        assert (caller.last.finish, len(gates), batch.problem) == (end, 3, None)
        assert runtime.sequences[0].length == 0
        assert runtime.logits(ids).isfinite().all()


@pytest.mark.parametrize("reused", [0, 100])
def test_a_short_prompt_overtakes_a_long_one_which_gets_a_piece_after_each(
    sample_export, monkeypatch, reused
):
    for module in ("loading", "scheduler"):
        monkeypatch.setattr(f"slotmoe.offload.{module}.PREFILL_CHUNK", 16)
    long, shorts = [5 + n for n in range(240)], [[7 + n, 8, 9] for n in range(3)]
    shorts[0] = [*long[:reused], *shorts[0]]
    gates, order, callers, pieces = [], [], [], []

    def ask(batch, runtime, ids, limit, owner=""):
        return Caller(batch, runtime, ids, limit, owner, lambda caller: order.append(len(ids)))

    with Runtime.open(sample_export, context=256, slots=100, sequences=2) as runtime:
        wanted = [token.id for token in runtime.generate(long, 2)]
        batch = Scheduler(runtime, 2, 8)
        if reused:  # what is cached of a prompt does not count
            Caller(batch, runtime, long[:reused], limit=1).wait()
        fill = batch._fill

        def note(job, shared):
            sequence = batch._running[job]
            before = sequence.length
            fill(job, shared)
            pieces.append((len(job.prompt), sequence.length - before))

        def arrive(route):
            gates.append(route)
            if len(gates) == 3:
                callers.extend(ask(batch, runtime, ids, 1) for ids in shorts)

        monkeypatch.setattr(batch, "_fill", note)
        runtime.model.quantized("a test").on_route(arrive)
        callers.append(ask(batch, runtime, long, 2, "another"))
        for caller in callers:
            caller.wait()
        batch.close()
        assert batch.problem is None and callers[0].answer.ids == wanted
    assert order == [*map(len, shorts), 240, 240]
    assert pieces[0] == (240, 0)  # the pass under way ended, and only that one
    assert pieces[1:7] == [(len(shorts[0]), 3), (240, 16), (3, 3), (240, 16), (3, 3), (240, 16)]
    assert {count for length, count in pieces[7:]} == {16}
