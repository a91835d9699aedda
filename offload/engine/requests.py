"""What goes into the engine's thread and what comes out: a ``Request`` and its deltas.

An exception may strike between any two lines of a thread that waits for deltas.  So nothing of the
engine lies here: a client puts requests into a queue, takes deltas out of another, and sets a flag.
"""

import json
import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from numbers import Integral
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias, TypedDict, TypeVar, cast

from torch import Tensor

from slotmoe.errors import CLOSED, ConfigError
from slotmoe.jsonfile import Json
from slotmoe.model.generate import Answer, Delta, Token

# A wait is a loop of waits of so many seconds: some systems let no signal end a wait for a lock,
# and none lets one that came just before it began.
_WAIT_SECONDS = 0.1
# Tokens of so many seconds, or of this share of a text's age, are taken together: to wake a thread
# for each costs the engine's thread, which shares Python's lock with it, 40 us.
_TOGETHER_SECONDS, _TOGETHER_SHARE = 0.005, 0.05
T = TypeVar("T")
Messages = Sequence[Mapping[str, Any]]


class Forced:
    """A ``Sampler`` of known ``ids``, decoded as if a model had chosen them.  It notes one more
    than these: the ``moments`` (of ``time.perf_counter()``) at which it could choose, and if it
    ``keeps`` them logits, float32 [vocab_size]."""

    def __init__(self, ids: Sequence[int], keeps: bool = False):
        self.ids: list[int] = []
        self._left, self._keeps = deque(ids), keeps
        self.moments: list[float] = []
        self.logits: list[Tensor] = []

    def score(self, token_id: int, logits_V: Tensor | None) -> None:
        """Its prompt is never scored."""

    def take(self, logits_V: Tensor) -> Delta:
        self.moments.append(time.perf_counter())
        if self._keeps:
            self.logits.append(logits_V.clone())
        if not self._left:
            return self.end("length")
        self.ids.append(self._left.popleft())
        return Delta("", ())

    def end(self, finish: str, error: str = "") -> Delta:
        return Delta("", (), finish, error=error)


Sampler: TypeAlias = Answer | Forced
"""Chooses an answer's tokens."""


@dataclass(eq=False)
class Request:
    """A prompt and what is wanted of it.  ``emit`` gets each delta, the last one with a finish.

    Besides those of the sampler, ``Delta.finish`` is ``shutdown``, ``cancelled``, ``error``, or
    ``refused`` for a grammar that can't be followed to its end, where the engine ended it;
    ``problem`` is then what was raised.  Without an ``answer`` it ends behind the prompt.  Only
    prompts of the same ``owner`` share latents.

    All tokens from ``first`` on are computed, also where latents are at hand: of a prompt that is
    ``scored`` those that ``answer.score`` gets logits of, else those of which ``hidden`` gets the
    residual stream after the last layer, float32 [T, D], pass by pass.

    A request whose ``client`` is gone is cancelled.  Times are ``time.monotonic()``.
    """

    prompt: list[int]
    answer: Sampler | None
    emit: Callable[[Delta], None] = lambda delta: None
    owner: str = ""
    scored: bool = False
    hidden: Callable[[Tensor], None] | None = None
    first: int = -1  # -1 is the prompt's last token, whose logits are needed
    client: Callable[[], object] = lambda: True
    cancelled: str = ""  # the finish that is wanted now; within a layer it ends
    allows: int = 0  # what others that overtake its prompt may still cost it, in tokens
    reused: int = 0  # tokens of the prompt that were cached already
    read: int = 0  # tokens of the prompt that are read by now, those of a pass by its layers
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    first_token: float = 0.0
    problem: BaseException | None = None
    wake: Callable[[], None] = lambda: None  # the engine, which sets this and the next
    alive: Callable[[], bool] = lambda: True

    def __post_init__(self) -> None:
        if self.first < 0:
            self.first = 0 if self.scored else len(self.prompt) - 1

    @property
    def reusable(self) -> list[int]:
        """The beginning of the prompt that need not be computed."""
        return self.prompt[: self.first]

    @property
    def unwanted(self) -> str:
        """The finish that is wanted now, if any."""
        return self.cancelled or ("" if self.client() is not None else "cancelled")

    def cancel(self, finish: str = "cancelled") -> None:
        """Nobody wants the rest."""
        self.cancelled = self.cancelled or finish
        self.wake()

    @property
    def together(self) -> float:
        """Seconds in which deltas are better left to gather, where none is there."""
        return min(_TOGETHER_SECONDS, _TOGETHER_SHARE * (time.monotonic() - self.submitted))

    def end(self, finish: str, error: str = "") -> Delta:
        """The last delta."""
        return Delta("", (), finish) if self.answer is None else self.answer.end(finish, error)


def wait_for(queue: "SimpleQueue[T]", alive: Callable[[], bool], seconds: float = math.inf) -> T:
    """The next item of a queue that the engine fills while it is ``alive``.  Raises ``Empty`` after
    so many seconds, and ``ConfigError`` where nothing will come."""
    while True:
        was_alive = alive()
        try:
            return queue.get(timeout=min(_WAIT_SECONDS, seconds) if was_alive else 0.0)
        except Empty:
            seconds -= _WAIT_SECONDS
            if not was_alive:
                raise ConfigError(CLOSED) from None
            if seconds <= 0:
                raise


