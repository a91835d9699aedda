"""Several prompts in one pass: each is read as it would be alone, experts are read once for all,
and none waits for long."""

import random
from types import SimpleNamespace

import pytest
import torch

from slotmoe.errors import ConfigError
from slotmoe.offload.engine import loading
from slotmoe.offload.engine.requests import Forced, Request
from slotmoe.offload.policy.passes import PIECE, allowance, place, shares
from slotmoe.offload.runtime import Runtime
from tests.support.engine import at_once, decode, passes_of, together, until, whole

MORE = [7, 8, 300]  # what is decoded behind each prompt


def words(seed, count):
    return [
        random.Random(seed).randrange(2, 4000) for seed in range(seed << 16, (seed << 16) + count)
    ]


def lengths(*counts):
    return [words(seed, count) for seed, count in enumerate(counts, 1)]


LOADS = [lengths(300, 45), lengths(200, 9, 41), lengths(130, 64, 17, 1, 520)]


@pytest.fixture(scope="module")
def runtime(sample_export):
    with Runtime.open(sample_export, ram="2GiB", context=1024, sequences=6) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def narrow(sample_export, heavy):
    """Half of the experts fit, and a pass goes through each layer in steps of 16 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "PREFILL_CHUNK", 16)
        with Runtime.open(sample_export, context=1024, sequences=6, slots=112) as runtime:
            runtime.plan.__dict__["prefill_chunk"] = 128
            yield runtime


# How they share, in tokens


def test_shares_are_the_first_prompts_of_the_line():
    for line, budget, free, wanted in (
        ([600], 512, 64, [512]),
        ([600, 9000], 512, 64, [512]),
        ([88, 8000], 512, 64, [88, 88]),
        ([20, 8000], 512, 64, [20, 64]),
        ([20, 8000], 64, 512, [20, 44]),
        ([64, 8000], 64, 64, [64]),
        ([128] * 5, 512, 64, [128, 128]),
        ([128] * 5, 4096, 512, [128] * 5),
        ([500, 300, 2400, 9], 4096, 64, [500, 300, 200]),
        ([20, 300, 2400, 9], 4096, 512, [20, 300, 212]),
        ([], 512, 64, []),
    ):
        assert shares(line, budget, free) == wanted


class Line:
    """Prompts that arrive while others are read.  One has ``waited`` for tokens that were lost, or
    read before its own last ones."""

    def __init__(self, budget):
        self.budget, self.line, self.now, self.ended = budget, [], 0, []

    def start(self, left, lost=0):
        prompt = SimpleNamespace(size=left, left=left, allows=allowance(left), began=self.now)
        at = place(left, left + PIECE + lost, [(each.left, each.allows) for each in self.line])
        if lost and at:  # then the pass goes on
            lost = 0
            at = place(left, left + PIECE, [(each.left, each.allows) for each in self.line])
        for each in self.line:
            each.allows -= lost
        for each in self.line[at:]:
            each.allows -= left + PIECE
        self.now += lost
        self.line.insert(at, prompt)
        return prompt

    def step(self):
        counts = shares([each.left for each in self.line], self.budget, PIECE)
        assert sum(counts) <= self.budget and all(counts)
        for each, count in zip([*self.line], counts, strict=False):
            self.now, each.left = self.now + count, each.left - count
            if not each.left:
                each.waited = self.now - each.began - each.size
                self.line.remove(each)


@pytest.mark.parametrize("seed", range(40))
def test_a_long_prompt_waits_at_most_for_a_share_of_itself(seed):
    """Whatever comes while it is read, and however often a pass is given up."""
    source = random.Random(seed)
    line = Line(source.choice([64, 512, 4096]))
    long = line.start(source.choice([700, 3000, 9000, 30000]))
    for _ in range(1000):
        for _ in range(source.choice([0, 0, 1, 3, 20])):
            size = int(2 ** source.uniform(0, 15))
            line.start(size, lost=source.randrange(200))
        line.step()
        if not long.left:
            break
    assert not long.left and long.waited <= 0.3 * long.size


# The same bits


@pytest.mark.parametrize("prompts", LOADS, ids=["two", "three", "five"])
@pytest.mark.parametrize("room", ["runtime", "narrow"])
def test_prompts_together_are_each_as_alone(request, room, prompts, monkeypatch):
    runtime = request.getfixturevalue(room)
    alone = []
    for prompt in prompts:
        runtime.engine.empty()
        alone.append(decode(runtime, prompt, MORE))
    runtime.engine.empty()
    passes = passes_of(runtime, monkeypatch)
    found = together(runtime, prompts, MORE)
    assert max(map(len, passes)) > 1 and -sum(sum(rows) for rows in passes) > 0
    assert any(min(rows) < 0 < max(rows) for rows in passes) or len(prompts) < 5
    if runtime.stats()["kernels"] != "torch":
        assert all(map(torch.equal, found, alone))
    whole(runtime)


@pytest.mark.parametrize("room", ["runtime", "narrow"])
def test_scores_and_hidden_states_of_a_shared_pass_are_each_prompts_own(request, room):
    runtime = request.getfixturevalue(room)

    class Scored(Forced):
        def __init__(self):
            super().__init__((), keeps=True)
            self.scores = []

        def score(self, token_id, logits_V):
            self.scores.append((token_id, None if logits_V is None else logits_V.clone()))

    prompts, hidden, scored, text = lengths(150, 90, 40), [], Scored(), Forced(MORE, keeps=True)
    wanted = [runtime.logits(prompts[0]), runtime.logits(prompts[1])]
    last = decode(runtime, prompts[2], MORE)
    runtime.engine.empty()
    requests = (
        Request(prompts[0], None, hidden=hidden.append, first=100),
        Request(prompts[1], scored, scored=True),
    )
    at_once(runtime, *requests, Request(prompts[2], text))
    each = runtime.engine.batch.passes.each
    rows = torch.cat(runtime.engine.call(lambda: [*each(torch.cat(hidden))]))
    ids, logits = zip(*scored.scores, strict=True)
    assert (ids, logits[0]) == (tuple(prompts[1]), None)
    if runtime.stats()["kernels"] != "torch":
        assert torch.equal(rows, wanted[0][100:])
        assert torch.equal(torch.stack([*logits[1:], scored.logits[0]]), wanted[1])
        assert torch.equal(torch.stack(text.logits), last)


def test_a_prompt_waits_for_what_another_is_going_to_hold(runtime):
    """Four answers to one prompt, and one that goes on from its first tokens: nothing is read
    twice."""
    (prompt,), totals = lengths(400), runtime.engine.batch.totals
    other = [*prompt[:300], *words(9, 30)]
    runtime.engine.empty()
    before = totals.prompt_tokens
    logits = together(runtime, [prompt, prompt, prompt, other])
    assert totals.prompt_tokens - before == 400 + 2 + 30
    assert torch.equal(logits[0], logits[1])


# What goes wrong in a shared pass


@pytest.fixture
def three(narrow):
    """Three prompts that are read at once, and what each gives alone."""
    prompts, engine = lengths(60, 40, 30), narrow.engine
    engine.empty()
    wanted = [decode(narrow, prompt, MORE) for prompt in prompts]
    engine.empty()
    texts = [Forced(MORE, keeps=True) for _ in prompts]
    requests = [*map(Request, prompts, texts)]

    def ask(at):
        """Their finishes; ``at(requests)`` is called at the third gate."""
        gates = []

        def third(route):
            gates.append(route)
            if len(gates) == 3:
                at(requests)

        stop = engine.call(lambda: narrow.model.experts.on_layer(third))
        ends = at_once(narrow, *requests)
        engine.call(stop)
        return [end.finish for end in ends]

    def right(*numbers):
        whole(narrow)
        if narrow.stats()["kernels"] == "torch":
            return True
        again = together(narrow, prompts, MORE)
        found = [torch.equal(torch.stack(texts[n].logits), wanted[n]) for n in numbers]
        return all(found) and all(map(torch.equal, again, wanted))

    return SimpleNamespace(requests=requests, texts=texts, ask=ask, right=right)


def test_a_failure_ends_the_requests_of_its_pass(three):
    def fail(requests):
        raise OSError(5, "Input/output error")

    assert three.ask(fail) == ["error"] * 3
    assert three.right()


def test_cancelling_one_ends_only_that(three):
    ends = three.ask(lambda requests: requests[1].cancel())
    assert ends == ["length", "cancelled", "length"]
    assert three.right(0, 2)


def test_a_refused_answer_ends_only_that(three, monkeypatch):
    def refuse(logits_V):
        raise ConfigError("the grammar can't be followed")

    monkeypatch.setattr(three.texts[2], "take", refuse)
    assert three.ask(lambda requests: None) == ["length", "length", "refused"]
    assert three.right(0, 1)


# What is read, and when


def test_experts_are_read_once_for_all_prompts(sample_export, heavy, monkeypatch):
    prompts, read = lengths(100, 100, 100, 100), []

    def disk(runtime):
        return runtime.stats()["io"]["disk"]["bytes"]

    monkeypatch.setattr(loading, "PREFILL_CHUNK", 512)
    with Runtime.open(sample_export, context=512, sequences=4, slots=24) as runtime:
        for ask in (together, lambda *given: [decode(given[0], ids, []) for ids in given[1]]):
            runtime.engine.empty()
            before = disk(runtime)
            ask(runtime, prompts)
            read.append(disk(runtime) - before)
    assert 2.5 * read[0] < read[1]


@pytest.fixture
def arriving(narrow, monkeypatch):
    """Reads a long prompt of 1000 tokens while shorter ones come at the given gates: the passes,
    and the prompts' lengths in the order of their first tokens."""

    def read(arrivals):
        engine, gates, order, callers = narrow.engine, [], [], []
        engine.empty()
        passes = passes_of(narrow, monkeypatch)

        def ask(ids):
            request = Request(ids, Forced(()), owner=str(len(callers)))
            request.emit = lambda delta: order.append(len(ids)) if delta.finish else None
            callers.append(request)
            engine.submit(request)

        def arrive(route):
            gates.append(route)
            for length in arrivals.get(len(gates), ()):
                ask(words(length, length))

        stop = engine.call(lambda: narrow.model.experts.on_layer(arrive))
        ask(words(1000, 1000))
        until(lambda: len(order) == 1 + sum(map(len, arrivals.values())))
        engine.call(stop)
        return passes, order

    return read


def test_a_short_prompt_overtakes_a_long_one(arriving):
    """The pass under way ends, if it has just begun."""
    steps = 128 // 16  # gates of a layer in a pass
    passes, order = arriving({3: [40]})
    assert order == [40, 1000]
    assert passes[:4] == [[-128], [-40, -88], [-128], [-128]]
    assert sum(-sum(rows) for rows in passes) == 1000 + 40 + 128
    passes, order = arriving({6 * steps: [40]})
    assert order == [40, 1000]
    assert passes[:4] == [[-128], [-40, -88], [-128], [-128]]
    assert sum(-sum(rows) for rows in passes) == 1000 + 40


def test_a_long_prompt_allows_a_share_of_itself(arriving):
    """Two of 50 tokens cost it 228 of the 300 that it allows; a third one waits."""
    passes, order = arriving({60: [50, 50, 50]})
    assert order == [50, 50, 1000, 50]
    assert [-50, -50, -28] in passes
    assert passes[-1][-1] == -50 and len(passes[-1]) == 2
