"""``Runtime``: an open model.

with Runtime.open("sample") as runtime:
    for token in runtime.generate("It is a truth universally acknowledged,", max_new_tokens=32):
        print(token.text, end="", flush=True)
"""

import os
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from slotmoe.errors import CLOSED, ConfigError, PromptError, check_types, informs
from slotmoe.jsonfile import Json
from slotmoe.model.chat import render_chat
from slotmoe.model.generate import Answer, Stops, Token
from slotmoe.model.sampling import Sampling
from slotmoe.offload.devices.cuda import choose_device
from slotmoe.offload.engine import requests
from slotmoe.offload.engine.engine import Engine
from slotmoe.offload.engine.loading import LoadedModel, Options, check_options, open_model
from slotmoe.offload.engine.requests import Messages, Stream, TextOptions
from slotmoe.offload.experts.experts import Route
from slotmoe.offload.ingest.cached import cached_export, resolve_model
from slotmoe.offload.ingest.output_dir import Notify, Progress, ignore
from slotmoe.offload.machine import cache_folder
from slotmoe.offload.model_cache import is_hub_id
from slotmoe.offload.observe import TraceWriter
from slotmoe.offload.plan.memory import or_more_context
from slotmoe.offload.sessions.store import DEFAULT_LIMIT, Sessions
from slotmoe.quant.export.layout import MANIFEST
from slotmoe.system import peak_rss

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ROWS_OF_TEXT = 128  # rows of logits made at once; a prefill pass takes a multiple of it


