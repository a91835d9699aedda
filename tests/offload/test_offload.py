"""What a Runtime refuses and reuses; memory inside the budget."""

import json
import subprocess
import sys

import pytest

from slotmoe.errors import ConfigError, PlanError
from slotmoe.offload.engine import loading
from slotmoe.offload.runtime import Runtime
from slotmoe.sizes import parse_size
from tests.support.engine import IDS, until


def test_sizes():
    sizes = {"8GiB": 8 << 30, "7.5GB": 7_500_000_000, 123: 123, "64 k": 65536}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "8XB", "-1GiB", "GiB", "1e9", "nan", "9" * 40, 0, True):
        with pytest.raises(PlanError, match="size"):
            parse_size(text)


OPTIONS = [
    ({"slots": 5}, "at least 6"),
    ({"context": 5000}, "max_position_embeddings"),
    ({"context": 0}, "max_position_embeddings"),
    ({"vram": "1GiB", "device": "cpu"}, "--vram"),
    ({"cache_policy": "magic"}, "lru"),
    ({"threads": 0}, "threads"),
    ({"device": "tpu"}, "tpu"),
]
PROMPTS = [
    ([5] * 256, PlanError, "context"),
    ([5, 99999], ConfigError, "vocabulary"),
    ([], ConfigError, "empty"),
]


def test_what_is_impossible_is_refused(sample_export, runtime, monkeypatch):
    for options, message in OPTIONS:
        with pytest.raises(ValueError, match=message):
            Runtime.open(sample_export, **{"context": 256, **options})
    for ids, kind, message in PROMPTS:
        with pytest.raises(kind, match=message):
            runtime.generate(ids)
    assert len(list(runtime.generate([5] * 254, 50))) == 2  # stops where the context ends
    monkeypatch.setattr(loading, "load", lambda: None)
    with pytest.raises(ConfigError, match="learned needs the native kernels"):
        Runtime.open(sample_export, cache_policy="learned")


@pytest.fixture(scope="module")
def runtime(sample_export):
    with Runtime.open(sample_export, context=256, threads=1) as runtime:
        yield runtime


def test_a_shared_beginning_is_not_fed_again(runtime):
    """Logits are those of feeding all anew, by what is generated from them."""
    if runtime.stats()["kernels"] == "torch":
        pytest.skip("the native kernels were not built")

    def fed():
        tokens = runtime.stats()["tokens"]
        return tokens["prefill_tokens"] + tokens["decode_tokens"]

    def feeds(ids, *counts):
        before = fed()
        (found,) = runtime.generate(ids, 1)
        assert fed() - before in counts
        wanted_V = runtime.logits(ids)[-1, : runtime.tokenizer.size]
        assert found.id == wanted_V.argmax()
        assert found.logprob == float(wanted_V.max() - wanted_V.logsumexp(dim=-1))

    answer = [token.id for token in runtime.generate(IDS, 20)]
    # The next message of a conversation; the answer's last token was never fed.
    feeds(IDS + answer + [7, 8, 9], 4)
    feeds(IDS, 1)  # the same prompt again
    feeds([*IDS[:30], 77, *IDS[31:50]], 20)
    feeds(IDS, 30)  # what came after position 30 is gone
    feeds([9, *IDS], 61)
    tokens = runtime.generate(IDS, 100)
    answer = [next(tokens).id for _ in range(10)]
    tokens.close()  # what an interrupted answer fed is kept, perhaps more than was seen of it
    until(lambda: not runtime.engine.batch.running)
    feeds(IDS + answer + [7, 8], 2, 3)


_PEAK = """
import json, sys
from slotmoe.offload.runtime import Runtime
export, ram = sys.argv[1:]
with Runtime.open(export, ram=int(ram), context=1024) as runtime:
    list(runtime.generate([5, 9, 300] * 300, 100))
    list(runtime.generate([7] * 500, 20))
    stats = runtime.stats()
print(json.dumps(stats["memory"] | stats["cache"]))
"""


@pytest.mark.usefixtures("processes")
def test_peak_memory_stays_inside_the_budget(sample_export):
    """The smallest budget that the planner accepts, as a process of its own says, and room for
    about half of the experts."""

    def run(ram):
        command = [sys.executable, "-c", _PEAK, sample_export, str(ram)]
        return subprocess.run(command, capture_output=True, text=True)

    least = run(1 << 20).stderr.split("needs at least ")[1].split(" of ram")[0]
    budget = parse_size(least) + (3 << 20)
    memory = json.loads(run(budget).stdout)
    assert memory["peak_rss"] <= budget
    assert memory["slots"] < 224
    assert memory["evictions"] > 0
