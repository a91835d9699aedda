"""``Runtime``: an open model and its sequences.

with Runtime.open("sample") as runtime:
    for token in runtime.generate("It is a truth universally acknowledged,", max_new_tokens=32):
        print(token.text, end="", flush=True)
"""

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sequenced
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slotmoe.errors import ConfigError, PlanError
from slotmoe.model.generate import Sampling, Token, generate
from slotmoe.model.kv_cache import LatentCache
from slotmoe.offload.ingest.hub_id import is_hub_id
from slotmoe.offload.ingest.quantize import Notify, Progress, cached_export, ignore
from slotmoe.offload.loading import LoadedModel, Options, open_model, resolve_model
from slotmoe.offload.machine import cache_folder, peak_rss
from slotmoe.offload.observe.trace import TraceWriter
from slotmoe.offload.plan.memory import format_size, or_more_context
from slotmoe.offload.tiers.cuda import choose_device
from slotmoe.quant.export.layout import MANIFEST

ROWS_AT_ONCE = 16  # rows of logits that ``Sequence.append_rows`` makes at once
_ROWS_OF_TEXT = 128  # rows of logits made at once; a prefill pass takes a multiple of it


class Sequence:
    """One sequence: its latent cache and the tokens whose latents that holds.

    ``tokens`` is the truth: a pass that is interrupted has written rows behind them, which mean
    nothing.  A token id of -1 is unknown.
    """

    def __init__(self, runtime: "Runtime", cache: LatentCache):
        self._runtime, self._cache = runtime, cache
        self.tokens: list[int] = []
        # The residual stream after the last of so many tokens, float32 [D].
        self._hidden: tuple[int, Tensor] | None = None

    @property
    def length(self) -> int:
        """Positions that are cached.  Another thread may ask."""
        return len(self.tokens)

    @property
    def context(self) -> int:
        """Positions that the latent cache has room for."""
        return self._cache.context

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        del self.tokens[length:]

    def take(self, source: "Sequence", length: int) -> None:
        """Become the first ``length`` tokens of ``source``, which may be this sequence."""
        tokens = source.tokens[:length]
        self.rewind(length if source is self else 0)
        if source is not self:
            self._cache.copy(source._cache, length)
        self.tokens = tokens

    def fill(self, depth: int) -> None:
        """Become ``depth`` unknown tokens with random latents: for measurements."""
        model, generator = self._runtime.model, torch.Generator().manual_seed(0)
        self.rewind(0)
        latent_SW = torch.randn(depth, model.config.latent_width, generator=generator)
        for rows_SX in self._cache.layers:
            model.backend.store_latents(
                latent_SW.to(rows_SX.device), model.config.kv_lora_rank, rows_SX[:depth]
            )
        self.tokens = [-1] * depth

    def append(self, ids: list[int]) -> Tensor:
        """Append ``ids`` and return the last one's logits, float32 [1, vocab_size] on the model's
        device."""
        with self._runtime._counted(self._kind(ids), len(ids)):
            for hidden_TD in self.run(ids):
                last_1D = hidden_TD[-1:]
            return self._runtime._logits(last_1D)

    def append_rows(self, ids: list[int]) -> Iterator[Tensor]:
        """``append``, with the logits of every id: float32 [at most ``ROWS_AT_ONCE``, vocab_size]
        at a time.  Nothing else may be computed until the last of them is taken."""
        with self._runtime._counted(self._kind(ids), len(ids)):
            for hidden_TD in self.run(ids):
                for rows_RD in hidden_TD.split(ROWS_AT_ONCE):
                    yield self._runtime._logits(rows_RD, each=True)

    def run(self, ids: list[int]) -> Iterator[Tensor]:
        """Append ``ids`` pass by pass: the residual stream after the last layer, float32 [T, D],
        which lasts until the next pass."""
        chunk = self._runtime.plan.prefill_chunk
        for start in range(0, len(ids), chunk):
            yield self._runtime._forward([self], ids[start : start + chunk])

    def _kind(self, ids: list[int]) -> str:
        return "decode" if len(ids) == 1 and self.tokens else "prefill"


