"""Drafts: the text, its logits and its log-probabilities are bitwise those without, wherever a
draft is cut off."""

import random
from contextlib import suppress
from statistics import fmean

import pytest
import torch

from slotmoe.errors import ConfigError
from slotmoe.model.generate import Answer, Sampling
from slotmoe.offload.policy.drafts import MOST_DRAFTED, Drafting, NGrams
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.scheduler import Scheduler
from slotmoe.quant.kernels.cpu.bindings import load
from tests.offload.test_scheduler import Caller
from tests.support.engine import whole
from tests.support.interrupts import interrupted_at, lines_of

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels are not built")
TEXT = "The people of the United States have a government. " * 6
SAMPLINGS = [{}, {"temperature": 0.4, "seed": 7}, {"temperature": 0.8, "top_p": 0.7, "seed": 3}]


@pytest.fixture(scope="module", params=["ngram"])
def pair(request, sample_export):
    """Two runtimes of four sequences, without drafts and with."""
    draft, options = request.param, {"ram": "2GiB", "context": 200, "sequences": 4}
    if draft == "mtp":
        sample_export = request.getfixturevalue("with_head") / "export"
    elif draft == "ngram, few slots":
        draft, options["slots"] = "ngram", 100
    with (
        Runtime.open(sample_export, draft="off", **options) as plain,
        Runtime.open(sample_export, draft=draft, **options) as drafting,
    ):
        yield plain, drafting


both_kinds = pytest.mark.parametrize("pair", ["ngram", "mtp"], indirect=True)


