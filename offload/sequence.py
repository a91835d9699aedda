"""Forward passes over sequences, and what they leave in each one's latent cache."""

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sequenced
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slotmoe.errors import CLOSED, ConfigError
from slotmoe.model.kv_cache import LatentCache
from slotmoe.offload.experts.disk import STUCK_SECONDS
from slotmoe.offload.loading import LoadedModel
from slotmoe.offload.mtp_drafts import HeadDrafts
from slotmoe.offload.policy.drafts import MOST_DRAFTED, Drafting, NGrams
from slotmoe.sizes import format_size

ROWS_AT_ONCE = 16  # rows of logits that ``Sequence.append_rows`` makes at once
SUPERSEDED = "this generation was superseded: a Runtime holds one sequence at a time"


class Passes:
    """Runs passes of an open model, for one thread at a time, and counts them.

    ``watcher`` is a ``slotmoe.offload.observe.profiler.Profiler`` or None.  ``changes`` counts
    passes and other changes of what a sequence holds.  ``drafting`` is None where nothing is
    drafted.
    """

    def __init__(self, model: LoadedModel):
        self._model: LoadedModel | None = model
        self.watcher: Any = None
        model.experts.look = model.using.stop
        self.drafting = Drafting(model.plan.drafted) if model.draft[0] != "off" else None
        self.changes = 0
        self.tokens = dict.fromkeys(("prefill_tokens", "decode_tokens"), 0)
        self.seconds = dict.fromkeys(("prefill_seconds", "decode_seconds"), 0.0)

    @property
    def model(self) -> LoadedModel:
        """The open model.  Raises ``ConfigError`` after ``close``, and in a forked child."""
        if self._model is None:
            raise ConfigError(CLOSED)
        self._model.using.check()
        return self._model

    @contextmanager
    def using(self, changes: int | None = None) -> Iterator[None]:
        """The calling thread alone uses the model, and nothing has happened since there were so
        many ``changes``.  Raises ``ConfigError``.  Blocks do not nest."""
        with self.model.using:
            if changes not in (None, self.changes):
                raise ConfigError(SUPERSEDED)
            yield

    @contextmanager
    def counted(self, kind: str, tokens: int) -> Iterator[None]:
        """Count the tokens and the seconds of what happens inside, and let it be watched."""
        started = time.perf_counter()
        if self.watcher is not None:
            self.watcher.begin(self._moved())
        yield
        self.tokens[f"{kind}_tokens"] += tokens
        self.seconds[f"{kind}_seconds"] += time.perf_counter() - started
        if self.watcher is not None:
            self.watcher.end(kind, tokens, self._moved())

    def decode(self, sequences: Sequenced["Sequence"], ids: list[int]) -> Tensor:
        """Append one id to each of ``sequences`` in one pass: logits, float32 [len(ids),
        vocab_size].  What is drafted behind them is computed too, for ``Sequence.follow``."""
        with self.counted("decode", len(ids)):
            drafts, started = self._drafts(sequences, ids), time.perf_counter()
            rows = [[id, *draft] for id, draft in zip(ids, drafts, strict=True)]
            count = sum(map(len, rows))
            hidden_TD = self.forward(sequences, rows, drafts)
            logits_TV = self.logits(hidden_TD, each=count > 1)
        if self.drafting is not None:
            self.drafting.measured(count, count - len(ids), time.perf_counter() - started)
        if count == len(ids):
            return logits_TV
        parts = logits_TV.split([*map(len, rows)])
        for sequence, draft, rows_RV in zip(sequences, drafts, parts, strict=True):
            sequence.ahead = Ahead(sequence.tokens, draft, rows_RV[1:])
        return torch.stack([rows_RV[0] for rows_RV in parts])

    def _drafts(self, sequences: Sequenced["Sequence"], ids: list[int]) -> list[list[int]]:
        """What to compute of each sequence behind its next id."""
        if self.drafting is None:
            return [[] for _ in sequences]
        drafts = [sequence.draft(id) for sequence, id in zip(sequences, ids, strict=True)]
        lengths = self.drafting.lengths([chances for _, chances in drafts])
        return [tokens[:length] for (tokens, _), length in zip(drafts, lengths, strict=True)]

    def forward(
        self,
        sequences: Sequenced["Sequence"],
        ids: Sequenced[list[int]],
        drafts: Sequenced[list[int]] = (),
    ) -> Tensor:
        """One pass over ``ids`` of each sequence, which end with its draft, if there are
        ``drafts``.  Returns the residual stream after the last layer, float32 [T, D].

        A pass that raises can be repeated, whichever line it was in: a sequence's ``tokens`` say
        what its latent cache holds, and ``Experts.begin`` puts the experts right.  What is drafted
        does not belong to them.
        """
        model, counts = self.model, [*map(len, ids)]
        ids_T = model.device.upload(torch.tensor([id for row in ids for id in row]))
        caches = [sequence.cache for sequence in sequences]
        self.changes += 1
        for sequence in sequences:
            sequence.ahead = None  # its latents are overwritten

        def step() -> Tensor:
            for sequence, cache in zip(sequences, caches, strict=True):
                cache.length = len(sequence.tokens)
            if model.experts.begin(len(ids_T), len(sequences)):
                self._guess_token(sequences[0], ids_T)
            return model.network.forward(ids_T, caches, counts)

        hidden_TD = self.compute(step)
        drafted = [len(draft) for draft in drafts] or [0] * len(ids)
        parts = list(zip(sequences, ids, drafted, hidden_TD.split(counts), strict=True))
        befores = [sequence.last_hidden() for sequence in sequences]
        for sequence, row, more, rows_RD in parts:
            sequence.tokens = sequence.tokens + row[: len(row) - more]
            sequence.hidden = len(sequence.tokens), rows_RD[-1 - more :].clone()
        if model.head is not None:
            for before, (sequence, row, more, rows_RD) in zip(befores, parts, strict=True):
                if len(row) - more > 1:  # of decode it reads where it drafts
                    sequence.show_head(before, rows_RD[: -1 - more])
        return hidden_TD

    def logits(self, hidden_TD: Tensor, each: bool = False) -> Tensor:
        """Logits of rows of the residual stream, float32 [T, vocab_size]; with ``each`` a row is
        bitwise what it gives alone."""
        network = self.model.network
        head = network.head_each if each else network.head
        return self.compute(lambda: head(hidden_TD))

    def compute(self, step: Callable[[], Tensor]) -> Tensor:
        """What ``step`` gives, computed.  Raises ``DeviceError``."""
        model = self.model
        ways_out = f"a lower --vram (now {format_size(model.plan.budget)}) or --context"
        return model.device.run(step, ways_out)

    def _guess_token(self, sequence: "Sequence", ids_1: Tensor) -> None:
        """Let the lookahead guess a token's experts from its embedding and the last hidden state
        before it."""
        model, hidden_RD = self.model, sequence.last_hidden()
        if hidden_RD is None:
            return
        assert model.experts.lookahead is not None
        embedding_1D = model.backend.embed(ids_1, model.network.embed_tokens)
        model.experts.lookahead.guess_token(embedding_1D[0], hidden_RD[-1])

    def _moved(self) -> dict[str, int]:
        """Bytes that came from each slower tier so far."""
        store = self.model.store
        return {} if store is None else {name: io["bytes"] for name, io in store.stats().items()}

    def close(self) -> None:
        """Let every later use raise, end the pass that another thread computes, with a
        ``ConfigError`` there, and release files and memory.

        A disk that does not answer is waited for some seconds.  In a forked child only files are
        closed: threads, locks and the GPU are the parent's.
        """
        model = self._model
        if model is None:
            return
        model.using.refuse()
        if model.using.forked:
            model.source.close()
        else:
            if model.store is not None:
                model.store.stop()
            model.using.wait(STUCK_SECONDS)
            model.opened.close()
        self._model = None


