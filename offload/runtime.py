"""``Runtime``: an open model and its sequences.

with Runtime.open("sample") as runtime:
    for token in runtime.generate("It is a truth universally acknowledged,", max_new_tokens=32):
        print(token.text, end="", flush=True)
"""

from collections.abc import Iterator
from collections.abc import Sequence as Sequenced
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slotmoe.errors import ConfigError, PlanError
from slotmoe.jsonfile import Json
from slotmoe.model.generate import Sampling, Token, generate
from slotmoe.offload.devices.cuda import choose_device
from slotmoe.offload.experts.experts import Route
from slotmoe.offload.ingest.cached import cached_export
from slotmoe.offload.ingest.hub_id import is_hub_id
from slotmoe.offload.ingest.quantize import Notify, Progress, ignore
from slotmoe.offload.loading import LoadedModel, open_model
from slotmoe.offload.machine import cache_folder, peak_rss
from slotmoe.offload.model_source import resolve_model
from slotmoe.offload.observe.trace import TraceWriter
from slotmoe.offload.options import Options
from slotmoe.offload.plan.memory import PREFILL_CHUNK, or_more_context
from slotmoe.offload.sequence import SUPERSEDED, Passes, Sequence, shared_prefix
from slotmoe.offload.sessions.store import DEFAULT_LIMIT, Sessions
from slotmoe.quant.export.layout import MANIFEST

_ROWS_OF_TEXT = 128  # rows of logits made at once; a prefill pass takes a multiple of it