@pytest.fixture
def eager(monkeypatch):
    """A row more is taken to cost nothing, so that wrong tokens are drafted too."""

    def all_of(self, chances):
        return [min(len(each), MOST_DRAFTED // len(chances)) for each in chances]

    monkeypatch.setattr(Drafting, "lengths", all_of)
    monkeypatch.setattr(Drafting, "pays", lambda self, chance, cost: True)


def answer_of(runtime, sampling):
    """All that a loop over ``Sequence.append`` gives: the answer, every row of logits, what is
    shown, and what the sequence holds at the end."""
    ids = runtime.tokenizer.encode(TEXT)
    answer = Answer(ids, runtime.tokenizer, (), Sampling(**sampling), 40, logprobs=3)
    sequence, rows, deltas, new = runtime.sequences[0], [], [], ids
    sequence.rewind(0)
    while not deltas or deltas[-1].finish is None:
        rows.append(sequence.append(new).clone())
        deltas.append(answer.take(rows[-1][0]))
        new = answer.ids[-1:]
    return answer.ids, torch.cat(rows), deltas, sequence.tokens


@pytest.mark.parametrize(
    ("pair", "sampling"),
    [*(("ngram", sampling) for sampling in SAMPLINGS), ("ngram, few slots", SAMPLINGS[0])],
    indirect=["pair"],
)
def test_text_and_logits_are_bitwise_those_without_drafts(pair, eager, sampling):
    before = pair[1].stats()["drafts"]
    want, got = (answer_of(runtime, sampling) for runtime in pair)
    assert torch.equal(want[1], got[1])
    assert (want[0], *want[2:]) == (got[0], *got[2:])
    now = pair[1].stats()["drafts"]
    kinds = "drafted", "accepted", "rows", "passes"
    drafted, accepted, rows, passes = (now[kind] - before[kind] for kind in kinds)
    assert drafted > accepted > 2 and rows == passes + drafted
    assert passes + accepted == 39  # the first token comes of the prompt's last row


def interrupted(original):
    """A function that has done its work when Ctrl-C ends it."""

    def call(*arguments):
        original(*arguments)
        raise KeyboardInterrupt

    return call


def decoded(sequence, *ids):
    return torch.cat([sequence.append([id]).clone() for id in ids])


def test_a_text_that_fills_the_context(pair, eager):
    tokens = [list(runtime.generate(TEXT + TEXT, None, seed=2)) for runtime in pair]
    assert tokens[0] == tokens[1] and tokens[1][-1].finish == "context"
    assert [len(runtime.sequences[0].tokens) for runtime in pair] == [199, 199]


@both_kinds
def test_what_is_drafted_does_not_outlast_a_change(pair, eager, monkeypatch):
    """A rewind, another token, or a pass that ends with an exception."""
    ids, both = pair[0].tokenizer.encode(TEXT), []
    for runtime in pair:
        sequence, rows = runtime.sequences[0], []
        for new in ids[12], 7:
            sequence.rewind(0)
            sequence.append(ids[:40])
            rows.append(sequence.append([ids[40]]))
            assert (sequence.ahead is None) == (runtime is pair[0])
            drafted = sequence.ahead.draft[0] if sequence.ahead else new
            sequence.rewind(30)
            assert sequence.follow(drafted) is None and sequence.length == 30
            rows.append(decoded(sequence, ids[30], new, ids[41]))
            sequence.rewind(5)
            rows += [sequence.append(ids[20:30]), decoded(sequence, *ids[30:36])]
        sequence.rewind(0)
        sequence.append(ids[:40])
        sequence.append([ids[40]])
        network = type(runtime.model.network)
        with monkeypatch.context() as patch:
            patch.setattr(network, "forward", interrupted(network.forward))
            with pytest.raises(KeyboardInterrupt):
                sequence.append([7])
        rows.append(decoded(sequence, *ids[41:60]))
        both.append(torch.cat(rows))
    assert torch.equal(*both)


@both_kinds
def test_several_answers_in_one_pass(pair, eager):
    """Each with its own number of rows; the text is each one's alone."""
    plain, drafting = pair
    prompts = [TEXT, "Call me", TEXT[30:], "import os\nimport os\nimport os\n"]
    ids = [plain.tokenizer.encode(prompt) for prompt in prompts]
    before = drafting.stats()["drafts"]["drafted"]
    batch = Scheduler(drafting, 4, 0)
    found = [caller.wait().answer.ids for caller in [Caller(batch, drafting, i) for i in ids]]
    assert found == [[token.id for token in plain.generate(i, 24)] for i in ids]

    def leave(caller):
        caller.job.cancelled = len(caller.answer.ids) == 5

    always = {"logit_bias": ((5, 1e4),)}  # so that a draft goes on where the answer ends
    ended = Caller(batch, drafting, ids[1], 30, sampling=always).wait()
    assert (ended.last.finish, ended.answer.ids) == ("length", [5] * 30)
    left = Caller(batch, drafting, ids[3], 150, at=leave, sampling=always).wait()
    assert (left.last.finish, left.answer.ids) == ("cancelled", [5] * 5)
    batch.close()
    assert batch.problem is None and drafting.stats()["drafts"]["drafted"] > before + 60


@pytest.mark.parametrize(
    ("pair", "files"),
    [("ngram", ("drafts.py", "sequence.py")), ("mtp", ("/mtp_drafts.py", "/mtp.py"))],
    indirect=["pair"],
)
def test_interrupted_at_some_lines(pair, eager, heavy, files):
    """The text goes on from what the sequence holds, whichever line an exception came at."""
    ids, (plain, drafting) = pair[0].tokenizer.encode(TEXT), pair

    def compute(runtime=drafting):
        sequence = runtime.sequences[0]
        sequence.rewind(55)
        sequence.append(ids[55:60])
        return decoded(sequence, *ids[60:64], 9, *ids[20:24])

    for runtime in pair:
        runtime.sequences[0].rewind(0)
        runtime.sequences[0].append(ids[:60])
    want = compute(plain)
    assert torch.equal(compute(), want)
    lines, chance, came = lines_of(compute), random.Random(5), 0
    ours = [line for line in sorted(lines) if line[0].endswith(files)]
    for line in chance.sample(ours, 20):
        with suppress(Exception):
            moment = chance.randint(1, max(1, lines[line] * 3 // 4))
            came += interrupted_at(line, moment, compute, KeyboardInterrupt)
        assert torch.equal(compute(), want), line
    whole(drafting)
    assert came > 10


def test_the_longest_match_counts_and_of_equals_the_latest():
    grams = NGrams()
    grams.read([1, 2, 3, 4, 9, 2, 3, 5, 8, 2, 3, 6, 1, 2, 3])
    assert grams.draft(3)[0] == [4, 9, 2]
    grams.read([7, 2, 3, 4, 9, 2, 3, 5, 8, 2, 3, 6, 1, 2, 3])
    assert grams.draft(2)[0] == [6, 1]
    grams.read([5, 6, 5, 6, 5])  # a text that repeats itself
    assert grams.draft(5)[0] == [6, 5, 6, 5, 6]
    grams.read([5, 6, 5, 6, 5, 1])
    assert grams.draft(5) == ([], [])
    assert grams.draft(5) == ([], []) and NGrams().draft(3) == ([], [])


@pytest.mark.parametrize("likely", [0.99, 0.9, 0.5, 0.1])
@pytest.mark.parametrize("cost", [0.1, 0.3, 0.8, 1.5])
def test_rows_are_computed_as_long_as_they_pay(likely, cost):
    """Beside the best fixed length and beside none, by what is expected."""
    drafting, chances = Drafting(), [likely**n for n in range(1, 16)]
    assert drafting.lengths([chances]) == [0]  # before anything was measured
    speeds = []
    for _ in range(300):
        (length,) = drafting.lengths([chances])
        drafting.measured(1 + length, length, seconds := 1 + cost * length)
        speeds.append((1 + sum(chances[:length])) / seconds)
    best = max((1 + sum(chances[:n])) / (1 + cost * n) for n in range(16))
    assert fmean(speeds) > 0.985 and fmean(speeds[30:]) > 0.95 * best
    assert drafting.lengths([[0.02] * 15]) == [0]
    assert drafting.lengths([[], [0.99] * 9, []])[::2] == [0, 0]


def test_drafts_are_off_where_rows_change_bits(sample_export):
    with Runtime.open(sample_export, kernels="torch", context=64, draft="auto") as runtime:
        assert runtime.stats()["drafts"]["kind"] == "off"
        assert "not bitwise" in runtime.stats()["drafts"]["why"]
    with pytest.raises(ConfigError, match=r"draft ngram: torch .* leave it out"):
        Runtime.open(sample_export, kernels="torch", context=64, draft="ngram")
    with pytest.raises(ConfigError, match=r"draft 'tree' .* auto, off, ngram, mtp"):
        Runtime.open(sample_export, draft="tree")
