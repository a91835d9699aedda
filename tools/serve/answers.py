"""Between HTTP and the batch: one request's answers, and what the server knows about itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from slotmoe.model.answer import Answer, Grammar, Piece
from slotmoe.model.generate import Sampling
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.scheduler import Batch, Job, QueueFullError
from slotmoe.tools.serve.forms import Calling, RefusedError, Turn
from slotmoe.tools.serve.grammar import Grammars
from slotmoe.tools.serve.tool_calls import Dialect

MAX_SCORES = 100_000  # log-probabilities of prompts' tokens and their alternatives in one request
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Service:
    """An open model that answers under ``name``, and its figures for ``/metrics`` and
    ``/stats``."""

    def __init__(self, runtime: Runtime, batch: Batch, name: str):
        self.runtime, self.batch, self.name = runtime, batch, name
        self.tokenizer, self.created = runtime.tokenizer, int(time.time())
        self.dialect = Dialect(runtime.tokenizer)
        self.grammars = Grammars(runtime.tokenizer, runtime.eos_token_ids, self.dialect)
        self.refused = 0
        self.registry = CollectorRegistry()
        self.queue_seconds = Histogram(
            "slotmoe_queue_seconds",
            "From request to place",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_seconds = Histogram(
            "slotmoe_first_token_seconds",
            "From request to first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.answer_seconds = Histogram(
            "slotmoe_answer_seconds",
            "From request to the end of the answer",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(self)

    def known(self, model: str) -> None:
        """Raises ``RefusedError`` unless ``model`` is what this server serves."""
        if model != self.name:
            raise RefusedError(
                f"the model {model!r:.80} is not here; this server has {self.name!r}",
                404,
                "model",
                "model_not_found",
            )

    def chat(self, turns: list[Turn], calling: Calling | None) -> list[int]:
        """Token ids of a conversation through the model's template, which takes a child process its
        time."""
        return self.tokenizer.encode(self.dialect.prompt(turns, calling))

    def observe(self, job: Job) -> None:
        """Note how long an answer that has ended took."""
        now = time.monotonic()
        if job.first:
            self.queue_seconds.observe(job.started - job.submitted)
            self.first_seconds.observe(job.first - job.submitted)
        self.answer_seconds.observe(now - job.submitted)

    def stats(self) -> dict[str, Any]:
        """What the page shows: counts and bytes now."""
        totals, stats, plan = self.batch.totals, self.runtime.stats(), self.runtime.plan
        memory = {
            tier: {"used": used, "parts": parts}
            for tier, (used, parts) in self.runtime.memory_in_use().items()
        }
        memory[plan.tier]["budget"] = plan.budget
        return {
            "model": self.name,
            "context": self.runtime.context,
            "running": self.batch.running,
            "queued": self.batch.queued,
            "answer_tokens": totals.answer_tokens,
            "prompt_tokens": totals.prompt_tokens,
            "reused_tokens": totals.reused_tokens,
            "cache": stats["cache"],
            "io": stats["io"],
            "memory": memory,
            "kernels": stats["kernels"],
        }

    def collect(self) -> Iterable[Metric]:
        """Prometheus' view of the same."""
        totals, stats, found = self.batch.totals, self.stats(), list[Metric]()

        def counter(
            name: str, text: str, values: dict[str, float], label: str | None = None
        ) -> None:
            metric = CounterMetricFamily(f"slotmoe_{name}", text, labels=[label] if label else [])
            for key, value in values.items():
                metric.add_metric([key] if label else [], value)
            found.append(metric)

        def gauge(name: str, text: str, value: float) -> None:
            found.append(GaugeMetricFamily(f"slotmoe_{name}", text, value))

        tokens = {
            "prompt": totals.prompt_tokens,
            "reused": totals.reused_tokens,
            "answer": totals.answer_tokens,
        }
        counter(
            "tokens",
            "Tokens computed, and those of prompts that were cached",
            {k: float(v) for k, v in tokens.items()},
            "kind",
        )
        counter(
            "answers",
            "Answers by how they ended",
            {key: float(value) for key, value in totals.finished.items()},
            "finish",
        )
        counter("refused", "Requests refused because the queue was full", {"": float(self.refused)})
        counter("steps", "Passes of the batch", {"": float(totals.steps)})
        cache = stats["cache"]
        counter(
            "expert_lookups",
            "Experts asked for",
            {"hit": float(cache["hits"]), "miss": float(cache["misses"])},
            "result",
        )
        counter(
            "read_bytes",
            "Bytes that came from each slower tier",
            {k: float(v["bytes"]) for k, v in stats["io"].items()},
            "tier",
        )
        gauge("running", "Answers under way", stats["running"])
        gauge("queued", "Answers that wait for a place", stats["queued"])
        gauge("expert_hit_rate", "Share of experts that were in a slot", cache["hit_rate"] or 0.0)
        memory = GaugeMetricFamily("slotmoe_memory_bytes", "Memory in use by tier", labels=["tier"])
        for tier, values in stats["memory"].items():
            memory.add_metric([tier], values["used"])
        found.append(memory)
        gauge("memory_budget_bytes", "Budget of the fast tier", self.runtime.plan.budget)
        return found