class Stream(Iterator[Token]):
    """The tokens of a text as they are made, those of a character when that is complete; the last
    one carries what is left, and ``limit``, if that ended the text.  ``close`` cancels it, and so
    does whatever interrupts a wait for the next one, and the end of all references to it.  ``how``
    are the fields of the ``request``."""

    def __init__(
        self, prompt: list[int], answer: Sampler | None, limit: str = "length", **how: Any
    ):
        deltas, calls = SimpleQueue[Delta](), list[Callable[[], None]]()

        def emit(delta: Delta) -> None:
            deltas.put(delta)
            for call in calls:
                call()

        self._deltas, self._limit = deltas, limit
        self.wake = calls  # which the engine's thread calls behind each delta
        self.request = Request(prompt, answer, emit, client=weakref.ref(self), **how)
        self._held, self._ready, self.ended = list[Token](), deque[Token](), False

    def _feed(self, delta: Delta) -> None:
        """Raises what has ended the text, if that was neither a token nor a limit."""
        self._held += delta.tokens
        if delta.finish is not None and not self.ended:  # what comes after ``close`` counts no more
            self.ended = True
            if delta.finish not in ("stop", "length"):
                raise self.request.problem or ConfigError(CLOSED)
            if self._held:  # a stop string may begin inside the last token
                finish, last = self._limit if delta.finish == "length" else None, self._held[-1]
                before = sum(len(token.text) for token in delta.tokens[:-1])
                text = delta.text[before:] if delta.tokens else last.text + delta.text
                self._held[-1] = replace(last, text=text, finish=finish)
        if delta.complete or self.ended:
            self._ready += self._held
            self._held = []

    def read(self) -> str:
        """The text that is left, when it has ended."""
        return "".join(token.text for token in self)

    def ready(self) -> Iterator[Token]:
        """The tokens that are there now.  Raises what the engine could not do."""
        with suppress(Empty):
            while not self.ended:
                self._feed(self._deltas.get_nowait())
        while self._ready:
            yield self._ready.popleft()

    def __next__(self) -> Token:
        self.wait()
        if self._ready:
            return self._ready.popleft()
        raise StopIteration

    def wait(self, seconds: float = math.inf) -> bool:
        """Whether the next token or the end comes in so many ``seconds``.  Raises as ``ready``."""
        try:
            while not (self._ready or self.ended):
                if self._deltas.empty():
                    time.sleep(self.request.together)
                self._feed(wait_for(self._deltas, self.request.alive, seconds))
        except Empty:
            return False
        except BaseException:  # also Ctrl-C: who does not wait any more wants no more
            self.close()
            raise
        return True

    def close(self) -> None:
        """Nobody wants the rest, and who waits for it goes on; signal handlers call this."""
        self.ended = True
        self.request.cancel()
        self._deltas.put(Delta("", (), "cancelled"))


class TextOptions(TypedDict, total=False):
    """The keywords of ``Runtime.generate`` that several texts share."""

    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    chat: bool
    tools: Sequence[Json] | None
    stop: str | Sequence[str]
    top_logprobs: int
    min_p: float | None
    repetition_penalty: float | None


def is_conversation(prompt: object) -> bool:
    """Whether these are messages, and no text or token ids."""
    return isinstance(prompt, Sequence) and isinstance(next(iter(prompt), None), Mapping)


def check_messages(messages: object, tools: object) -> None:
    """Raise ``ConfigError`` unless these are messages that a template can get, each with a ``role``
    and a ``content``, or with ``tool_calls``."""
    expected = "expected a list of messages, each with role and content, which are text"
    if not is_conversation(messages):
        raise ConfigError(f"messages is {messages!r:.60}, {expected}")
    for message in cast(Messages, messages):
        is_one = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not is_one or not (isinstance(message.get("content"), str) or message.get("tool_calls")):
            raise ConfigError(f"a message is {message!r:.60}, {expected}")
    try:
        json.dumps([messages, tools])
    except (TypeError, ValueError, RecursionError) as problem:
        reason = "hold what JSON can't, which is how a template gets them"
        raise ConfigError(f"messages or tools {reason} ({str(problem)[:80]})") from None


def ids_of(prompt: object) -> list[int]:
    """A prompt's token ids, also of an array or tensor.  Raises ``ConfigError`` unless it is a
    sequence of integers."""
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes | bytearray):
        expected = "expected a list of token ids, as encode(text) gives"
        raise ConfigError(f"the prompt is of the type {type(prompt).__name__}, {expected}")
    others = [item for item in prompt if type(item) is not int]
    strange = [it for it in others if isinstance(it, bool) or not isinstance(it, Integral)]
    if strange:
        problem = f"the prompt holds a {type(strange[0]).__name__}"
        problem += ", expected text or token ids, which are integers"
        if isinstance(strange[0], Mapping):
            problem += "; give a conversation as messages="
        elif isinstance(strange[0], str | Sequence):
            problem += "; generate_all takes several prompts"
        raise ConfigError(problem)
    return [*map(int, prompt)]
