"""The open model that ``slotmoe serve`` answers with, and its figures."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from slotmoe.errors import informs
from slotmoe.jsonfile import Json
from slotmoe.model.sampling import OWN_SETTINGS, Sampling
from slotmoe.offload.engine.requests import Request as Job
from slotmoe.offload.model_cache import timestamp
from slotmoe.offload.observe.profiler import memory_in_use
from slotmoe.offload.runtime import Runtime
from slotmoe.tools.serve.errors import RefusedError, shutting_down
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.grammar import Grammars, Mask
from slotmoe.tools.serve.requests import Conversation, Rule, ToolPolicy

T = TypeVar("T")
_TOKENS = ("prompt_tokens", "reused_tokens", "answer_tokens")
_TIMES = {"queue": "its first step", "first_token": "first token", "answer": "the answer's end"}
_LOOK_SECONDS = 0.1  # after which it is seen that a client has left
_asking: ContextVar[Request] = ContextVar("asking")
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # of the histograms


class Service:
    """An open model that answers under each of ``names`` (``*`` is any), ``sequences`` requests at
    once; ``waiting`` more may queue.  What a request does not say of its ``sampling`` is as there.
    ``ended`` is called when the model fails."""

    def __init__(
        self,
        runtime: Runtime,
        names: Sequence[str],
        sequences: int,
        waiting: int,
        sampling: Sampling,
        ended: Callable[[], None] = lambda: None,
    ):
        self.runtime, self.engine, self.sampling = runtime, runtime.engine, sampling
        self._names, self.listed = names, [name for name in names if name != "*"]
        self.name = self.listed[0]
        self._batch = self.engine.batch
        self._batch.at_once, self.engine.ended = sequences, ended
        self._limit, self._open = sequences + waiting, set[Job]()
        self._is_ending, self._preparing = False, set[asyncio.Future[Any]]()
        # Each child computes for one request after the other; who waits for it needs no thread.
        self._templates, self._compiling = asyncio.Lock(), asyncio.Lock()
        self.tokenizer, self.created = runtime.tokenizer, int(time.time())
        self.dialect = Dialect(runtime.tokenizer)
        self.grammars = Grammars(runtime.tokenizer, runtime.eos_token_ids, self.dialect)
        self.refused = 0  # requests, because the queue was full
        self.registry = CollectorRegistry()
        about: Json = {"buckets": _SECONDS, "registry": self.registry}
        self._times = {
            name: Histogram(f"slotmoe_{name}_seconds", f"From request to {text}", **about)
            for name, text in _TIMES.items()
        }
        self.registry.register(self)

    def check_model(self, model: str | None) -> None:
        """Raises ``RefusedError`` unless ``model`` is None or a name of this server."""
        known = {model, model and model.removesuffix(":latest"), "*"}  # Ollama's tag
        if model is not None and known.isdisjoint(self._names):
            problem = f"the model {model!r:.80} is not here; this server has {self.name!r}"
            raise RefusedError(problem, "model", 404, "model_not_found")

    @property
    def vocabulary(self) -> int:
        """How many ids are text as well as rows of the model: either may have more."""
        return min(self.tokenizer.size, self.runtime.config.vocab_size)

    def encode(self, text: str, add_bos: bool = True, suffix: str | None = None) -> list[int]:
        """Token ids of a prompt, the answer to which goes before a ``suffix`` if there is one.
        Raises ``PlanError`` before it reads one that can't fit."""
        self.runtime.check_length(len(text) + len(suffix or ""))
        if suffix is not None:
            return self.tokenizer.encode_gap(text, suffix)
        return self.tokenizer.encode(text, add_bos)

    async def chat_text(self, chat: Conversation) -> str:
        """The conversation as the model reads it.  Raises a ``RefusedError``, ``ConfigError`` or
        ``PlanError``."""
        self.runtime.check_length(sum(len(message.text) for message in chat.messages))
        return await self.prepare(self.dialect.prompt, chat, turn=self._templates)

    async def chat_ids(self, chat: Conversation) -> list[int]:
        return await self.prepare(self.encode, await self.chat_text(chat))

    async def grammar(
        self, wanted: Rule | None, policy: ToolPolicy | None = None, is_thinking: bool | None = None
    ) -> Mask | None:
        """As ``Grammars.compile``; None where the answer is free."""
        if wanted is None and policy is None:
            return None
        asked = wanted, policy, is_thinking
        make = await self.prepare(self.grammars.compile, *asked, turn=self._compiling)
        return await self.prepare(make, turn=self._compiling)

    async def prepare(
        self, work: Callable[..., T], *given: object, turn: asyncio.Lock | None = None
    ) -> T:
        """``work`` of what is ``given``, in a thread, when it is the request's ``turn``.  Raises
        ``RefusedError`` as the server is to end, and when the client has left."""
        async with turn or nullcontext():
            await self._check_client()
            task = asyncio.ensure_future(asyncio.to_thread(work, *given))
            self._preparing.add(task)
            try:
                self._check_open()  # a signal that comes later finds the task
                while not (await asyncio.wait((task,), timeout=_LOOK_SECONDS))[0]:
                    await self._check_client()
                return task.result()
            except asyncio.CancelledError:
                self._check_open()
                raise
            finally:
                self._preparing.discard(task)
                task.cancel()

    async def _check_client(self) -> None:
        """Raises ``RefusedError`` where nobody waits for an answer."""
        request = _asking.get(None)
        if request is not None and await request.is_disconnected():
            raise RefusedError("the client has left", status=499)

    def submit(self, requests: Sequence[Job]) -> None:
        """Queue all of ``requests`` or none.  Raises ``RefusedError``."""
        self._check_open()
        if len(self._open) + len(requests) > self._limit:
            self.refused += 1
            problem = "too many answers are waiting; try again later"
            seconds = round(self._batch.seconds / self._batch.at_once)  # until one is likely free
            headers = {"retry-after": str(min(60, max(1, seconds)))}
            raise RefusedError(problem, None, 429, "rate_limit_exceeded", headers)
        self._open.update(requests)
        self.engine.submit(*requests)

    def _check_open(self) -> None:
        """Raises ``RefusedError`` where no answer can be given any more."""
        if self._is_ending:
            raise shutting_down()
        if not self.engine.alive:
            raise RefusedError("the server is ending, since the model has failed", status=503)

    def stop(self) -> None:
        """End every answer within a layer, and take no more.  A signal may call this."""
        self._is_ending = True
        for task in [*self._preparing]:
            task.get_loop().call_soon_threadsafe(task.cancel)
        for request in [*self._open]:
            request.cancel("shutdown")

    @property
    def running(self) -> int:
        """Answers that have a sequence."""
        return min(len(self._batch.running), len(self._open))

    @property
    def queued(self) -> int:
        """Answers that wait for one."""
        return len(self._open) - self.running

    @property
    def reading(self) -> Json:
        """How many prompts are being read, their tokens, and those of them that are read."""
        jobs = [job for job in [*self._open] if job.started and not job.first_token]
        tokens, read = sum(len(job.prompt) for job in jobs), sum(job.read for job in jobs)
        return {"prompts": len(jobs), "tokens": tokens, "read": read}

    @informs
    def observe(self, request: Job) -> None:
        """Note the times of an answer that has ended."""
        self._open.discard(request)
        if request.first_token:
            self._times["queue"].observe(request.started - request.submitted)
            self._times["first_token"].observe(request.first_token - request.submitted)
        self._times["answer"].observe(time.monotonic() - request.submitted)

    def described(self, name: str) -> Json:
        """The model in OpenAI's list of models, and in Anthropic's."""
        about = {"id": name, "object": "model", "created": self.created}
        about |= {"owned_by": "slotmoe", "max_model_len": self.runtime.context}
        about |= {"type": "model", "display_name": name, "created_at": timestamp(self.created)}
        return {**about, "lifecycle": "active", "max_input_tokens": self.runtime.context}

    @property
    def own_settings(self) -> Json:
        return {name: getattr(self.sampling, name) for name in OWN_SETTINGS}

    def stats(self) -> Json:
        """Counts and bytes now; memory is by tier."""
        totals, stats, plan = self._batch.totals, self.runtime.stats(), self.runtime.plan
        tiers = memory_in_use(self.runtime.model).items()
        memory = {tier: {"used": used, "parts": parts} for tier, (used, parts) in tiers}
        memory[plan.tier] |= {"budget": plan.budget}
        return {
            **{"model": self.name, "context": self.runtime.context, "memory": memory},
            "sampling": self.own_settings,
            **{"running": self.running, "queued": self.queued, "reading": self.reading},
            **{name: getattr(totals, name) for name in _TOKENS},
            **{name: stats[name] for name in ("cache", "io", "kernels", "drafts")},
            **{name: stats[name] for name in ("sessions",) if name in stats},
        }

    def collect(self) -> Iterable[Metric]:
        """The same for Prometheus, which calls this."""
        totals, stats = self._batch.totals, self.stats()
        tokens = {name.removesuffix("_tokens"): stats[name] for name in _TOKENS}
        lookups = {"hit": stats["cache"]["hits"], "miss": stats["cache"]["misses"]}
        reads = {tier: values["bytes"] for tier, values in stats["io"].items()}
        drives = {
            name: {str(n): drive[name] for n, drive in enumerate(stats["io"]["disk"]["drives"])}
            for name in ("bytes", "seconds", "failed")
        }
        used = {tier: values["used"] for tier, values in stats["memory"].items()}
        sessions, drafts = stats.get("sessions", {}), stats["drafts"]
        restored = sessions.get("restored_tokens", 0)
        rows = {kind: count for kind, count in drafts.items() if isinstance(count, int)}
        moved = {name: sessions[f"{name}_bytes"] for name in ("read", "written") if sessions}
        counters = (
            ("tokens", "Tokens computed, and of prompts reused", "kind", tokens),
            ("answers", "Answers by how they ended", "finish", totals.finished),
            ("refused", "Requests refused: the queue was full", None, self.refused),
            ("steps", "Steps of the batch", None, totals.steps),
            ("decode", "Passes, their rows, and of these drafted and accepted", "kind", rows),
            ("expert_lookups", "Experts asked for", "result", lookups),
            ("read_bytes", "Bytes read from each slower tier", "tier", reads),
            ("drive_read_bytes", "Bytes read by drive", "drive", drives["bytes"]),
            ("drive_read_seconds", "Seconds with reads", "drive", drives["seconds"]),
            ("session_tokens", "Tokens of prompts from disk", None, restored),
            ("session_io_bytes", "Bytes of sessions read and written", "kind", moved),
            ("session_damaged", "Damaged blocks", None, sessions.get("damaged", 0)),
        )
        hit_rate, budget = stats["cache"]["hit_rate"] or 0.0, self.runtime.plan.budget
        gauges = (
            ("drive_failed", "Whether it is left out", "drive", drives["failed"]),
            ("session_bytes", "Bytes of sessions on disk", None, sessions.get("bytes", 0)),
            ("running", "Answers under way", None, stats["running"]),
            ("queued", "Answers that wait", None, stats["queued"]),
            ("reading", "Prompts being read, their tokens, those read", "kind", stats["reading"]),
            ("expert_hit_rate", "Share of experts that were in a slot", None, hit_rate),
            ("memory_bytes", "Memory in use by tier", "tier", used),
            ("memory_budget_bytes", "Budget of the fast tier", None, budget),
        )
        for kind, rows_ in ((CounterMetricFamily, counters), (GaugeMetricFamily, gauges)):
            for name, text, label, values in rows_:
                metric = kind(f"slotmoe_{name}", text, labels=[label] if label else [])
                for key, value in values.items() if isinstance(values, dict) else [("", values)]:
                    metric.add_metric([key] if label else [], float(value))
                yield metric


async def _service(request: Request) -> Service:
    _asking.set(request)
    service: Service = request.app.state.service
    return service


Serving = Annotated[Service, Depends(_service)]  # of a route
