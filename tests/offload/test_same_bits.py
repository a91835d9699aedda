"""One text has the same bits, whatever the engine is given and whatever else it computes: budgets,
policies, reading ahead, runners, several texts at once, drafts and sessions."""

from functools import cache

import pytest
import torch

from slotmoe.offload.runtime import Runtime
from tests.support.engine import IDS, PROMPT, decode, whole

PROMPTS = [PROMPT, IDS, "The people of the United States have a government. " * 4]
NO_PREFETCH = {"prefetch": False}
FEW = {"sequences": 3}
WAYS = [
    {"slots": 6},
    {"slots": 22, "cache_policy": "learned", "draft": "ngram", **FEW},
    {"slots": 112, "threads": 3, **FEW},
    {"slots": 100, "cache_policy": "learned", **NO_PREFETCH, "draft": "ngram", **FEW},
    {"draft": "ngram", "session": True, **FEW},
]
HEAVY = [
    {"slots": 56, **NO_PREFETCH, "session": True},
    {"slots": 30, "cache_policy": "lru", "session": True},
    {"slots": 40, "kernels": "torch", "cache_policy": "lru"},
]
WAYS += [pytest.param(way, marks=pytest.mark.full) for way in HEAVY]


def texts(runtime, together, count=12):
    """Ids and log-probabilities behind each prompt, all at once or one after the other."""
    options = {"max_new_tokens": count, "temperature": 0.7, "seed": 5, "top_logprobs": 2}
    if together:
        streams = runtime.generate_all(PROMPTS, **options)
    else:
        streams = (runtime.generate(prompt, **options) for prompt in PROMPTS)
    return [[(token.id, token.logprob, token.likeliest) for token in text] for text in streams]


@cache
def wanted(export, kernels):
    """Logits, and texts alone, with every expert in memory."""
    with Runtime.open(export, context=256, kernels=kernels) as runtime:
        return runtime.logits(IDS), texts(runtime, together=False)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_sample(sample_export, always_guessing, eager, tmp_path, way):
    options = {name: value for name, value in way.items() if name != "session"}
    logits, alone = wanted(sample_export, options.get("kernels", "auto"))
    count = 12 if "draft" in way else 6  # only what repeats is drafted
    how, alone = ("sequences" in way, count), [text[:count] for text in alone]
    with Runtime.open(sample_export, context=256, **options) as runtime:
        if "session" in way:
            runtime.keep_in(tmp_path)
        assert torch.equal(runtime.logits(IDS), logits)
        assert texts(runtime, *how) == alone
        if runtime.stats()["kernels"] != "torch":  # a row has the same bits alone or among others
            runtime.engine.empty()
            assert torch.equal(decode(runtime, IDS[:45], IDS[45:]), logits[44:])
        stats = runtime.stats()
        assert "slots" not in way or stats["cache"]["misses"] > 0
        assert ("prefetch" in stats) == ("slots" in way and "prefetch" not in way)
        assert ("draft" not in way) or stats["drafts"]["drafted"] > 0
        whole(runtime)
    if "session" in way:
        with Runtime.open(sample_export, context=256, **options) as runtime:
            runtime.keep_in(tmp_path)
            again = texts(runtime, *how)
            assert runtime.stats()["sessions"]["restored_tokens"] > 100
            assert again == alone
