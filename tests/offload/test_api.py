"""``Runtime`` as a notebook's user has it: each mistake is a sentence, and a batch, a conversation
and log-probabilities are what they are one by one;
what is reused, and memory inside the budget."""

import asyncio
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from slotmoe.errors import ConfigError, PlanError
from slotmoe.offload.engine import loading
from slotmoe.offload.runtime import Runtime
from slotmoe.sizes import parse_size
from tests.support.engine import IDS, until
from tests.support.tiny import SAMPLE

USER = {"role": "user", "content": "Call me"}
CALL = {"type": "function", "function": {"name": "stop", "arguments": {}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}


@pytest.fixture(scope="module")
def runtime(sample_export):
    with Runtime.open(sample_export, context=256, sequences=3) as runtime:
        yield runtime


OPTIONS = [
    ({"context": "4k"}, "context is '4k', expected a whole number or None"),
    ({"threads": 2.5}, "threads is 2.5, expected a whole number or None"),
    ({"quantize": "nf4"}, "quantize is 'nf4', expected True or False"),
    ({"experts_dirs": "/mnt/b"}, "experts_dirs is '/mnt/b', expected a list"),
    ({"ram": []}, r"ram is \[\], expected a number or text or None"),
    ({"device": 0}, r"device '0' is unknown: auto, cpu, cuda\[:N\]"),
    ({"misses": "gpu"}, "misses 'gpu' is unknown, expected one of: auto, fetch"),
    ({"slots": 5}, "at least 6"),
    ({"context": 5000}, "max_position_embeddings"),
    ({"context": 0}, "max_position_embeddings"),
    ({"vram": "1GiB", "device": "cpu"}, "--vram"),
    ({"cache_policy": "magic"}, "lru"),
    ({"threads": 0}, "threads is 0, expected 1 to 256"),
    ({"sequences": 257}, "sequences is 257, expected 1 to 256"),
    ({"path": SAMPLE, "quantize": False, "slots": 9}, "every expert resident; slots can't be give"),
    ({"path": SAMPLE, "quantize": False, "sequences": 2}, "one sequence; sequences can't be given"),
    ({"path": SAMPLE, "quantize": False, "cache_policy": "lru"}, "cache_policy can't be given"),
    ({"device": "tpu"}, "tpu"),
]


@pytest.mark.parametrize(("options", "problem"), OPTIONS, ids=str)
def test_what_is_no_option(sample_export, options, problem):
    with pytest.raises(ValueError, match=problem):
        Runtime.open(**{"path": sample_export, "context": 256, **options})


ASKED = [
    ({"prompt": b"x"}, "of the type bytes, expected a list of token ids"),
    ({"prompt": [True]}, "holds a bool, expected text or token ids"),
    ({"prompt": ["a", "b"]}, "holds a str, .*; generate_all takes several prompts"),
    ({"prompt": torch.tensor([[1]])}, "holds a list, .*; generate_all takes several prompts"),
    ({"temperature": "1"}, "temperature is '1', expected a number"),
    ({"top_k": 1.5, "temperature": 1}, "top_k is 1.5, expected a whole number"),
    ({"chat": "no"}, "chat is 'no', expected True or False"),
    ({"stop": ""}, "stop is '', expected texts that are not empty"),
    ({"top_logprobs": -1}, "top_logprobs is -1, expected 0 to 4096"),
    ({"tools": [{}]}, "tools go with messages"),
    ({"prompt": None, "messages": [{**USER, "more": {1}}]}, "what JSON can't.*Object of type set"),
    ({"prompt": [5] * 256}, "context"),
    ({"prompt": [5, 99999]}, "vocabulary"),
    ({"prompt": []}, "empty"),
]


@pytest.mark.parametrize(("asked", "problem"), ASKED, ids=str)
def test_what_is_no_question(runtime, asked, problem):
    """And none of them harms the engine."""
    with pytest.raises(ValueError, match=problem):
        runtime.generate(**{"prompt": "x", **asked})
    assert len(runtime.generate("Call me", 1).read()) > 0
    assert len(list(runtime.generate([5] * 254, 50))) == 2  # stops where the context ends


def test_other_mistakes_are_sentences_too(runtime, sample_export, monkeypatch):
    for call, problem in (
        (lambda: runtime.logits("Call me"), "of the type str, expected a list of token ids"),
        (lambda: runtime.generate_all("Call me"), "prompts is 'Call me', expected a list"),
        (lambda: runtime.encode(5), "text is 5, expected text"),
        (lambda: runtime.generate(None), "one of the two"),
        (lambda: runtime.generate([USER]), "holds a dict, .*; give a conversation as messages="),
        (lambda: runtime.generate(messages=[5]), r"messages is \[5\], expected a list of messages"),
        (lambda: runtime.generate(messages=[USER, "x"]), "a message is 'x', expected"),
        (lambda: runtime.generate(messages=[{**USER, "role": 5}]), "a message is .*, expected"),
        (lambda: runtime.generate(messages=[USER, {"role": "user"}]), "a message is .*, expected"),
        (lambda: runtime.score([5, 4096]), "0 to 4095"),
    ):
        with pytest.raises(ConfigError, match=problem):
            call()
    assert len(repr(runtime)) < 90 and "context 256" in repr(runtime)
    with pytest.raises(ConfigError, match="can't be pickled"):
        pickle.dumps(runtime)
    with pytest.raises(ConfigError, match=f"{Path.home()}/nowhere: no such folder"):
        Runtime.open("~/nowhere")
    with pytest.raises(TypeError, match=r"generate\(\) got an unexpected keyword argument 'temp'"):
        runtime.generate_all(["Call me"], temp=1)
    monkeypatch.setattr(loading, "load", lambda: None)
    with pytest.raises(ConfigError, match=r"learned needs native kernels.* take lfu-decay"):
        Runtime.open(sample_export, cache_policy="learned")
    with Runtime.open(sample_export, slots=20) as runtime:
        assert runtime.model.experts.slots.cache.policy == "lfu-decay"


@pytest.mark.parametrize("slots", [20, None])
@pytest.mark.parametrize("policy", ["lru", "lfu-decay"])
def test_the_policy_that_is_asked_for_is_taken(sample_export, policy, slots):
    with Runtime.open(sample_export, slots=slots, cache_policy=policy) as runtime:
        assert runtime.model.experts.slots.cache.policy == policy


def test_ids_may_be_arrays_and_equal_prompts_with_a_seed_are_equal_texts(runtime):
    ids, seeded = runtime.encode("Call me"), {"temperature": 1.0, "seed": 3, "max_new_tokens": 8}
    arrays = ids, torch.tensor(ids), numpy.array(ids), [numpy.int64(id_) for id_ in ids]
    texts = [text.read() for text in runtime.generate_all(arrays, **seeded)]
    assert texts == [runtime.generate("Call me", **seeded).read()] * 4


def test_a_conversation_is_the_chat_of_its_messages(runtime, processes):
    asked = [*runtime.generate("Call me", 4, chat=True)]
    texts = runtime.generate_all([[USER], [USER, CALLED, USER]], max_new_tokens=4)
    assert [*texts[0]] == asked and len([*texts[1]]) == 4


def test_log_probabilities_are_those_of_the_logits(runtime):
    ids = runtime.encode("Call me Ishmael")
    logprobs_TV = runtime.logits(ids).log_softmax(dim=-1)
    first, *rest = runtime.score("Call me Ishmael", top_logprobs=3)
    assert first.logprob is None and [token.id for token in (first, *rest)] == ids
    for token, row_V in zip(rest, logprobs_TV, strict=False):
        best = row_V.topk(3)
        assert token.logprob == pytest.approx(float(row_V[token.id]), abs=1e-5)
        assert [id_ for id_, _ in token.likeliest] == best.indices.tolist()
        assert [value for _, value in token.likeliest] == pytest.approx(best.values.tolist())
    assert "".join(token.text for token in rest) == "Call me Ishmael"
    (token,) = runtime.generate(ids, 1, top_logprobs=1)
    assert token.likeliest == ((token.id, token.logprob),)


def test_a_text_ends_before_a_stop_string_also_inside_a_token(runtime):
    whole = runtime.generate("Call me", 40).read()
    stop = whole[20:23]
    expected = whole[: whole.index(stop)]
    *_, last = runtime.generate("Call me", 40, stop=[stop, "never"])
    assert last.finish is None
    assert runtime.generate("Call me", 40, stop=stop).read() == expected

    async def read():
        return [token.text async for token in runtime.stream("Call me", stop=stop)]

    assert "".join(asyncio.run(read())) == expected


def test_sizes():
    sizes = {"8GiB": 8 << 30, "7.5GB": 7_500_000_000, 123: 123, "64 k": 65536}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "8XB", "-1GiB", "GiB", "1e9", "nan", "9" * 40, 0, True):
        with pytest.raises(PlanError, match="size"):
            parse_size(text)