class Answers:
    """The answers of one request: ``prompts`` times ``choices``, in the batch until they end or
    ``leave`` is called.

    ``grammar`` makes the mask of each; ``shown`` are special tokens that appear in the text.  Where
    ``scored``, the prompts' own tokens and their log-probabilities are in ``jobs[i].answer.read``
    from the first piece on. Made inside the event loop.  Raises ``RefusedError``: 400 where a
    prompt does not fit, 429 where the queue is full.
    """

    def __init__(
        self,
        service: Service,
        owner: str,
        prompts: list[list[int]],
        sampling: Sampling,
        limit: int | None,
        choices: int = 1,
        stop: tuple[str, ...] = (),
        logprobs: int | None = None,
        grammar: Callable[[], Grammar] | None = None,
        shown: Mapping[int, str] | None = None,
        scored: bool = False,
    ):
        self._service, self._loop = service, asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self.jobs: list[Job] = []
        if scored:
            _scorable(service, prompts, choices, logprobs or 0)
        for prompt in prompts:
            most = _room(service, prompt, limit)
            for choice in range(choices):
                seed = None if sampling.seed is None else (sampling.seed + choice) % (1 << 63)
                own = replace(sampling, seed=seed)
                rules = grammar() if grammar is not None else None
                answer = Answer(
                    prompt,
                    service.tokenizer,
                    service.runtime.eos_token_ids,
                    own,
                    most,
                    stop,
                    logprobs,
                    rules,
                    shown,
                )
                self.jobs.append(Job(prompt, answer, self._emitter(len(self.jobs)), owner, scored))
        try:
            service.batch.submit(self.jobs)
        except QueueFullError:
            if not service.batch.alive:
                raise RefusedError("the model has failed; the server is ending", 503) from None
            service.refused += 1
            raise RefusedError(
                "too many answers are waiting; try again later", 429, code="rate_limit_exceeded"
            ) from None
        self.prompt_tokens = sum(len(prompt) for prompt in prompts)

    def _emitter(self, index: int) -> Any:
        def emit(piece: Piece) -> None:
            if piece.finish is not None:
                self._service.observe(self.jobs[index])
            try:
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))
            except RuntimeError:  # the loop has ended, and with it whoever would read this
                self.leave()

        return emit

    def leave(self) -> None:
        """Nobody wants these answers any more; their places are free within one step."""
        for job in self.jobs:
            job.cancelled = True

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(choice, piece) as they are made, until all have ended.  Raises ``RefusedError`` if the
        model failed."""
        left = len(self.jobs)
        while left:
            index, piece = await self._pieces.get()
            if piece.finish in ("error", "refused"):
                self.leave()
                raise RefusedError(piece.error, 500 if piece.finish == "error" else 400)
            left -= piece.finish is not None
            yield index, piece

    async def whole(self) -> list[list[Piece]]:
        """All pieces of each choice."""
        found: list[list[Piece]] = [[] for _ in self.jobs]
        async for index, piece in self.pieces():
            found[index].append(piece)
        return found

    def usage(self) -> dict[str, Any]:
        """Token counts in OpenAI's form."""
        made = sum(len(job.answer.ids) for job in self.jobs)
        cached = sum(job.reused for job in self.jobs)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": min(cached, self.prompt_tokens)},
        }


def _room(service: Service, prompt: list[int], limit: int | None) -> int:
    """The most tokens of an answer to ``prompt``: ``limit``, or what the context has room for, if
    that is less."""
    context, vocabulary = service.runtime.context, service.runtime.config.vocab_size
    if not prompt:
        raise RefusedError("the prompt is empty", param="prompt")
    if any(one >= vocabulary for one in prompt):
        raise RefusedError(
            f"a token id of the prompt is outside 0 to {vocabulary - 1}, the model's vocabulary",
            param="prompt",
        )
    room = context - len(prompt)
    if room < (0 if limit == 0 else 1):
        raise RefusedError(
            f"the context holds {context} tokens, the prompt has {len(prompt)}. Shorten it, or start the server with --context",
            code="context_length_exceeded",
        )
    return room if limit is None else min(limit, room)


def _scorable(service: Service, prompts: list[list[int]], choices: int, likeliest: int) -> None:
    """Raises ``RefusedError`` unless the prompts' log-probabilities can be told."""
    told = sum(len(prompt) for prompt in prompts) * choices * (1 + likeliest)
    if told > MAX_SCORES:
        raise RefusedError(
            f"echo with logprobs would tell {told} log-probabilities, more than {MAX_SCORES} in one request",
            param="logprobs",
        )
    if any(one >= service.tokenizer.size for prompt in prompts for one in prompt):
        raise RefusedError(
            f"a token id of the prompt is outside 0 to {service.tokenizer.size - 1}, those that are text",
            param="prompt",
        )
