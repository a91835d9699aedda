"""``Runtime``: the only place that composes network, weights, cache, slots and budget.

with Runtime.open("sample") as runtime:
    for token in runtime.generate("It is a truth universally acknowledged,", max_new_tokens=32):
        print(token.text, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from slotmoe.errors import ConfigError, PlanError
from slotmoe.model.config import read_config
from slotmoe.model.generate import Sampling, Token, generate
from slotmoe.model.kv_cache import LatentCache
from slotmoe.model.network import unwatched
from slotmoe.offload.card_experts import CardExperts
from slotmoe.offload.experts import OffloadedExperts
from slotmoe.offload.ingest.hub_id import is_hub_id
from slotmoe.offload.ingest.quantize import Progress, cached_export
from slotmoe.offload.machine import cache_folder, peak_rss, process_bytes
from slotmoe.offload.observe.measure import (
    copy_bandwidth,
    device_bandwidth,
    disk_bandwidth,
    disk_latency,
    together,
)
from slotmoe.offload.observe.profiler import Profiler
from slotmoe.offload.observe.trace import TraceWriter
from slotmoe.offload.opening import Parts, Wish, budgets, open_model, resolve_model
from slotmoe.offload.plan.memory import by_tier, format_size, predicted_components
from slotmoe.offload.plan.speed import Bandwidths, Setting
from slotmoe.offload.policy.cache import DEFAULT_POLICY, POLICIES
from slotmoe.offload.policy.hybrid import MODES
from slotmoe.offload.policy.prefetch import Accuracy
from slotmoe.offload.tiers.device import Card, choose_device, compute
from slotmoe.quant.backends import pick_ops
from slotmoe.quant.backends.base import TorchOps
from slotmoe.quant.export.layout import MANIFEST
from slotmoe.quant.export.reader import Export

ROWS_AT_ONCE = 16  # rows of logits that ``Runtime.append_rows`` makes at once
_PIECE = 128  # rows of logits made at once; a prefill pass takes a multiple of it
_MEASURED_BYTES = 256 << 20  # enough to leave every cache of the processor behind
__all__ = ["Runtime", "Token", "resolve_model"]


class Runtime:
    """An open model; not for use from several threads at once.  ``generate``, ``start`` and
    ``logits`` hold one sequence at a time, the first; ``slotmoe.offload.scheduler`` decodes several
    together."""

    def __init__(self, parts: Parts, ops: TorchOps, card: Card | None, why: str):
        self.config, self.tokenizer, self.plan, self.eos_token_ids = (
            parts.config,
            parts.tokenizer,
            parts.plan,
            parts.eos_token_ids,
        )
        self.device = torch.device("cpu") if card is None else card.device
        self._card, self._why = card, why
        self._network, self._caches, self._cache, self._source = (
            parts.network,
            parts.caches,
            parts.caches[0],
            parts.source,
        )
        self._latest: LatentCache | None = None  # whose token the network's hidden state belongs to
        self._experts, self._ops, self._sizes = parts.network.experts, ops, parts.sizes
        self._store, self._chunk = parts.store, parts.plan.prefill_chunk
        self._generation = 0
        self._held: list[
            int
        ] = []  # tokens of the first rows of the latent cache; the rows after them mean nothing
        self._profiler: Profiler | None = None
        self._counts = {
            "prefill_tokens": 0,
            "prefill_seconds": 0.0,
            "decode_tokens": 0,
            "decode_seconds": 0.0,
        }

    @classmethod
    def open(
        cls,
        path: str | Path,
        device: str = "auto",
        vram: int | str | None = None,
        ram: int | str | None = None,
        context: int = 4096,
        threads: int | None = None,
        cache_policy: str | None = None,
        prefetch: bool = True,
        quantize: bool = True,
        *,
        slots: int | None = None,
        kernels: str = "auto",
        logits_rows: int = 1,
        sequences: int = 1,
        progress: Progress | None = None,
        revision: str | None = None,
        misses: str = "auto",
    ) -> Runtime:
        """Open an export, a checkpoint folder or hub id (quantized once into the cache folder) or
        ``sample``.

        ``ram`` and ``vram`` are budgets in bytes or like ``"8GiB"``; None takes what is free.
        ``context`` is the number of positions of the latent cache.  ``slots`` caps the experts that
        stay on the fast tier; None takes all that fit.  ``revision`` of a hub id is a branch, tag
        or commit. ``quantize=False`` computes a checkpoint as it is, with everything resident: the
        reference path. ``logits_rows`` rows of logits will be alive at once (``logits_from`` makes
        128 at a time). ``sequences`` latent caches of ``context`` positions each are kept, for
        ``append`` and ``append_each``. ``cache_policy`` is one of
        ``slotmoe.offload.policy.cache.POLICIES``.  ``prefetch=False`` reads experts only when a
        gate has asked. ``misses`` says who computes an expert that is in no slot of a GPU:
        ``fetch``, the GPU, once it is copied there; ``cpu``; ``hybrid``, both, split by measured
        bandwidths; ``auto`` takes what these advise, ``fetch`` where none were measured.

        Raises ``ConfigError``, ``CheckpointError``, ``ExportError`` or ``PlanError``.
        """
        if cache_policy not in (None, *POLICIES):
            raise ConfigError(
                f"cache policy {cache_policy!r:.40} is unknown, expected one of: {', '.join(POLICIES)}"
            )
        if not 1 <= sequences <= 256:
            raise ConfigError(f"sequences is {sequences}, expected 1 to 256")
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}, expected at least 1")
        if not quantize and is_hub_id(str(path)) and not Path(path).exists():
            raise ConfigError(
                f"{path}: quantize=False needs the original checkpoint in a folder; download it first"
            )
        if misses not in MODES:
            raise ConfigError(
                f"misses {misses!r:.40} is unknown, expected one of: {', '.join(MODES)}"
            )
        folder = resolve_model(path, revision, **({"progress": progress} if progress else {}))
        card, why = choose_device(device)
        if card is None and misses != "auto":
            raise ConfigError(
                f"misses {misses} is given but the device is the CPU, which computes every expert: leave it out"
            )
        limits = budgets(card, ram, vram)
        is_export = (folder / MANIFEST).is_file()
        if quantize and not is_export:
            folder = cached_export(folder, cache_folder(), progress)
        elif not quantize and is_export:
            raise ConfigError(
                f"{folder}: is an export, already quantized; quantize=False needs the original checkpoint"
            )
        config = read_config(folder / "config.json")
        if not 1 <= context <= config.max_position_embeddings:
            raise PlanError(
                f"context {context} is outside 1 to {config.max_position_embeddings}, the model's max_position_embeddings"
            )
        if not quantize:
            ops = TorchOps()
        else:
            ops = (
                pick_ops(torch.device("cpu"), kernels, threads)
                if card is None
                else card.ops(kernels, threads)
            )
        policy = cache_policy or DEFAULT_POLICY
        wish = Wish(
            card,
            ops,
            *limits,
            context,
            slots,
            policy,
            prefetch,
            logits_rows,
            sequences,
            misses,
            kernels,
            threads,
        )
        return cls(open_model(folder, config, wish, quantize), ops, card, why)

    def logits(self, token_ids: list[int]) -> Tensor:
        """Teacher-forced logits from position 0 through the prefill path: float32 CPU [T,
        vocab_size].  This result is the caller's, beyond the budget, and as large as it says.

        Raises ``PlanError`` if the tokens don't fit the context, ``ConfigError`` if one is outside
        the vocabulary.
        """
        ids = self._check_ids(token_ids, len(token_ids))
        self._restart()
        logits = torch.empty(len(ids), self.config.vocab_size)
        for part, out in zip(ids.split(self._chunk), logits.split(self._chunk), strict=True):
            out.copy_(self._forward(part, all_logits=True))
        return logits

    def logits_from(self, token_ids: list[int], first: int = 0) -> Iterator[Tensor]:
        """The rows of ``logits`` from position ``first`` on, float32 [at most 128, vocab_size]
        each, on the runtime's device.

        Memory grows with neither the tokens nor the vocabulary.  Pieces end at multiples of 128
        positions, so that those of two runtimes match.  Raises as ``logits`` does.
        """
        ids, position = self._check_ids(token_ids, len(token_ids)), 0
        self._restart()
        mine = self._generation
        for part in ids.split(self._chunk):
            self._check_current(mine)
            self._forward(part)
            hidden_TD = self._network.hidden_TD
            assert hidden_TD is not None
            for start in range(0, len(part), _PIECE):
                if position + start + _PIECE > first:
                    yield self._network.head(
                        hidden_TD[max(start, first - position) : start + _PIECE]
                    )
            position += len(part)

    def _check_current(self, generation: int) -> None:
        if generation != self._generation:
            raise ConfigError(
                "this generation was superseded: a Runtime holds one sequence at a time"
            )

    def generate(
        self,
        prompt: str | list[int],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        chat: bool = False,
    ) -> Iterator[Token]:
        """Continue ``prompt`` (text, or token ids used as they are) and yield each ``Token`` as it
        is made.

        Stops at an end-of-sentence token, after ``max_new_tokens``, or when the context is full.
        ``chat`` sends the text through the model's chat template as a user's message.  What the
        prompt shares with the beginning of the latest sequence is still in the latent cache and is
        not computed again.  Raises ``PlanError`` if the prompt does not fit.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        sampling = Sampling(temperature, top_p, top_k, seed)
        if isinstance(prompt, str):
            text = self.tokenizer.chat([{"role": "user", "content": prompt}]) if chat else prompt
            prompt = self.tokenizer.encode(text)
        self._check_ids(prompt, len(prompt) + 1)
        room = self._cache.context - len(prompt)
        kept = _shared(
            self._held, prompt[:-1]
        )  # the last token is fed in any case: its logits are wanted
        self._restart(kept)
        return generate(
            self._step(),
            prompt[kept:],
            self.tokenizer,
            min(max_new_tokens, room),
            self.eos_token_ids,
            sampling,
        )

    def start(self, depth: int = 0) -> Callable[[list[int]], Tensor]:
        """Begin a new sequence and return its ``step(ids)``, which appends ids and gives the last
        one's logits, float32 [1, vocab_size].  ``depth`` positions are taken as cached already,
        filled with random numbers: for measurements."""
        self._held.clear()
        self._restart(depth)
        latent_SW = torch.randn(
            depth, self.config.latent_width, generator=torch.Generator().manual_seed(0)
        ).to(self.device)
        for layer in range(self.config.num_hidden_layers):
            self._ops.store_latents(
                latent_SW, self.config.kv_lora_rank, self._cache.layers[layer, :depth]
            )
        return self._step()

    def _step(self) -> Callable[[list[int]], Tensor]:
        """``step(ids)`` of the present sequence, which appends to what the latent cache holds."""
        mine = self._generation

        def step(ids: list[int]) -> Tensor:
            self._check_current(mine)
            kind = "prefill" if len(ids) > 1 or self._cache.length == 0 else "decode"
            started, profiler = time.perf_counter(), self._profiler
            if profiler is not None:
                profiler.begin(self._moved())
            for part in torch.tensor(ids, device=self.device).split(self._chunk):
                logits = self._forward(part)
            self._count(kind, len(ids), started)
            if profiler is not None:
                profiler.end(kind, len(ids), self._moved())
            return logits

        return step

    def _moved(self) -> dict[str, int]:
        """Bytes that came from each slower tier so far."""
        return (
            {tier: counts["bytes"] for tier, counts in self._store.stats().items()}
            if self._store is not None
            else {}
        )

    def append(self, sequence: int, ids: list[int]) -> Tensor:
        """Append ``ids`` to one of the ``sequences`` and return the last one's logits, float32 [1,
        vocab_size]."""
        cache, started = self._caches[sequence], time.perf_counter()
        kind = "prefill" if cache.length == 0 or len(ids) > 1 else "decode"
        for part in torch.tensor(ids, device=self.device).split(self._chunk):
            logits = self._forward(part, cache=cache)
        self._count(kind, len(ids), started)
        return logits

    def append_rows(self, sequence: int, ids: list[int]) -> Iterator[Tensor]:
        """``append``, with the logits of every id: float32 [at most ``ROWS_AT_ONCE``, vocab_size]
        at a time.  Nothing else may be computed until the last of them is taken."""
        cache, started = self._caches[sequence], time.perf_counter()
        for part in torch.tensor(ids, device=self.device).split(self._chunk):
            self._forward(part, cache=cache)
            hidden_TD = self._network.hidden_TD
            assert hidden_TD is not None
            # A tied head goes row by row, as in ``forward_together``.
            for rows_RD in hidden_TD.split(1 if self.config.tie_word_embeddings else ROWS_AT_ONCE):
                yield self._network.head(rows_RD)
        self._count("prefill", len(ids), started)

    def append_each(self, sequences: list[int], ids: list[int]) -> Tensor:
        """Append one id to each of several sequences in one pass, so that an expert brought for one
        serves all: logits, float32 [len(ids), vocab_size].  With the native kernels each row is
        bitwise what ``append`` alone gives."""
        started = time.perf_counter()
        self._latest = None
        self._held.clear()

        def forward() -> Tensor:
            if isinstance(self._experts, OffloadedExperts):
                self._experts.begin(len(ids), None, None)
            return self._network.forward_together(
                torch.tensor(ids, device=self.device), [self._caches[one] for one in sequences]
            )

        logits = self._computed(forward)
        self._count("decode", len(ids), started)
        return logits

    def length(self, sequence: int) -> int:
        """Positions of a sequence that are cached."""
        return self._caches[sequence].length

    def keep(self, sequence: int, length: int, source: int) -> None:
        """Let ``sequence`` be the first ``length`` positions of ``source``, which may be itself."""
        assert length <= self._caches[source].length
        self._held.clear()
        if source != sequence:
            self._caches[sequence].layers[:, :length] = self._caches[source].layers[:, :length]
        self._caches[sequence].length = length
        self._caches[sequence].written = max(self._caches[sequence].written, length)

    def _count(self, kind: str, tokens: int, started: float) -> None:
        self._counts[kind + "_tokens"] += tokens
        self._counts[kind + "_seconds"] += time.perf_counter() - started

    def _forward(
        self, ids_T: Tensor, all_logits: bool = False, cache: LatentCache | None = None
    ) -> Tensor:
        network, cache = self._network, cache or self._cache
        alone, position = cache is self._cache, cache.length
        if alone:
            del self._held[
                position:
            ]  # first: a pass that is interrupted has overwritten some of these rows
        known, self._latest = self._latest is cache, cache

        def forward() -> Tensor:
            if isinstance(self._experts, OffloadedExperts):
                embedding_D = hidden_D = None
                if (
                    len(ids_T) == 1
                    and known
                    and network.hidden_TD is not None
                    and self._experts.guesses_tokens
                ):
                    embedding_D, hidden_D = (
                        self._ops.embed(ids_T, network.embed_tokens)[0],
                        network.hidden_TD[-1],
                    )
                self._experts.begin(len(ids_T), embedding_D, hidden_D)
            return network.forward(ids_T, cache, all_logits)

        logits = self._computed(forward)
        if alone and len(self._held) == position:  # not after rows of unknown tokens
            self._held += ids_T.tolist()
        return logits

    def _computed(self, forward: Callable[[], Tensor]) -> Tensor:
        """What ``forward`` gives, on a card when it is there.  Raises ``DeviceError``; a step that
        raises can be repeated."""
        if self._card is None:
            return forward()
        return compute(
            self._card,
            forward,
            f"a lower --vram (now {format_size(self.plan.budget)}) or --context",
        )

    def _restart(self, kept: int = 0) -> None:
        """A new sequence begins, with the first ``kept`` rows of the latent cache."""
        self._generation += 1
        self._cache.length, self._latest = kept, None

    def _check_ids(self, ids: list[int], needed: int) -> Tensor:
        if not ids:
            raise ConfigError("the prompt is empty; give at least one token")
        if needed > self._cache.context:
            raise PlanError(
                f"the prompt has {len(ids)} tokens and the context holds {self._cache.context}: raise --context or shorten the prompt"
            )
        if not all(isinstance(one, int) and 0 <= one < self.config.vocab_size for one in ids):
            raise ConfigError(
                f"a token id is outside 0 to {self.config.vocab_size - 1}, the model's vocabulary"
            )
        return torch.tensor(ids, device=self.device)

    @property
    def context(self) -> int:
        """Positions that the latent cache holds."""
        return self._cache.context

    @property
    def position(self) -> int:
        """Positions of the latent cache that the present sequence has filled.  Another thread may
        ask."""
        return self._cache.length

    @property
    def threads(self) -> int:
        """CPU threads in use."""
        return (
            self._experts.misses.ops.threads
            if isinstance(self._experts, CardExperts)
            else self._ops.threads
        )

    def warm(self, progress: Progress | None = None) -> None:
        """Fill the free expert slots, layer by layer, so that what follows is measured without
        first reads."""
        if isinstance(self._experts, OffloadedExperts):
            self._experts.fill(progress or (lambda done, total: None))

    def read_bandwidth(self) -> float:
        """Bytes a second at which the fast tier is read, measured now: a GPU's memory over its
        slots; RAM by all threads together, over the slots once their pages are there, or where they
        are few over memory of its own, as far as the budget allows."""
        memory = self._experts.memory() if isinstance(self._experts, OffloadedExperts) else None
        if self._card is not None:
            assert memory is not None
            return device_bandwidth(self._card, memory[: 16 * _MEASURED_BYTES])
        if memory is None or (
            memory.nbytes < _MEASURED_BYTES <= self.plan.budget - self.plan.total
        ):
            memory = torch.ones(_MEASURED_BYTES, dtype=torch.uint8)
        return self._ops.read_bandwidth(memory[: 4 * _MEASURED_BYTES])

    def link_bandwidths(self) -> dict[str, float]:
        """Bytes a second, measured now: ``pcie``, copies from RAM to the GPU; ``pcie_busy``, the
        same while the CPU computes experts; ``experts``, the records that it gets through
        meanwhile.  Empty without a GPU."""
        if (
            self._card is None
            or not isinstance(self._experts, CardExperts)
            or not isinstance(self._source, Export)
        ):
            return {}
        rows, misses, layout = self._experts.spare(8), self._experts.misses, self._source.layout
        alone = copy_bandwidth(self._card, rows)
        busy, experts = together(self._card, rows, misses.ops, layout, misses.levels)
        return {"pcie": alone, "pcie_busy": busy, "experts": experts}

    def ram_bandwidth(self) -> float:
        """Bytes a second at which all threads together read RAM, measured now."""
        if not isinstance(self._experts, CardExperts):
            return self.read_bandwidth()
        return self._experts.misses.ops.read_bandwidth(
            torch.ones(_MEASURED_BYTES, dtype=torch.uint8)
        )

    def disk_bandwidth(self) -> float:
        """Bytes a second that the export's disk gives to 8 threads with direct reads of 4 MiB,
        measured now."""
        assert isinstance(self._source, Export)
        return disk_bandwidth(self._source)

    def disk_latency(self) -> float:
        """Seconds of one small read from the export's disk, measured now."""
        assert isinstance(self._source, Export)
        return disk_latency(self._source)

    def kernel_timing(self) -> AbstractContextManager[dict[str, float]]:
        """Seconds spent inside each native kernel while this is open, by name."""
        return self._ops.timing()

    def bytes_per_token(self, position: int) -> dict[str, int]:
        """Bytes that decoding one token at ``position`` reads: resident weights, its experts, and
        the latent cache."""
        assert self._sizes is not None
        experts = (
            len(self.config.moe_layers) * self.config.num_experts_per_tok * self.plan.record_bytes
        )
        latent = self._cache.nbytes // self._cache.context * position
        return {
            "resident weights": self._sizes.touched,
            "experts": experts,
            "latent KV cache": latent,
        }

    def predict(
        self, prompt_tokens: int, new_tokens: int, bandwidths: Bandwidths
    ) -> dict[str, Any]:
        """What the plan expects of a run: ``components`` at the peak (name -> tier -> bytes) and
        their ``peak`` (tier -> bytes), ``hit_rate``, tokens a second of prefill and decode,
        ``decode_seconds`` by what a token waits for, and its ``bottleneck``."""
        assert self._sizes is not None and isinstance(self._source, Export)
        random = str(self._source.manifest["source"]["name"]).startswith("random weights")
        misses = self._experts.misses.mode if isinstance(self._experts, CardExperts) else "fetch"
        setting = Setting(
            self.config, self._sizes, self.plan, bandwidths, self.threads, random, misses
        )
        speed = setting.predict(prompt_tokens, new_tokens)
        components = predicted_components(self.plan, prompt_tokens, new_tokens)
        return {
            "peak": by_tier(components),
            "components": components,
            "prefill_tokens_per_second": speed.prefill,
            "decode_tokens_per_second": speed.decode,
            "hit_rate": speed.hit_rate,
            "decode_seconds": speed.seconds,
            "bottleneck": speed.bottleneck,
        }

    def trace(self, path: str | Path) -> None:
        """Record the routing of everything from now on into ``path`` (format:
        ``slotmoe.offload.observe.trace``), until ``close``."""
        experts, layers, config = self._quantized("trace"), self.config.moe_layers, self.config
        experts.trace = TraceWriter(
            Path(path), layers, config.n_routed_experts, config.num_experts_per_tok
        )

    def profile(self, origin: float | None = None) -> Profiler:
        """Watch every step from now on; moments are told in seconds since ``origin``, a
        ``time.perf_counter()``, or now."""
        experts = self._quantized("profile")
        card = self._card
        synchronize = (lambda: card.record().synchronize()) if card is not None else None
        origin = time.perf_counter() if origin is None else origin
        profiler = Profiler(
            len(self.config.moe_layers), self.config.n_routed_experts, origin, synchronize
        )
        self._profiler = experts.profiler = profiler
        self._network.lap = experts.lap = profiler.lap
        return profiler

    def stop_profile(self) -> None:
        """Stop watching."""
        experts = self._quantized("profile")
        self._profiler = experts.profiler = None
        self._network.lap = experts.lap = unwatched

    def prefetch_by_layer(self) -> list[Accuracy]:
        """What became of the guesses for each MoE layer; empty where nothing is read ahead."""
        return self._quantized("profile").prefetch_by_layer()

    def memory_in_use(self) -> dict[str, tuple[int, dict[str, int]]]:
        """Tier -> (bytes in use now, bytes of those components of the plan that are there by now).
        Another thread may ask."""
        plan, used, resident = (
            self.plan,
            process_bytes(),
            self._sizes.resident if self._sizes is not None else {},
        )
        if self._card is not None:  # everything is allocated at open
            known = {
                name: plan.components[name]
                for name in ("latent KV cache", "expert slots", "read buffers")
            }
            known["resident weights"] = sum(resident.values())
            host = {name: size for name, size in plan.host.items() if name != "runtime"}
            return {"vram": (self._card.memory().allocated, known), "ram": (used, host)}
        cached, slab = self._quantized("profile").present()
        buffers = min(plan.components["read buffers"], slab - cached)
        latent = sum(
            cache.nbytes // cache.context * max(cache.length, cache.written)
            for cache in self._caches
        )
        known = {"resident weights": sum(resident.values()), "latent KV cache": latent}
        return {"ram": (used, known | {"expert slots": slab - buffers, "read buffers": buffers})}

    def _quantized(self, purpose: str) -> OffloadedExperts:
        if not isinstance(self._experts, OffloadedExperts):
            raise ConfigError(
                f"the reference path has no expert cache to {purpose}; open the model quantized"
            )
        return self._experts

    def stats(self) -> dict[str, Any]:
        """Counters so far: ``tokens`` (counts and seconds), ``cache``, ``io`` (bytes and seconds by
        tier), ``memory``, ``misses`` with a GPU, and ``device``: which, and why it was taken."""
        memory: dict[str, Any] = {
            "plan": dict(self.plan.components),
            "budget": self.plan.budget,
            "tier": self.plan.tier,
        }
        if self.plan.host:
            memory["host_plan"] = dict(self.plan.host)
        memory["peak_rss"] = peak_rss()
        name = "cpu"
        if self._card is not None:
            name, card = self._card.name, self._card.memory()
            memory |= {
                "peak_vram": card.peak,
                "reserved_vram": card.reserved,
                "beside_vram": card.beside,
            }
        found = {
            "tokens": dict(self._counts),
            "memory": memory,
            "kernels": self._ops.name,
            "device": {"name": name, "why": self._why},
        }
        if isinstance(self._experts, OffloadedExperts):
            found |= self._experts.stats()
        if self._store is not None:
            found["io"] = self._store.stats()
        return found

    def close(self) -> None:
        """Release files and memory; the runtime can't be used afterwards."""
        if isinstance(self._experts, OffloadedExperts):
            self._experts.close()
        self._generation += 1
        if self._store is not None:
            self._store.close()
        self._source.close()
        del self._network, self._cache, self._caches, self._experts, self._latest
        self._network = self._cache = self._experts = None  # type: ignore[assignment]

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _shared(one: list[int], other: list[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