@pytest.fixture
def alone(sample_export):
    """With one sequence."""
    with Runtime.open(sample_export, context=256) as runtime:
        yield runtime


def test_a_shared_beginning_is_not_fed_again(alone):
    """Logits are those of feeding all anew, by what is generated from them."""
    if alone.stats()["kernels"] == "torch":
        pytest.skip("the native kernels were not built")

    def fed():
        tokens = alone.stats()["tokens"]
        return tokens["prefill_tokens"] + tokens["decode_tokens"]

    def feeds(ids, *counts):
        before = fed()
        (found,) = alone.generate(ids, 1)
        assert fed() - before in counts
        wanted_V = alone.logits(ids)[-1, : alone.tokenizer.size]
        assert found.id == wanted_V.argmax()
        wanted = float(wanted_V.max() - wanted_V.logsumexp(dim=-1))
        assert found.logprob == pytest.approx(wanted, abs=2e-6)

    alone.logits(IDS)
    tokens = alone.stats()["tokens"]
    assert (tokens["prefill_tokens"], tokens["decode_tokens"]) == (60, 0)
    assert tokens["prefill_seconds"] > tokens["decode_seconds"] == 0
    answer = [token.id for token in alone.generate(IDS, 20)]
    # The next message of a conversation; the answer's last token was never fed.
    feeds(IDS + answer + [7, 8, 9], 4)
    feeds(IDS, 1)  # the same prompt again
    feeds([*IDS[:30], 77, *IDS[31:50]], 20)
    feeds(IDS, 30)  # what came after position 30 is gone
    feeds([9, *IDS], 61)
    tokens = alone.generate(IDS, 100)
    answer = [next(tokens).id for _ in range(10)]
    tokens.close()  # what an interrupted answer fed is kept, perhaps more than was seen of it
    until(lambda: not alone.engine.batch.running)
    feeds(IDS + answer + [7, 8], 2, 3)


_PEAK = """
import json, sys
from slotmoe.errors import PlanError
from slotmoe.offload.runtime import Runtime
from slotmoe.sizes import parse_size
export, budget = sys.argv[1], 1 << 20
try:
    Runtime.open(export, ram=budget, context=1024)
except PlanError as problem:
    least = str(problem).split("needs at least ")[1].split(" of ram")[0]
    budget = parse_size(least) + (3 << 20)
with Runtime.open(export, ram=budget, context=1024) as runtime:
    list(runtime.generate([5, 9, 300] * 200, 100))
    list(runtime.generate([7] * 300, 20))
    stats = runtime.stats()
print(json.dumps({"budget": budget, **stats["memory"], **stats["cache"]}))
"""


@pytest.mark.usefixtures("processes")
def test_peak_memory_stays_inside_the_budget(sample_export):
    """Of a process that has the smallest budget that the planner accepts, and room for about half
    of the experts."""
    command = [sys.executable, "-c", _PEAK, sample_export]
    memory = json.loads(subprocess.check_output(command))
    assert memory["peak_rss"] <= memory["budget"]
    assert memory["slots"] < 224
    assert memory["evictions"] > 0