class Runtime:
    """An open model; not for use from several threads at once.  ``generate`` and ``logits`` use the
    first of its ``sequences``."""

    def __init__(self, model: LoadedModel):
        self.model = model
        self.config, self.tokenizer, self.plan = model.config, model.tokenizer, model.plan
        self.eos_token_ids, self.device = model.eos_token_ids, model.device.device
        self.sequences = [Sequence(self, cache) for cache in model.caches]
        self.watcher: Any = None  # a ``slotmoe.offload.observe.profiler.Profiler``
        self._generation = 0
        self._trace: TraceWriter | None = None
        self._counts = dict.fromkeys(("prefill_tokens", "decode_tokens"), 0)
        self._seconds = dict.fromkeys(("prefill_seconds", "decode_seconds"), 0.0)

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
        progress: Progress | None = None,
        reading: Progress = ignore,
        notify: Notify = ignore,
        revision: str | None = None,
        **others: Any,
    ) -> "Runtime":
        """Open an export, a checkpoint folder or hub id (quantized once into the cache folder) or
        ``sample``.

        ``ram`` and ``vram`` are budgets in bytes or like ``"8GiB"``; None takes what is free.
        ``context`` is the number of positions of the latent cache, None min(4096, the model's
        limit).  ``cache_policy`` is one of ``slotmoe.offload.policy.POLICIES``.
        ``prefetch=False`` reads experts only when a gate has chosen them.  ``quantize=False``
        computes a checkpoint as it is, with everything resident: the reference path.  ``revision``
        of a hub id is a branch, tag or commit.  ``progress``, ``reading`` and ``notify`` are as in
        ``cached_export``.  ``others`` are:

        ``slots``        the most experts in slots on the device; None takes all that fit
        ``kernels``      ``auto``, ``torch`` or ``triton`` (``slotmoe.quant.backends.pick_backend``)
        ``sequences``    latent caches of ``context`` positions each
        ``logits_rows``  rows of logits that will be alive at once (``logits_from``: 128)
        ``misses``       what computes an expert without a slot on a GPU: ``fetch``, the GPU, once
                         it is copied there; ``cpu``; ``hybrid``, both, split by measured
                         bandwidths; ``auto`` takes what these advise, ``fetch`` where none were
                         measured

        Raises ``ConfigError``, ``CheckpointError``, ``ExportError`` or ``PlanError``.
        """
        options = Options(
            vram, ram, context, threads, cache_policy, prefetch, quantize, **others
        )  # fmt: skip
        if not quantize and is_hub_id(str(path)) and not Path(path).exists():
            raise ConfigError(
                f"{path}: quantize=False needs the original checkpoint in a folder; "
                "download it first"
            )
        reporting = {"progress": progress} if progress else {}
        folder = resolve_model(path, revision, **reporting)
        chosen, reason = choose_device(device)
        is_export = (folder / MANIFEST).is_file()
        if quantize and not is_export:
            folder = cached_export(folder, cache_folder(), progress, reading, notify)
        elif not quantize and is_export:
            raise ConfigError(
                f"{folder}: is an export, already quantized; quantize=False needs the original "
                "checkpoint"
            )
        return cls(open_model(folder, options, chosen, reason))

    def logits(self, token_ids: list[int]) -> Tensor:
        """Teacher-forced logits from position 0 through the prefill path: float32 CPU [T,
        vocab_size].  This result is the caller's, beyond the budget, and as large as it says.

        Raises ``PlanError`` if the tokens don't fit the context, ``ConfigError`` if one is outside
        the vocabulary.
        """
        self._begin(token_ids, len(token_ids))
        logits, start = torch.empty(len(token_ids), self.config.vocab_size), 0
        for hidden_TD in self.sequences[0].run(token_ids):
            end = start + len(hidden_TD)
            logits[start:end] = self._logits(hidden_TD)
            start = end
        return logits

    def logits_from(self, token_ids: list[int], first: int = 0) -> Iterator[Tensor]:
        """The rows of ``logits`` from position ``first`` on, float32 [at most 128, vocab_size] at a
        time, on the runtime's device.

        Memory grows with neither the tokens nor the vocabulary.  Pieces end at multiples of 128
        positions, so that those of two runtimes match.  Raises as ``logits`` does.
        """
        generation, position = self._begin(token_ids, len(token_ids)), 0
        for hidden_TD in self.sequences[0].run(token_ids):
            for start in range(0, len(hidden_TD), _ROWS_OF_TEXT):
                if position + start + _ROWS_OF_TEXT > first:
                    rows_TD = hidden_TD[max(start, first - position) : start + _ROWS_OF_TEXT]
                    yield self._logits(rows_TD)
                    self._check_current(generation)
            position += len(hidden_TD)

    def generate(
        self,
        prompt: str | list[int],
        max_new_tokens: int | None = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        chat: bool = False,
    ) -> Iterator[Token]:
        """Continue ``prompt`` (text, or token ids used as they are) and yield each ``Token`` as it
        is made.

        Stops at an end-of-sentence token, after ``max_new_tokens`` (None is no limit), or when the
        context is full; the last token's ``finish`` names the limit that ended the text.
        ``chat`` sends the text through the model's chat template as a user's message.  What the
        prompt shares with the beginning of the latest sequence is still in the latent cache and is
        not computed again.  Raises ``PlanError`` if the prompt does not fit.
        """
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens is {max_new_tokens}, expected at least 1 (option -n)"
            )
        sampling, sequence = Sampling(temperature, top_p, top_k, seed), self.sequences[0]
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.encode(self.tokenizer.chat(messages) if chat else prompt)
        check_ids(prompt)
        prompt = [*prompt]
        # The last token is computed in any case: its logits are needed.
        kept = shared_prefix(sequence.tokens, prompt[:-1])
        generation = self._begin(prompt, len(prompt) + 1, kept)

        def step(ids: list[int]) -> Tensor:
            self._check_current(generation)
            return sequence.append(ids)

        room, eos = sequence.context - len(prompt), self.eos_token_ids
        count = room if max_new_tokens is None else min(max_new_tokens, room)
        limit = "length" if count == max_new_tokens else "context"
        return generate(step, prompt[kept:], self.tokenizer, count, eos, sampling, limit)

    def append_each(self, sequences: Sequenced[Sequence], ids: list[int]) -> Tensor:
        """Append one id to each of several sequences in one pass, so that an expert brought for one
        serves all: logits, float32 [len(ids), vocab_size].  With the native kernels each row is
        bitwise what ``Sequence.append`` alone gives."""
        with self._counted("decode", len(ids)):
            return self._logits(self._forward(sequences, ids), each=True)

    @contextmanager
    def _counted(self, kind: str, tokens: int) -> Iterator[None]:
        """Count the tokens and the seconds of what happens inside, and let it be watched."""
        started = time.perf_counter()
        if self.watcher is not None:
            self.watcher.begin(self._moved())
        yield
        self._counts[f"{kind}_tokens"] += tokens
        self._seconds[f"{kind}_seconds"] += time.perf_counter() - started
        if self.watcher is not None:
            self.watcher.end(kind, tokens, self._moved())

    def _forward(self, sequences: Sequenced[Sequence], ids: list[int]) -> Tensor:
        """One pass: ``ids`` for one sequence, or one id for each of several.  Returns the residual
        stream after the last layer, float32 [T, D].  A pass that raises can be repeated."""
        model = self.model
        ids_T = torch.tensor(ids, device=self.device)
        caches = [sequence._cache for sequence in sequences]
        for sequence, cache in zip(sequences, caches, strict=True):
            cache.length = len(sequence.tokens)

        def step() -> Tensor:
            if model.experts is not None and model.experts.begin(len(ids)):
                self._guess_token(sequences[0], ids_T)
            return model.network.forward(ids_T, caches)

        hidden_TD = self._run(step)
        count = len(ids) // len(sequences)
        for index, sequence in enumerate(sequences):
            new = ids[index * count : (index + 1) * count]
            sequence.tokens = sequence.tokens + new
            last_D = hidden_TD[(index + 1) * count - 1].clone()
            sequence._hidden = len(sequence.tokens), last_D
        return hidden_TD

    def _logits(self, hidden_TD: Tensor, each: bool = False) -> Tensor:
        """Logits of rows of the residual stream, float32 [T, vocab_size]; with ``each`` a row is
        bitwise what it gives alone."""
        network = self.model.network
        head = network.head_each if each else network.head
        return self._run(lambda: head(hidden_TD))

    def _run(self, step: Callable[[], Tensor]) -> Tensor:
        """What ``step`` gives, computed.  Raises ``DeviceError``."""
        ways_out = f"a lower --vram (now {format_size(self.plan.budget)}) or --context"
        return self.model.device.run(step, ways_out)

    def _guess_token(self, sequence: Sequence, ids_1: Tensor) -> None:
        """Let the lookahead guess a token's experts from its embedding and the last hidden state
        before it."""
        model, hidden = self.model, sequence._hidden
        if hidden is None or hidden[0] != len(sequence.tokens):
            return
        assert model.experts is not None and model.experts.lookahead is not None
        embedding_1D = model.backend.embed(ids_1, model.network.embed_tokens)
        model.experts.lookahead.guess_token(embedding_1D[0], hidden[1])

    def _moved(self) -> dict[str, int]:
        """Bytes that came from each slower tier so far."""
        store = self.model.store
        return {} if store is None else {name: io["bytes"] for name, io in store.stats().items()}

    def _begin(self, ids: list[int], needed: int, kept: int = 0) -> int:
        """Begin a text on the first sequence with its first ``kept`` tokens; earlier ones are
        superseded.  Raises ``ConfigError`` or ``PlanError``."""
        sequence, vocabulary = self.sequences[0], self.config.vocab_size
        check_ids(ids)
        if not ids:
            raise ConfigError("the prompt is empty; give at least one token")
        if needed > sequence.context:
            advice = or_more_context("shorten the prompt", self.config, sequence.context)
            raise PlanError(
                f"the prompt has {len(ids)} tokens and the context holds {sequence.context}: "
                f"{advice}"
            )
        if not all(0 <= id < vocabulary for id in ids):
            raise ConfigError(
                f"a token id is outside 0 to {vocabulary - 1}, the model's vocabulary"
            )
        self._generation += 1
        sequence.rewind(kept)
        return self._generation

    def _check_current(self, generation: int) -> None:
        if generation != self._generation:
            raise ConfigError(
                "this generation was superseded: a Runtime holds one sequence at a time"
            )

    @property
    def context(self) -> int:
        """Positions that a latent cache has room for."""
        return self.sequences[0].context

    @property
    def threads(self) -> int:
        """CPU threads in use."""
        return self.model.cpu.threads

    def warm(self, progress: Progress | None = None) -> None:
        """Fill the free expert slots, layer by layer, so that what follows is measured without
        first reads."""
        if self.model.experts is not None:
            self.model.experts.fill(progress or (lambda done, total: None))

    def trace(self, path: str | Path) -> None:
        """Record the routing of everything from now on into ``path`` (format:
        ``slotmoe.offload.observe.trace``), until ``close``."""
        experts, c = self.model.quantized("trace"), self.config
        geometry = c.moe_layers, c.n_routed_experts, c.num_experts_per_tok
        self._trace = trace = TraceWriter(Path(path), *geometry)
        experts.on_route(lambda route: trace.add(c.moe_layers[route.row], route.indices))

    def stats(self) -> dict[str, Any]:
        """Counters so far: ``tokens`` (counts and seconds), ``cache``, ``io`` (bytes and seconds by
        tier), ``memory``, ``misses`` with a GPU, and ``device``: which, and why it was taken."""
        model, plan, on_device = self.model, self.plan, self.model.device.memory()
        memory: dict[str, Any] = {"plan": dict(plan.components), "budget": plan.budget}
        memory["tier"] = plan.tier
        if plan.host:
            memory["host_plan"] = dict(plan.host)
        memory["peak_rss"] = peak_rss()
        if on_device is not None:
            memory |= {"peak_vram": on_device.peak, "reserved_vram": on_device.reserved}
            memory["beside_vram"] = on_device.beside
        stats: dict[str, Any] = {"tokens": {**self._counts, **self._seconds}, "memory": memory}
        stats["kernels"] = model.backend.name
        stats["device"] = {"name": model.device.name, "why": model.device_reason}
        if model.experts is not None:
            stats |= model.experts.stats()
        if model.store is not None:
            stats["io"] = model.store.stats()
        return stats

    def close(self) -> None:
        """Release files and memory; the runtime can't be used afterwards."""
        if "model" not in self.__dict__:
            return
        if self._trace is not None:
            self._trace.close()
        self.model.opened.close()
        self._generation += 1
        del self.model, self.sequences

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def check_ids(prompt: Any) -> None:
    """Raise ``ConfigError`` unless ``prompt`` is a sequence of integers."""
    if not isinstance(prompt, Sequenced):
        raise ConfigError(f"the prompt is a {type(prompt).__name__}, expected text or token ids")
    strange = next((item for item in prompt if not isinstance(item, int)), None)
    if strange is not None:
        problem = f"the prompt holds a {type(strange).__name__}"
        problem += ", expected text or token ids, which are integers"
        if isinstance(strange, dict):
            problem += "; of messages make text with tokenizer.chat(messages)"
        raise ConfigError(problem)


def shared_prefix(cached: list[int], prompt: list[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    limit = min(len(cached), len(prompt))
    if cached[:limit] == prompt[:limit]:
        return limit
    return next(index for index in range(limit) if cached[index] != prompt[index])
