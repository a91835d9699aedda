"""Drafts: the text, its logits and its log-probabilities are bitwise those without, wherever a
draft is cut off."""

from statistics import fmean

import pytest
import torch

from slotmoe.errors import ConfigError
from slotmoe.model.generate import Answer
from slotmoe.model.network import Network
from slotmoe.model.sampling import Sampling
from slotmoe.offload.policy.passes import Drafting, NGrams
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.kernels.cpu.bindings import load
from tests.support.engine import ask, decode

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels are not built")
TEXT = "The people of the United States have a government. " * 6
SAMPLINGS = [{}, {"temperature": 0.8, "top_p": 0.7, "seed": 9}]


@pytest.fixture(scope="module", params=["ngram"])
def pair(request, sample_export):
    """Two runtimes of four sequences, without drafts and with."""
    draft, options = request.param, {"ram": "2GiB", "context": 200, "sequences": 4}
    if draft == "mtp":
        sample_export = request.getfixturevalue("with_head") / "export"
    with (
        Runtime.open(sample_export, draft="off", **options) as plain,
        Runtime.open(sample_export, draft=draft, **options) as drafting,
    ):
        yield plain, drafting


both_kinds = pytest.mark.parametrize("pair", ["ngram", "mtp"], indirect=True)


class Noting(Answer):
    """Keeps all that it chooses from."""

    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self.rows = []

    def take(self, logits_V):
        self.rows.append(logits_V.clone())
        return super().take(logits_V)


def answer_of(runtime, sampling):
    """The answer, every row of logits, what is shown, and what the sequence holds at the end."""
    runtime.engine.empty()
    ids = runtime.tokenizer.encode(TEXT)
    answer = Noting(ids, runtime.tokenizer, (), Sampling(**sampling), 40, logprobs=3)
    deltas = ask(runtime, ids, answer)
    return answer.ids, torch.stack(answer.rows), deltas, runtime.engine.batch.sequences[0].tokens


def lengths_of(runtime):
    return [sequence.length for sequence in runtime.engine.batch.sequences]


@pytest.mark.parametrize("sampling", SAMPLINGS)
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


def test_a_text_that_fills_the_context(pair, eager):
    tokens = [list(runtime.generate(TEXT + TEXT, None, seed=2)) for runtime in pair]
    assert tokens[0] == tokens[1] and tokens[1][-1].finish == "context"
    assert [max(lengths_of(runtime)) for runtime in pair] == [199, 199]


@both_kinds
def test_what_is_drafted_does_not_outlast_a_change(pair, eager, monkeypatch):
    """A text that goes on elsewhere, another token, or a pass that fails when it is computed."""
    ids, both, drafts = pair[0].tokenizer.encode(TEXT), [], []
    forward, left = Network.forward, []

    def failing(*arguments):
        hidden_TD = forward(*arguments)
        if left and left.pop() == "last":
            raise MemoryError
        return hidden_TD

    monkeypatch.setattr(Network, "forward", failing)
    for runtime in pair:
        runtime.engine.empty()
        rows, before = [decode(runtime, ids[:40], ids[40:42])], runtime.stats()["drafts"]
        for new in ids[12], 7:
            rows.append(decode(runtime, ids[:30], [ids[30], new, ids[41]]))
            rows.append(decode(runtime, [*ids[:5], *ids[20:30]], ids[30:36]))
        left += ["last", "decoded", "prompt"]
        with pytest.raises(MemoryError):
            decode(runtime, ids[:40], [ids[40], 7])
        assert max(lengths_of(runtime)) == 41
        rows.append(decode(runtime, ids[:41], ids[41:60]))
        both.append(torch.cat(rows))
        drafts.append(runtime.stats()["drafts"].get("drafted", 0) - before.get("drafted", 0))
    assert torch.equal(*both) and drafts[1] > drafts[0] == 0


@both_kinds
def test_several_answers_in_one_pass(pair, eager):
    """Each with its own number of rows; the text is each one's alone."""
    plain, drafting = pair
    prompts = [TEXT, "Call me", TEXT[30:], "import os\nimport os\nimport os\n"]
    ids = [plain.tokenizer.encode(prompt) for prompt in prompts]
    before = drafting.stats()["drafts"]["drafted"]
    found = [[token.id for token in text] for text in drafting.generate_all(ids, max_new_tokens=24)]
    assert found == [[token.id for token in plain.generate(i, 24)] for i in ids]

    def always(prompt, limit, at):
        """The same token, so that a draft goes on where the answer ends."""
        sampling = Sampling(logit_bias=((5, 1e4),))
        answer = Answer(prompt, drafting.tokenizer, (), sampling, limit)
        last = ask(drafting, prompt, answer, lambda r: r.cancel() if len(answer.ids) == at else 0)
        return last[-1].finish, answer.ids

    assert always(ids[1], 30, 0) == ("length", [5] * 30)
    assert always(ids[3], 150, 5) == ("cancelled", [5] * 5)
    assert drafting.stats()["drafts"]["drafted"] > before + 60


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
    assert drafting.lengths([chances], 15) == [0]  # before anything was measured
    speeds = []
    for _ in range(300):
        (length,) = drafting.lengths([chances], 15)
        drafting.measured(1 + length, length, seconds := 1 + cost * length)
        speeds.append((1 + sum(chances[:length])) / seconds)
    best = max((1 + sum(chances[:n])) / (1 + cost * n) for n in range(16))
    assert fmean(speeds) > 0.985 and fmean(speeds[30:]) > 0.95 * best
    assert drafting.lengths([[0.02] * 15], 15) == [0]
    assert drafting.lengths([[], [0.99] * 9, []], 15)[::2] == [0, 0]


def test_drafts_are_off_where_rows_change_bits(sample_export):
    with Runtime.open(sample_export, kernels="torch", context=64, draft="auto") as runtime:
        assert runtime.stats()["drafts"]["kind"] == "off"
        assert "not bitwise" in runtime.stats()["drafts"]["why"]
    with pytest.raises(ConfigError, match=r"draft ngram: torch .* leave it out"):
        Runtime.open(sample_export, kernels="torch", context=64, draft="ngram")
    with pytest.raises(ConfigError, match=r"draft 'tree' .* auto, off, ngram, mtp"):
        Runtime.open(sample_export, draft="tree")