class Runtime:
    """An open model.  ``generate`` and ``logits`` use the first of its ``sequences``; ``sessions``
    is None until ``keep_in``.

    It computes for one thread at a time: another one gets a ``ConfigError`` meanwhile, as does
    every use after ``close``, and in a child that was forked.  Ctrl-C in the main thread ends a
    pass at the end of a layer, a second one at once; either way the next pass computes what it
    would have computed without.
    """

    def __init__(self, model: LoadedModel):
        self.passes = Passes(model)
        self.config, self.tokenizer, self.plan = model.config, model.tokenizer, model.plan
        self.eos_token_ids, self.device = model.eos_token_ids, model.device.device
        self._sequences = [Sequence(self.passes, cache) for cache in model.caches]
        self.sessions: Sessions | None = None
        self._trace: TraceWriter | None = None

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
        computes a checkpoint as it is, all of it resident.  ``revision`` of a hub id is a branch,
        tag or commit.  ``progress``, ``reading`` and ``notify`` are as in ``cached_export``.
        ``others`` are:

        ``slots``        the most experts in slots on the device; None takes all that fit
        ``kernels``      ``auto``, ``torch`` or ``triton`` (``slotmoe.quant.backends.pick_backend``)
        ``sequences``    latent caches of ``context`` positions each
        ``logits_rows``  rows of logits that will be alive at once (``logits_from``: 128)
        ``route_budget``  see docs/routing.md
        ``misses``       what computes an expert without a slot on a GPU: ``fetch``, the GPU, once
                         it is copied there; ``cpu``; ``hybrid``, both, split by bandwidths;
                         ``auto`` takes what measured ones advise, or ``fetch``
        ``experts_dirs`` copies of the export's ``experts`` on other drives, which are read too
        ``draft``        one of ``slotmoe.offload.policy.drafts.DRAFTS`` (docs/drafts.md)

        Raises ``ConfigError``, ``CheckpointError``, ``ExportError`` or ``PlanError``.
        """
        options = Options(vram, ram, context, threads, cache_policy, prefetch, quantize, **others)
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
        for hidden_TD, changes in self.sequences[0].run_counted(token_ids):
            for rows_TD in hidden_TD.split(PREFILL_CHUNK):
                end = start + len(rows_TD)
                with self.passes.using(changes):
                    logits[start:end] = self.passes.logits(rows_TD)
                start = end
        return logits

    def logits_from(self, token_ids: list[int], first: int = 0) -> Iterator[Tensor]:
        """The rows of ``logits`` from position ``first`` on, float32 [at most 128, vocab_size] at a
        time, on the runtime's device.

        Memory grows with neither the tokens nor the vocabulary.  Pieces end at multiples of 128
        positions, so that those of two runtimes match.  Raises as ``logits`` does.
        """
        self._begin(token_ids, len(token_ids))
        position = 0
        for hidden_TD, changes in self.sequences[0].run_counted(token_ids):
            for start in range(0, len(hidden_TD), _ROWS_OF_TEXT):
                if position + start + _ROWS_OF_TEXT > first:
                    rows_TD = hidden_TD[max(start, first - position) : start + _ROWS_OF_TEXT]
                    with self.passes.using(changes):
                        logits_RV = self.passes.logits(rows_TD)
                    yield logits_RV
            position += len(hidden_TD)

    def encode(self, text: str, chat: bool = False) -> list[int]:
        """Token ids of a prompt or, with ``chat``, of a user's message in the model's chat
        template.  Raises as ``check_length`` does."""
        self.check_length(len(text))
        message = {"role": "user", "content": text}
        return self.tokenizer.encode(self.tokenizer.chat([message]) if chat else text)

    def check_length(self, characters: int) -> None:
        """Raise ``PlanError`` where no context can hold a text of so many ``characters``; to find
        out how many tokens a long text has takes seconds and memory."""
        context, longest = self.context, self.tokenizer.longest
        if characters > context * longest:
            held = f"the context holds {context} tokens of at most {longest} characters"
            advice = or_more_context("shorten the prompt", self.config, context)
            raise PlanError(f"the prompt has {characters} characters, and {held}; {advice}")

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
            prompt = self.encode(prompt, chat)
        check_ids(prompt)
        prompt = [*prompt]
        held = self._begin(prompt, len(prompt) + 1, reuse=True)
        kept = len(held)

        def step(ids: list[int]) -> Tensor:
            nonlocal held
            with self.passes.using():
                if sequence.tokens is not held:
                    raise ConfigError(SUPERSEDED)
                logits_1V = self.model.device.download(sequence.extend(ids)).get()
                held = sequence.tokens
            if self.sessions is not None:
                self.sessions.keep(sequence, added=len(ids))
            return logits_1V

        room, eos = sequence.context - len(prompt), self.eos_token_ids
        count = room if max_new_tokens is None else min(max_new_tokens, room)
        limit = "length" if count == max_new_tokens else "context"
        return generate(step, prompt[kept:], self.tokenizer, count, eos, sampling, limit)

    def append_each(self, sequences: Sequenced[Sequence], ids: list[int]) -> Tensor:
        """Append one id to each of several sequences in one pass, so that an expert brought for one
        serves all: logits, float32 [len(ids), vocab_size].  With the native kernels each row is
        bitwise what ``Sequence.append`` alone gives."""
        with self.passes.using():
            return self.passes.decode(sequences, ids)

    def _begin(self, ids: list[int], needed: int, reuse: bool = False) -> list[int]:
        """Begin a text on the first sequence, with ``reuse`` from what that holds of it: the
        sequence's tokens.  Earlier texts are superseded.  Raises ``ConfigError`` or
        ``PlanError``."""
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
        with self.passes.using():
            # The last token is computed in any case: its logits are needed.
            kept = shared_prefix(sequence.tokens, ids[:-1]) if reuse else 0
            sequence.cut(kept)
        if reuse and self.sessions is not None:
            self.sessions.restore(sequence, ids[:-1])
        return sequence.tokens

    def keep_in(
        self, folder: str | Path, limit: int | str = DEFAULT_LIMIT, notify: Notify = ignore
    ) -> None:
        """Keep the latents of texts in ``folder`` from now on, at most ``limit`` bytes of them, and
        compute nothing again that is there of a prompt.  ``notify`` gets a line where a file is
        damaged or can't be written.  Raises ``ConfigError`` or ``PlanError``."""
        self.sessions = Sessions(self.model, Path(folder), limit, notify)

    def keep(self) -> None:
        """Keep the text that ``generate`` made last, which may have been interrupted, to its last
        token; the blocks of 64 tokens that it has filled are there already."""
        if self.sessions is not None:
            self.sessions.keep(self.sequences[0])

    @property
    def model(self) -> LoadedModel:
        """The open model's parts.  Raises ``ConfigError`` after ``close`` and in a forked child."""
        return self.passes.model

    @property
    def sequences(self) -> list[Sequence]:
        """One for each latent cache.  Raises as ``model`` does."""
        self.model.using.check()
        return self._sequences

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
        with self.passes.using():
            self.model.experts.fill(progress or (lambda done, total: None))

    def trace(self, path: str | Path) -> None:
        """Record the routing of everything from now on into ``path`` (format:
        ``slotmoe.offload.observe.trace``), until ``close``."""
        experts, c = self.model.quantized("trace"), self.config
        geometry = c.moe_layers, c.n_routed_experts, c.num_experts_per_tok
        self._trace = trace = TraceWriter(Path(path), *geometry)

        def on_layer(route: Route) -> None:
            assert route.x_TD is not None
            x_TD = route.x_TD.cpu().numpy()
            trace.add(c.moe_layers[route.row], route.indices, x_TD, route.behind)

        experts.on_layer(on_layer, inputs=True)

    def stats(self) -> Json:
        """Counters so far: ``tokens`` (counts and seconds), ``cache``, ``io`` (bytes and seconds by
        tier), ``memory``, ``misses`` with a GPU, ``sessions`` where they are kept, ``drafts``,
        ``routing`` where options change the text, and ``device``: which, and why it was taken."""
        model, plan, on_device = self.model, self.plan, self.model.device.memory()
        memory: dict[str, Any] = {"plan": dict(plan.components), "budget": plan.budget}
        memory["tier"] = plan.tier
        if plan.host:
            memory["host_plan"] = dict(plan.host)
        memory["peak_rss"] = peak_rss()
        if on_device is not None:
            memory |= {"peak_vram": on_device.peak, "reserved_vram": on_device.reserved}
            memory["beside_vram"] = on_device.beside
        tokens = {**self.passes.tokens, **self.passes.seconds}
        stats: Json = {"tokens": tokens, "memory": memory}
        stats["kernels"] = model.backend.name
        stats["device"] = {"name": model.device.name, "why": model.device_reason}
        drafting = self.passes.drafting
        stats["drafts"] = dict(zip(("kind", "why"), model.draft, strict=True))
        stats["drafts"] |= {} if drafting is None else drafting.stats()
        stats |= model.experts.stats()
        if model.store is not None:
            stats["io"] = model.store.stats()
        if self.sessions is not None:
            stats["sessions"] = self.sessions.stats()
        if model.options.altered is not None:
            substitution = model.experts.substitution
            counts = {} if substitution is None else substitution.chooser.stats()
            stats["routing"] = {"altered": model.options.altered, **counts}
        return stats

    def close(self) -> None:
        """Release files and memory; the runtime can't be used afterwards.

        From another thread it ends what is computed there, with a ``ConfigError``.
        """
        self.passes.close()
        self._sequences = []
        if self._trace is not None:
            self._trace.close()

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
