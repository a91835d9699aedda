"""A conversation with a model: its messages, and what of them fits the context.

When the context is full, the oldest exchanges are no longer sent, until half of it is free again:
whenever the beginning changes, all that follows has to be read anew, so this must be rare.  The
system message always stays, and everything stays in a session.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from slotmoe.errors import ConfigError, PlanError
from slotmoe.jsonfile import Json
from slotmoe.model.chat import render_chat
from slotmoe.model.sampling import Sampling
from slotmoe.offload.engine.requests import Stream
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.sessions.names import NamedSession, Saved
from slotmoe.signals import Stopping
from slotmoe.tools.options import SAMPLING
from slotmoe.tools.run import of_budget

# Of the statistics, those that an answer's status counts: (group, name).
_DECODED = (("tokens", "decode_tokens"), ("tokens", "decode_seconds"))
_COUNTS = (*_DECODED, ("cache", "hits"), ("cache", "misses"))


class Exchange(NamedTuple):
    """A message and the model's answer to it."""

    user: str
    assistant: str


class Dialogue:
    """Messages so far, and how to answer the next one.

    The first answer is sampled with the seed of ``sampling``, the next one with the seed after it,
    so that another attempt differs.  ``notify`` gets remarks for the user, ``think`` the reasoning
    before an answer, which is not kept.  The conversation goes on with ``session``, a chat's, and
    each answer is kept there.  Raises ``ConfigError`` if the model has no chat template, or one
    that fails with this ``system`` message.
    """

    def __init__(
        self,
        runtime: Runtime,
        max_new_tokens: int,
        sampling: Sampling,
        system: str | None = None,
        session: NamedSession | None = None,
        stop: Sequence[str] = (),
    ):
        self.runtime, self.system = runtime, system
        self.exchanges: list[Exchange] = []
        self.forgotten = 0  # exchanges, the oldest ones, that are no longer sent
        self.notify: Callable[[str], None] = lambda text: None
        self.think: Callable[[str], None] = lambda text: None
        self._max_new_tokens, self._sampling = max_new_tokens, sampling
        self._before: Json | None = None  # statistics when the latest answer began
        self._stream: Stream | None = None  # the latest answer's
        self._tokens: list[int] = []  # of its prompt, and of the answer so far
        self._session, self._stop = session, stop
        if session is not None and (saved := session.saved) is not None:
            kept, self.exchanges = _parse(session.path, saved.messages)
            self.system = kept if system is None else system
            self.forgotten = min(saved.forgotten, len(self.exchanges))
        self._ids(self.system, [], "Hello")

    def answer(self, message: str, again: bool = False) -> Generator[str, None, None]:
        """The answer to ``message`` in pieces, stripped; ``again`` replaces the last exchange.

        An answer that is stopped, by closing this, a signal (which is raised from here) or an
        exception, is kept as far as it came; if that is nowhere, nothing has changed.  Raises
        ``PlanError`` if the message does not fit into the context.
        """
        self._before, self._stream = self.runtime.stats(), None
        with Stopping(lambda _: self._close()) as self._stopping:
            try:
                yield from self._answer(message, self.exchanges[:-1] if again else self.exchanges)
            finally:
                self._close()
                self._keep()
        self._stopping.check()

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _keep(self) -> None:
        """Keep the conversation in its session; the engine keeps what was computed of it."""
        if self._session is None or not self.exchanges:
            return
        sessions, tokens = self.runtime.sessions, self._tokens
        assert sessions is not None
        messages = _messages(self.system, self.exchanges)
        try:
            self._session.save(Saved(sessions.root(), tokens, "chat", messages, self.forgotten))
        except ConfigError as problem:  # a full disk must not end the chat
            self.notify(str(problem))

    def _answer(self, message: str, earlier: list[Exchange]) -> Generator[str, None, None]:
        prompt = self._fit(earlier, message)
        self._tokens = [*prompt]
        limit = min(self._max_new_tokens, self.runtime.context - len(prompt))
        chosen, text, thoughts = self._sampling, "", list[str]()
        if chosen.seed is not None:
            self._sampling = replace(chosen, seed=(chosen.seed + 1) % (1 << 63))
        sampling = {name: getattr(chosen, name) for name in SAMPLING}
        splitter = self.runtime.tokenizer.splitter(prompt)

        def split(piece: str, is_last: bool = False) -> str:
            thought, said = splitter.feed(piece, is_last)
            thoughts.append(thought)
            self.think(thought)
            return said

        def texts() -> Iterator[str]:
            self._stream = self.runtime.generate(prompt, limit, **sampling, stop=self._stop)
            if self._stopping.number:  # before there was a stream to close
                self._close()
            for token in self._stream:
                self._tokens.append(token.id)
                yield split(token.text)
            self._stopping.check()
            yield split("", is_last=True)

        for piece in trimmed(texts()):
            text += piece
            self.exchanges = [*earlier, Exchange(message, text)]
            yield piece
        self.exchanges = [*earlier, Exchange(message, text)]
        count = len(self._tokens) - len(prompt)
        if not text and not any(thoughts):
            self.notify("the model gave an empty answer")
        elif count == self._max_new_tokens:
            self.notify(f"the answer was stopped after {count} tokens (--max-new-tokens)")
        elif count == limit:
            advice = "your next message makes room in it"
            self.notify(f"the answer was stopped because the context is full; {advice}")

    def regenerate(self) -> Generator[str, None, None]:
        """Another answer to the last message.  Raises ``ConfigError`` if there is none."""
        if not self.exchanges:
            raise ConfigError("there is no answer yet that could be made again")
        return self.answer(self.exchanges[-1].user, again=True)

    def reset(self) -> None:
        """Forget all messages but the system's."""
        self.exchanges, self.forgotten, self._before = [], 0, None

    def set_system(self, text: str | None) -> None:
        """Another system message, or none.  Raises ``ConfigError`` if the template refuses it."""
        self._ids(text, [], "Hello")
        self.system = text

    def status(self) -> str:
        """One line about the latest answer, memory and context."""
        stats, before, facts = self.runtime.stats(), self._before, list[str]()
        position, stream = len(self._tokens), self._stream
        if stream is not None and not (stream.request.first_token or stream.ended):
            position, seconds = stream.request.read, time.monotonic() - stream.request.submitted
            total = len(stream.request.prompt)
            facts.append(f"reading {position:,} of {total:,} tokens, {seconds:.0f} s")
        if before is not None:
            counts = (stats[group][name] - before[group][name] for group, name in _COUNTS)
            tokens, seconds, hits, misses = counts
            if tokens:
                facts.append(f"{tokens / seconds:.1f} tokens/s")
            if hits or misses:
                facts.append(f"{hits / (hits + misses):.0%} hits")
        facts.append(f"{stats['memory']['tier']} {of_budget(stats['memory'])}")
        facts.append(f"context {position:,} of {self.runtime.context:,}")
        return " · ".join(facts)

    def _fit(self, exchanges: list[Exchange], message: str) -> list[int]:
        """Token ids of ``message`` after the system's and the newest ``exchanges`` that fit."""
        context = self.runtime.context
        room = min(self._max_new_tokens, context // 4)
        sent, dropped = exchanges[self.forgotten :], 0

        def without(oldest: int) -> list[int]:
            return self._ids(self.system, sent[oldest:], message)

        ids = without(0)
        if len(ids) + room > context and sent:
            # Where half has no place for the newest exchange, as few as necessary are dropped.
            for limit in (context // 2, context - room):
                later = range(1, len(sent))
                dropped = 1 + bisect_left(later, -limit, key=lambda oldest: -len(without(oldest)))
                if dropped < len(sent):
                    break
            ids = without(dropped)
        if len(ids) + room > context:
            problem = f"the message has {len(ids)} tokens together with the system message, and "
            problem += f"{context - room} fit: the context holds {context}, of which {room} are for"
            advice = "shorten the message, or start with a larger --context"
            raise PlanError(f"{problem} the answer; {advice}")
        if dropped:
            self.forgotten += dropped
            oldest = "exchange is" if dropped == 1 else f"{dropped} exchanges are"
            self.notify(f"the context is full: the oldest {oldest} no longer seen by the model")
        return ids

    def _ids(self, system: str | None, exchanges: list[Exchange], message: str) -> list[int]:
        tokenizer = self.runtime.tokenizer
        self.runtime.check_length(len(system or "") + len(message))
        messages = [*_messages(system, exchanges), {"role": "user", "content": message}]
        return tokenizer.encode(render_chat(tokenizer, messages))


def _messages(system: str | None, exchanges: list[Exchange]) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for user, assistant in exchanges:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return messages


def _parse(path: Path, messages: list[dict[str, str]]) -> tuple[str | None, list[Exchange]]:
    """System message and exchanges of a session's file.  Raises ``ConfigError``."""
    system, texts = None, list[str]()
    for number, message in enumerate(messages):
        where, role, content = f"{path}: messages[{number}]", message["role"], message["content"]
        if any("\ud800" <= sign <= "\udfff" for sign in content):
            raise ConfigError(f"{where}.content: is {content!r:.80}, expected Unicode text")
        expected = ("user", "assistant")[len(texts) % 2]
        if number == 0 and role == "system":
            system = content
        elif role == expected:
            texts.append(content)
        else:
            raise ConfigError(f"{where}.role: is {role!r:.40}, expected {expected!r} here")
    if len(texts) % 2:
        raise ConfigError(f"{where}: is a message without an answer; add one, or remove it")
    return system, [Exchange(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]


def trimmed(pieces: Iterable[str]) -> Iterator[str]:
    """The same text without whitespace at its ends, as early as possible."""
    waiting, begun = "", False
    for piece in pieces:
        text = waiting + piece if begun else piece.lstrip()
        known = text.rstrip()
        waiting = text[len(known) :]
        if known:
            begun = True
            yield known
