"""Budgets and the plan, traces, long prompts, and what a Runtime refuses and reuses."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from bench.replay import read_trace
from slotmoe.errors import ConfigError, PlanError
from slotmoe.offload.runtime import Runtime
from slotmoe.sizes import parse_size
from tests.support.engine import IDS, decode, start, until, whole


def test_decode_equals_prefill_in_the_quantized_path(sample_export):
    """And experts that a prompt brought stay, where all have room."""
    with Runtime.open(sample_export, context=256) as runtime:
        wanted = runtime.logits(IDS)
        missed = runtime.stats()["cache"]["misses"]
        alone = decode(runtime, runtime.engine.empty() + IDS[:1], IDS[1:])
        assert ((alone - wanted).abs() / wanted.abs().clamp(min=1e-3)).median() <= 2e-3
        if runtime.stats()["kernels"] != "torch":  # a row has the same bits alone or among others
            assert torch.equal(alone, wanted)
        step = start(runtime)
        chunks = torch.cat([step(IDS[:23]), step(IDS[23:])])
        torch.testing.assert_close(chunks, wanted[[22, 59]], rtol=1e-3, atol=1e-3)
        runtime.logits(IDS)
        assert missed > 0 and runtime.stats()["cache"]["misses"] == missed


def test_a_trace_of_a_long_prompt_is_that_of_one_step(sample_export, tmp_path, monkeypatch):
    traces = []
    for size in (512, 16):
        monkeypatch.setattr("slotmoe.offload.engine.loading.PREFILL_CHUNK", size)
        with Runtime.open(sample_export, context=64, slots=100) as runtime:
            runtime.trace(tmp_path / "trace")
            with pytest.raises(PlanError):
                runtime.logits(IDS * 2)
            runtime.logits(IDS)
            start(runtime)([7])
        header, steps = read_trace(tmp_path / "trace")
        assert header["layers"] == list(range(1, 8))
        assert [step.indices.shape for step in steps] == [(60, 7, 6), (1, 7, 6)]
        traces.append(steps)
    for at_once, in_steps in zip(*traces, strict=True):
        assert all(map(np.array_equal, at_once, in_steps))
    (tmp_path / "cut").write_bytes((tmp_path / "trace").read_bytes()[:-3])
    with pytest.raises(ConfigError, match="cut off"):
        read_trace(tmp_path / "cut")


# Sizes and refusals

SIZES = {"8GiB": 8 << 30, "7.5GB": 7_500_000_000, "512MiB": 512 << 20, 123: 123, "64 k": 65536}


def test_sizes():
    assert {text: parse_size(text) for text in SIZES} == SIZES
    for text in ("", "8XB", "-1GiB", "GiB", "1e9", "nan", "9" * 40, 0, True):
        with pytest.raises(PlanError, match="size"):
            parse_size(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 5}, "at least 6"),
        ({"context": 5000}, "max_position_embeddings"),
        ({"context": 0}, "max_position_embeddings"),
        ({"vram": "1GiB", "device": "cpu"}, "--vram"),
        ({"cache_policy": "magic"}, "lru"),
        ({"threads": 0}, "threads"),
        ({"device": "tpu"}, "tpu"),
    ],
    ids=str,
)
def test_impossible_requests_are_refused(sample_export, options, message):
    with pytest.raises(ValueError, match=message):
        Runtime.open(sample_export, **{"context": 256, **options})


def test_prompts_that_do_not_fit(sample_export):
    with Runtime.open(sample_export, context=32) as runtime:
        for ids, kind, message in (
            ([5] * 32, PlanError, "context"),
            ([5, 99999], ConfigError, "vocabulary"),
            ([], ConfigError, "empty"),
        ):
            with pytest.raises(kind, match=message):
                runtime.generate(ids)
        assert len(list(runtime.generate([5] * 30, 50))) == 2  # stops where the context ends


# What is cached of a prompt is not fed again


@pytest.fixture(scope="module")
def reusing(sample_export):
    """A runtime, and what checks that logits after ``ids`` need so many tokens to be fed and are
    those of feeding all anew, by what is generated from them."""
    with Runtime.open(sample_export, context=256, threads=1) as runtime:
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

        yield runtime, feeds


OTHER = [*IDS[:30], 77, *IDS[31:50]]


def test_a_shared_beginning_is_not_fed_again(reusing):
    runtime, feeds = reusing
    answer = [token.id for token in runtime.generate(IDS, 20)]
    assert len(answer) == 20
    # The next message of a conversation; the answer's last token was never fed.
    feeds(IDS + answer + [7, 8, 9], 4)
    feeds(IDS, 1)  # the same prompt again
    feeds(OTHER, 20)
    feeds(IDS, 30)  # what came after position 30 is gone
    feeds([9, *IDS], 61)
    tokens = runtime.generate(IDS, 100)
    answer = [next(tokens).id for _ in range(10)]
    tokens.close()  # what an interrupted answer fed is kept, perhaps more than was seen of it
    until(lambda: not runtime.engine.batch.running)
    feeds(IDS + answer + [7, 8], 2, 3)
    list(runtime.generate(IDS, 5))
    start(runtime, depth=40)(IDS[:1])  # a measurement leaves nothing to reuse
    feeds(IDS, len(IDS))


def test_a_pass_that_fails_half_way_is_not_reused(reusing, monkeypatch):
    """In its fourth MoE layer: layers before it have overwritten rows that the others still
    hold."""
    runtime, feeds = reusing
    list(runtime.generate(IDS, 20))
    kind, calls = type(runtime.model.network.experts), []
    original = kind.__call__

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError
        return original(*arguments)

    monkeypatch.setattr(kind, "__call__", failing)
    with pytest.raises(MemoryError):
        list(runtime.generate(OTHER, 1))
    feeds(IDS, 30)


# Memory

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


# Long prompts


@pytest.fixture
def reading_ahead(monkeypatch):
    """As if records were worth reading ahead."""
    for module in ("engine.loading", "experts.disk"):
        monkeypatch.setattr(f"slotmoe.offload.{module}.HELP_BYTES", 0)


@pytest.mark.usefixtures("heavy", "reading_ahead")
def test_a_long_prompt_reads_each_expert_once_and_changes_no_logit(sample_export, monkeypatch):
    ids = torch.randint(2, 4000, (1000,), generator=torch.Generator().manual_seed(3)).tolist()
    logits = []
    for chunk in (512, 1024):
        chosen = "slotmoe.offload.plan.memory._prefill_chunk"
        monkeypatch.setattr(chosen, lambda *_, chunk=chunk: chunk)
        with Runtime.open(sample_export, context=1024, slots=100) as runtime:
            logits.append(runtime.logits(ids))
            everything = 224 * runtime.plan.record_bytes
            read = runtime.stats()["io"]["disk"]["bytes"]
            assert torch.equal(logits[-1], runtime.logits(ids))
            twice = runtime.stats()["io"]["disk"]["bytes"]
            whole(runtime)
        if chunk == 1024:
            assert read == everything and twice < 2 * everything
        else:
            assert read > 1.4 * everything
    assert torch.equal(*logits)


def test_a_long_prompt_may_end_at_any_gate(sample_export, monkeypatch, reading_ahead):
    """Also between a layer's steps; the next pass computes what it would have computed."""
    monkeypatch.setattr("slotmoe.offload.engine.loading.PREFILL_CHUNK", 16)
    with Runtime.open(sample_export, context=64, slots=100) as runtime:
        wanted, layers = runtime.logits(IDS), len(runtime.config.moe_layers)
        for last in range(0, 4 * layers, 5):
            gates = iter([None] * last)

            def fail(route, gates=gates):
                if next(gates, route) is route:
                    raise MemoryError

            stop = runtime.model.experts.on_layer(fail)
            with pytest.raises(MemoryError):
                runtime.logits(IDS)
            stop()
            whole(runtime)
            assert runtime.engine.batch.sequences[0].length == 0
            assert torch.equal(runtime.logits(IDS), wanted)


def test_what_was_read_ahead_is_admitted_in_place_of_what_is_not_pinned(sample_export):
    with Runtime.open(sample_export, context=64, slots=40) as runtime:
        runtime.warm()
        slots = runtime.model.experts.slots
        for expert_id in (100, 101):
            slots.prefetch(expert_id, urgency=1)
            slots.wait([slots.store.of[expert_id].read])
        (demand,) = slots.demand([102])
        slots.wait([demand])
        slots.store.held_N[2:102] = True
        slots.admit_guesses()
        slots.store.held_N[2] = False
        slots.prefetch(103, urgency=1)
        slots.wait([slots.store.of[103].read])
        slots.demand([103])  # it had arrived as a guess, and is none any more
        slots.admit_guesses()
        assert 103 in slots
        assert slots.cache.cached == {*range(2, 40), 100, 101}
        slots.release()
        assert 102 not in slots and 103 not in slots
        whole(runtime)