class Ahead(NamedTuple):
    """Logits behind a draft's tokens, float32 [R, vocab_size].  They count, and so do the latents
    behind those of the sequence's tokens, as long as these are ``behind`` itself."""

    behind: list[int]
    draft: list[int]
    logits_RV: Tensor


class Sequence:
    """One sequence: its latent cache and the tokens whose latents that holds.

    ``tokens`` is the truth, and another list after each change: a pass that is interrupted has
    written rows behind them, which mean nothing.  A token id of -1 is unknown.
    """

    def __init__(self, passes: "Passes", cache: LatentCache):
        self._passes, self.cache = passes, cache
        self.tokens: list[int] = []
        # The residual stream after the last of so many tokens, and after those that were drafted
        # behind it, float32 [R, D].
        self.hidden: tuple[int, Tensor] = 0, torch.empty(0, 0)
        self.ahead: Ahead | None = None
        self._ngrams = NGrams()
        self._head: HeadDrafts | None = None
        if passes.model.head is not None and passes.drafting is not None:
            self._head = HeadDrafts(passes.model, passes.compute, passes.drafting, cache.context)

    @property
    def length(self) -> int:
        """Positions that are cached.  Another thread may ask."""
        return len(self.tokens)

    @property
    def context(self) -> int:
        """Positions that the latent cache has room for."""
        return self.cache.context

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        with self._passes.using():
            self.cut(length)

    def cut(self, length: int) -> None:
        """``rewind`` for a caller that is inside ``Passes.using``."""
        self._passes.changes += 1
        self.tokens = self.tokens[:length]

    def take(self, source: "Sequence", length: int) -> None:
        """Become the first ``length`` tokens of ``source``, which may be this sequence."""
        with self._passes.using():
            tokens = source.tokens[:length]
            self.cut(length if source is self else 0)
            if source is not self:
                self.cache.copy(source.cache, length)
            self.tokens = tokens

    def latents(self, start: int, end: int) -> Tensor:
        """Bytes of the latents of those positions, uint8 [L, end - start, B] in RAM."""
        with self._passes.using():
            return self.cache.layers[:, start:end].cpu().contiguous().view(torch.uint8)

    def append_latents(self, ids: list[int], rows_LTB: Tensor) -> None:
        """Append ``ids`` whose latents were computed before: what ``latents`` gave of them."""
        with self._passes.using():
            tokens = self.tokens + ids
            self._passes.changes += 1
            self.cache.layers[:, self.length : len(tokens)].view(torch.uint8).copy_(rows_LTB)
            self.cache.written = max(self.cache.written, len(tokens))
            self.tokens = tokens

    def fill(self, depth: int) -> None:
        """Become ``depth`` unknown tokens with random latents: for measurements."""
        model, generator = self._passes.model, torch.Generator().manual_seed(0)
        with self._passes.using():
            self.cut(0)
            latent_SW = torch.randn(depth, model.config.latent_width, generator=generator)
            for rows_SX in self.cache.layers:
                model.backend.store_latents(
                    latent_SW.to(rows_SX.device), model.config.kv_lora_rank, rows_SX[:depth]
                )
            self.tokens = [-1] * depth

    def append(self, ids: list[int]) -> Tensor:
        """Append ``ids`` and return the last one's logits, float32 [1, vocab_size] on the model's
        device."""
        with self._passes.using():
            return self.extend(ids)

    def extend(self, ids: list[int]) -> Tensor:
        """``append`` for a caller that is inside ``Passes.using``."""
        passes = self._passes
        if self._kind(ids) == "decode":
            followed = self.followed(ids[0])
            return passes.decode([self], ids) if followed is None else followed
        with passes.counted("prefill", len(ids)):
            for piece in self._pieces(ids):
                last_1D = passes.forward([self], [piece])[-1:]
            return passes.logits(last_1D)

    def follow(self, id: int) -> Tensor | None:
        """``append`` without a pass, where ``id`` is what was drafted: logits, float32 [1,
        vocab_size].  Else None, and nothing changes."""
        with self._passes.using():
            return self.followed(id)

    def followed(self, id: int) -> Tensor | None:
        """``follow`` for a caller that is inside ``Passes.using``."""
        ahead, passes = self.ahead, self._passes
        if ahead is None or ahead.behind is not self.tokens or ahead.draft[:1] != [id]:
            return None
        passes.changes += 1
        passes.tokens["decode_tokens"] += 1
        assert passes.drafting is not None
        passes.drafting.accepted += 1
        if passes.watcher is not None:
            passes.watcher.followed()
        tokens = [*self.tokens, id]
        self.ahead = Ahead(tokens, ahead.draft[1:], ahead.logits_RV[1:])
        self.tokens = tokens
        return ahead.logits_RV[:1]

    def draft(self, id: int) -> tuple[list[int], list[float]]:
        """What may come behind ``id``, which is to be appended, as far as there is room, and how
        likely each token is."""
        tokens, room = [*self.tokens, id], self.context - self.length - 1
        if self._head is None:
            self._ngrams.read(tokens)
            return self._ngrams.draft(min(MOST_DRAFTED, room))
        hidden_RD = self.last_hidden()
        return ([], []) if room < 1 or hidden_RD is None else self._head.draft(tokens, hidden_RD)

    def last_hidden(self) -> Tensor | None:
        """The residual stream after the last layer behind the last token and those before it that
        came without a pass, float32 [R, D]; None where it is not known."""
        first, hidden_RD = self.hidden
        behind = len(self.tokens) - first
        return hidden_RD[: behind + 1].clone() if 0 <= behind < len(hidden_RD) else None

    def show_head(self, before: Tensor | None, hidden_RD: Tensor) -> None:
        """Let the head that predicts one token more read a prompt: ``hidden_RD`` is the residual
        stream behind the tokens before the last, and ``before`` that behind earlier ones."""
        assert self._head is not None
        parts = [hidden_RD] if before is None else [before, hidden_RD]
        self._head.read(self.tokens, torch.cat(parts))

    def append_rows(self, ids: list[int]) -> Iterator[Tensor]:
        """``append``, with the logits of every id: float32 [at most ``ROWS_AT_ONCE``, vocab_size]
        at a time.  Nothing else may be computed until the last of them is taken."""
        passes = self._passes
        with passes.counted(self._kind(ids), len(ids)):
            for hidden_TD, changes in self.run_counted(ids):
                for rows_RD in hidden_TD.split(ROWS_AT_ONCE):
                    with passes.using(changes):
                        logits_RV = passes.logits(rows_RD, each=True)
                    yield logits_RV

    def run(self, ids: list[int]) -> Iterator[Tensor]:
        """Append ``ids`` pass by pass: the residual stream after the last layer, float32 [T, D],
        which lasts until the next pass."""
        return (hidden_TD for hidden_TD, _ in self.run_counted(ids))

    def run_counted(self, ids: list[int]) -> Iterator[tuple[Tensor, int]]:
        """``run``, with ``Passes.changes`` after each pass."""
        passes, changes = self._passes, None
        for piece in self._pieces(ids):
            with passes.using(changes):
                hidden_TD = passes.forward([self], [piece])
                changes = passes.changes
            yield hidden_TD, changes

    def _pieces(self, ids: list[int]) -> list[list[int]]:
        """What each pass takes."""
        chunk = self._passes.model.plan.prefill_chunk
        return [ids[start : start + chunk] for start in range(0, len(ids), chunk)]

    def _kind(self, ids: list[int]) -> str:
        return "decode" if len(ids) == 1 and self.tokens else "prefill"


def shared_prefix(cached: list[int], prompt: list[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    limit = min(len(cached), len(prompt))
    if cached[:limit] == prompt[:limit]:
        return limit
    return next(index for index in range(limit) if cached[index] != prompt[index])