class Runtime(AbstractContextManager["Runtime"]):
    """An open model, for any number of threads: what they ask for goes to one engine, which answers
    as many texts at once as it was opened with ``sequences``.

    Ctrl-C while a thread waits for a text cancels that text.  After ``close``, and in a child that
    was forked, every use raises ``ConfigError``.
    """

    def __init__(self, model: LoadedModel):
        self.config, self.tokenizer, self.plan = model.config, model.tokenizer, model.plan
        self.eos_token_ids, self.sampling = model.generation
        self.device = model.device.device
        self._engine: Engine | None = Engine(model)
        self._trace: TraceWriter | None = None
        # No thread may compute when the process ends.
        self._end = weakref.finalize(self, _end, self._engine)

    @classmethod
    def open(
        cls,
        path: str | Path,
        device: str = "auto",
        vram: int | str | None = None,
        ram: int | str | None = None,
        context: int | None = None,
        threads: int | None = None,
        cache_policy: str | None = None,
        prefetch: bool = True,
        quantize: bool = True,
        *,
        slots: int | None = None,
        kernels: str = "auto",
        logits_rows: int = 1,
        sequences: int = 1,
        misses: str = "auto",
        experts_dirs: Sequence[str | Path] = (),
        draft: str = "auto",
        revision: str | None = None,
        progress: Progress | None = None,
        reading: Progress = ignore,
        arriving: Progress = ignore,
        notify: Notify = ignore,
    ) -> "Runtime":
        """Open an export, or a checkpoint folder, hub id or ``sample``, quantized once.

        ``ram`` and ``vram`` are budgets in bytes or like ``"8GiB"``; None takes what is free.
        ``context`` is the number of positions of the latent cache, None min(4096, the model's
        limit).  ``cache_policy`` is one of ``slotmoe.offload.policy.POLICIES``.
        ``prefetch=False`` reads experts only when a gate has chosen them.  ``quantize=False``
        computes a checkpoint as it is, all of it resident.  ``slots`` caps the experts in slots.
        ``kernels`` are as for ``slotmoe.quant.backends.pick_backend``.  There are ``sequences``
        latent caches, and ``logits_rows`` rows of logits alive at once.  ``misses`` says what
        computes an expert without a slot on a GPU: ``fetch``, the GPU; ``cpu``; ``hybrid``, both;
        ``auto``, what bandwidths advise.  ``experts_dirs`` are copies of ``experts`` elsewhere.
        ``draft``: docs/drafts.md.  ``revision`` is of a hub id, ``arriving`` of a download.  The
        others are as in ``cached_export``.

        Raises ``ConfigError``, ``CheckpointError``, ``ExportError`` or ``PlanError``.
        """
        options = Options(
            vram, ram, context, threads, cache_policy, prefetch, quantize, slots, kernels,
            logits_rows, sequences, misses, experts_dirs, draft,
        )  # fmt: skip
        check_types({"path": path}, {"path": str | Path})
        needs = "quantize=False needs the original checkpoint"
        if not quantize and is_hub_id(str(path)) and not Path(path).exists():
            raise ConfigError(f"{path}: {needs} in a folder; download it first")
        progress, reading = informs(progress or ignore), informs(reading)
        arriving, notify = informs(arriving), informs(notify)
        chosen, reason = choose_device(str(device), notify=notify)
        check = partial(check_options, options, chosen)
        told = {"arriving": arriving, "progress": progress, "notify": notify}
        folder = resolve_model(os.path.expanduser(path), revision, ready=check, **told)
        if (is_export := (folder / MANIFEST).is_file()) and not quantize:
            raise ConfigError(f"{folder}: is an export, already quantized; {needs}")
        if quantize and not is_export:
            folder = cached_export(folder, cache_folder(), progress, reading, notify, check)
        return cls(open_model(folder, options, chosen, reason, notify))

    def __repr__(self) -> str:
        if self._engine is None:
            return "<Runtime: closed>"
        model = self._engine.model
        name = f"{model.source.folder.name} on {model.device.name}"
        return f"<Runtime: {name}, context {self.context}>"

    def __reduce__(self) -> NoReturn:
        raise ConfigError("a Runtime can't be pickled or copied; open the model in each process")

    def logits(self, token_ids: list[int]) -> Tensor:
        """Teacher-forced logits from position 0 through the prefill path: float32 CPU [T,
        vocab_size].  This result is the caller's, beyond the budget, and as large as it says.

        Raises ``PlanError`` if the context is too small, ``ConfigError`` for an unknown id.
        """
        (ids, _), start = self.fit(token_ids), 0
        logits = torch.empty(len(ids), self.config.vocab_size)
        for rows_RV in self.logits_from(ids):
            logits[start : start + len(rows_RV)] = rows_RV
            start += len(rows_RV)
        return logits

    def next_logits(self, token_ids: list[int]) -> Tensor:
        """Logits of the token behind ``token_ids``: float32 CPU [vocab_size].  What a latent cache
        holds of them is not computed again.  Raises as ``logits`` does."""
        ids, _ = self.fit(token_ids)
        return self.engine.force(ids, keeps=True).logits[0].clone()  # that may be written to

    def logits_from(self, token_ids: list[int], first: int = 0) -> Iterator[Tensor]:
        """The rows of ``logits`` from ``first`` on, float32 [at most 128, V] a time, on the device.

        Memory grows with neither the tokens nor the vocabulary.  Pieces end at multiples of 128
        positions, so that those of two runtimes match.  Raises as ``logits`` does.
        """
        (ids, _), position = self.fit(token_ids), 0
        for hidden_TD in self.hidden(ids):
            for start in range(0, len(hidden_TD), _ROWS_OF_TEXT):
                if position + start + _ROWS_OF_TEXT > first:
                    rows_RD = hidden_TD[max(start, first - position) : start + _ROWS_OF_TEXT]
                    yield self.engine.call(partial(self.engine.batch.passes.logits, rows_RD))
            position += len(hidden_TD)

    def hidden(self, token_ids: list[int], at_once: int | None = None) -> Iterator[Tensor]:
        """The residual stream after the last layer, or several side by side, float32 [T, D] on the
        runtime's device, of ``at_once`` tokens at a time, by default of as many as a pass takes."""
        at_once = at_once or self.plan.prefill_chunk
        for start in range(0, len(token_ids), at_once):
            yield self.engine.hidden(token_ids[: start + at_once], start)

    def encode(self, text: str, chat: bool = False) -> list[int]:
        """Token ids of a prompt or, with ``chat``, of a user's message in the model's chat
        template.  Raises as ``check_length`` does."""
        check_types({"text": text}, {"text": str})
        self.check_length(len(text))
        message = {"role": "user", "content": text}
        return self.tokenizer.encode(render_chat(self.tokenizer, [message]) if chat else text)

    def check_length(self, characters: int) -> None:
        """Raise ``PromptError`` where no context can hold a text of so many ``characters``; to find
        out how many tokens a long text has takes seconds and memory."""
        context, longest = self.context, self.tokenizer.longest
        if characters > context * longest:
            held = f"the context holds {context} tokens of at most {longest} characters"
            advice = or_more_context("shorten the prompt", self.config, context)
            problem = f"the prompt has {characters} characters, and {held}; {advice}"
            raise PromptError(problem, -(-characters // longest))

    def generate(
        self,
        prompt: str | Sequence[int] | None = None,
        max_new_tokens: int | None = 128,
        temperature: float | None = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        chat: bool = False,
        messages: Messages | None = None,
        *,
        tools: Sequence[Json] | None = None,
        stop: str | Sequence[str] = (),
        top_logprobs: int = 0,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> Stream:
        """Continue ``prompt`` (text, or token ids used as they are) and yield each ``Token`` as it
        is made; any number of threads may ask at once.

        Stops at an end-of-sentence token, before one of the texts ``stop``, after
        ``max_new_tokens`` (None is no limit), or when the context is full; the last token's
        ``finish`` names the limit that ended the text.  ``top_logprobs`` likeliest ids are reported
        with each token.  ``chat`` sends the text through the chat template as a user's message;
        ``messages`` are a conversation in place of a prompt, and ``tools`` go with them, as the
        template expects both.  The engine goes on while nobody takes the tokens, until the text
        ends or the iterator is closed or forgotten.  At a temperature above 0, or None, each
        setting of sampling that is None is the model's own.  Raises ``ConfigError``, and
        ``PlanError`` if the prompt does not fit.
        """
        given = {"max_new_tokens": max_new_tokens, "chat": chat, "stop": stop, "tools": tools}
        check_types(given, TextOptions.__annotations__)
        if max_new_tokens is not None and max_new_tokens < 1:
            expected = "expected at least 1 (option -n)"
            raise ConfigError(f"max_new_tokens is {max_new_tokens}, {expected}")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise ConfigError(f"stop is {stop!r:.60}, expected texts that are not empty")
        chosen = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
        chosen |= {"min_p": min_p, "repetition_penalty": repetition_penalty}
        sampling = (Sampling() if temperature == 0 else self.sampling).with_given(**chosen)
        if (prompt is None) == (messages is None):
            raise ConfigError("give a prompt or messages, one of the two")
        if tools and messages is None:
            raise ConfigError("tools go with messages; give the prompt as one of those")
        if messages is not None:
            requests.check_messages(messages, tools)
            self.check_length(sum(len(str(message.get("content") or "")) for message in messages))
            functions = None if tools is None else [*tools]
            text = render_chat(self.tokenizer, [*messages], functions)
            prompt = self.tokenizer.encode(text)
        elif isinstance(prompt, str):
            prompt = self.encode(prompt, chat)
        ids, count = self.fit(prompt, max_new_tokens)
        answer = self._answer(ids, sampling, count, top_logprobs, Stops(stops))
        stream = Stream(ids, answer, "length" if count == max_new_tokens else "context")
        self.engine.submit(stream.request)
        return stream

    def _answer(
        self, ids: list[int], sampling: Sampling, count: int, top: int, stops: Stops | None = None
    ) -> Answer:
        """``count`` tokens behind ``ids``, each with its ``top`` likeliest.  ``ConfigError``."""
        check_types({"top_logprobs": top}, TextOptions.__annotations__)
        most = min(self.tokenizer.size, self.config.vocab_size)
        if not 0 <= top <= most:
            raise ConfigError(f"top_logprobs is {top}, expected 0 to {most}, the vocabulary")
        return Answer(ids, self.tokenizer, self.eos_token_ids, sampling, count, stops, top)

    def generate_all(
        self, prompts: Iterable[str | Sequence[int] | Messages], **options: "Unpack[TextOptions]"
    ) -> list[Stream]:
        """``generate`` of several prompts or conversations with the same ``options``: an iterator
        for each, in their order.  As many are computed together as there are ``sequences``."""
        if isinstance(prompts, str | bytes):
            problem = f"prompts is {prompts!r:.40}"
            raise ConfigError(f"{problem}, expected a list of them; generate takes a single one")
        return [
            self.generate(None, messages=prompt, **options)  # type: ignore[arg-type]
            if requests.is_conversation(prompt)
            else self.generate(prompt, **options)  # type: ignore[arg-type]
            for prompt in prompts
        ]

    async def stream(
        self,
        prompt: str | Sequence[int] | None = None,
        messages: Messages | None = None,
        **options: "Unpack[TextOptions]",
    ) -> AsyncIterator[Token]:
        """``generate`` for ``async for``; the event loop goes on meanwhile."""
        import asyncio

        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        stream = self.generate(prompt, messages=messages, **options)

        def wake() -> None:
            with suppress(RuntimeError):  # the loop has ended, so nothing reads this any more
                loop.call_soon_threadsafe(arrived.set)

        stream.wake.append(wake)
        try:
            while True:
                arrived.clear()
                for token in stream.ready():
                    yield token
                if stream.ended:
                    break
                await arrived.wait()
        finally:
            stream.close()

    def score(self, prompt: str | Sequence[int], top_logprobs: int = 0) -> list[Token]:
        """The tokens of ``prompt``, each with its log-probability behind those before it (None for
        the first) and ``top_logprobs`` likeliest ids.  Raises as ``generate`` does."""
        ids, _ = self.fit(self.encode(prompt) if isinstance(prompt, str) else prompt, scored=True)
        answer = self._answer(ids, Sampling(), 0, top_logprobs)
        stream = Stream(ids, answer, scored=True)
        self.engine.submit(stream.request)
        stream.read()
        return answer.read

    def fit(
        self, prompt: object, count: int | None = 0, scored: bool = False
    ) -> tuple[list[int], int]:
        """Token ids of ``prompt`` that the model can read, of one that is ``scored`` such as are
        text, and how many of ``count`` tokens behind them, at least one unless that is 0, have
        room; None is as many as have.  Raises ``ConfigError`` or ``PlanError``."""
        ids, context, size = requests.ids_of(prompt), self.context, self.config.vocab_size
        known = "the model's vocabulary"
        if scored and self.tokenizer.size < size:
            size, known = self.tokenizer.size, "those that are text"
        if not ids:
            raise ConfigError("the prompt is empty; give at least one token")
        if not 0 <= min(ids) <= max(ids) < size:
            raise ConfigError(f"a token id of the prompt is outside 0 to {size - 1}, {known}")
        room = context - len(ids)
        if room < (0 if count == 0 else 1):
            advice = or_more_context("shorten the prompt", self.config, context)
            held = f"the context holds {context}: {advice}"
            raise PromptError(f"the prompt has {len(ids)} tokens and {held}", len(ids))
        return ids, room if count is None else min(count, room)

    def keep_in(
        self, folder: str | Path, limit: int | str = DEFAULT_LIMIT, notify: Notify = ignore
    ) -> None:
        """Keep the latents of texts in ``folder`` from now on, at most ``limit`` bytes of them, and
        compute nothing again that is there of a prompt.  ``notify`` gets a line where a file is
        damaged or can't be written.  Raises ``ConfigError`` or ``PlanError``."""
        sessions = Sessions(self.model, Path(folder), limit, notify)
        self.engine.call(lambda: setattr(self.engine.batch, "sessions", sessions))

    @property
    def engine(self) -> Engine:
        """What computes.  Raises ``ConfigError`` after ``close`` and in a forked child."""
        if self._engine is None:
            raise ConfigError(CLOSED)
        self._engine.check()
        return self._engine

    @property
    def sessions(self) -> Sessions | None:
        """Where latents are kept on disk; None until ``keep_in``."""
        return self.engine.batch.sessions

    @property
    def model(self) -> LoadedModel:
        """The open model's parts.  Raises ``ConfigError`` after ``close`` and in a forked child."""
        return self.engine.model

    @property
    def context(self) -> int:
        """Positions that a latent cache has room for."""
        return self.plan.context

    @property
    def threads(self) -> int:
        """CPU threads in use."""
        return self.model.cpu.threads

    def warm(self, progress: Progress | None = None, wait: bool = True) -> None:
        """Fill the free expert slots by layer, below a GPU RAM first: what follows is measured
        without first reads.  Without ``wait`` that goes on behind all else, texts included."""
        experts = self.model.experts
        fill = partial(experts.fill, informs(progress or ignore))
        self.engine.call(fill if wait else partial(setattr, experts.slots, "fills", True))

    def trace(self, path: str | Path) -> None:
        """Record the routing of everything from now on into ``path`` (format:
        ``slotmoe.offload.observe``), until ``close``."""
        experts, c = self.model.quantized("trace"), self.config
        if self.model.device.reads_in_place:
            raise ConfigError("a trace is not there yet on Vulkan; use --device cpu")
        geometry = c.moe_layers, c.n_routed_experts, c.num_experts_per_tok
        self._trace = trace = TraceWriter(Path(path), *geometry)

        def on_layer(route: Route) -> None:
            assert route.x_TD is not None
            x_TD = self.model.device.download(route.x_TD).get().numpy()
            trace.add(c.moe_layers[route.moe_layer], route.indices, x_TD, route.behind)

        self.engine.call(lambda: experts.on_layer(on_layer, inputs=True))

    def stats(self) -> Json:
        """Counters so far: ``tokens`` (counts and seconds), ``cache``, ``io`` (bytes and seconds by
        tier), ``memory``, ``misses`` with a GPU, ``sessions`` where they are kept, ``drafts``,
        and ``device``: which, and why it was taken."""
        model, plan, on_device = self.model, self.plan, self.model.device.memory()
        memory: Json = {"plan": dict(plan.components), "budget": plan.budget, "tier": plan.tier}
        memory |= {"host_plan": dict(plan.host)} if plan.host else {}
        memory["peak_rss"] = peak_rss()
        if on_device is not None:
            memory |= {"peak_vram": on_device.peak, "reserved_vram": on_device.reserved}
            memory["beside_vram"] = on_device.beside
        passes, (kind, why) = self.engine.batch.passes, model.draft
        drafted = {} if passes.drafting is None else passes.drafting.stats()
        stats: Json = {
            "tokens": {**passes.tokens, **passes.seconds},
            "memory": memory,
            "kernels": model.backend.name,
            "device": {"name": model.device.name, "why": model.device_reason},
            "drafts": {"kind": kind, "why": why, **drafted},
            **model.experts.stats(),
        }
        if model.store is not None:
            stats["io"] = model.store.stats()
        if self.sessions is not None:
            stats["sessions"] = self.sessions.stats()
        return stats

    def close(self) -> None:
        """End what is computed, for whichever thread, within a layer, with a ``ConfigError`` there,
        and release files and memory.

        A disk that does not answer is waited for some seconds.  In a forked child only files are
        closed: threads, locks and the GPU are the parent's.
        """
        if self._engine is not None:
            self._end.detach()
            self._engine.close()
            self._engine = None
        if self._trace is not None:
            self._trace.close()

    def __exit__(self, *raised: object) -> None:
        self.close()


def _end(engine: Engine) -> None:
    """Nobody has the runtime any more, or the process ends."""
    with suppress(KeyboardInterrupt):
        engine.close()
