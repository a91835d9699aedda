"""The errors that a user can cause, under one base, what may be shown of strangers' text, and what
an error ends."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, get_args, get_origin

CLOSED = "this Runtime is closed; open the model again"
_COMMANDING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
P = ParamSpec("P")
T = TypeVar("T")


def informs(call: Callable[P, T]) -> Callable[P, T | None]:
    """``call`` for what only informs somebody: an error in it ends nothing, and the log has the
    first one.  Every remark, progress, listener, log line and metric goes through this."""
    failed = False

    @wraps(call)
    def informing(*given: P.args, **named: P.kwargs) -> T | None:
        nonlocal failed
        try:
            return call(*given, **named)
        except Exception as problem:
            if not failed:
                failed = True  # first: the log may be what fails
                with suppress(Exception):
                    import logging

                    told = "%r failed, which only informs, so the work goes on: %r"
                    logging.getLogger("slotmoe").warning(told, call, problem)
            return None

    return informing


def visible(text: str) -> str:
    """``text`` with codes for characters, but line feeds and tabs, that command a terminal."""
    return _COMMANDING.sub(lambda match: repr(match[0])[1:-1], text)


def one_line(text: object) -> str:
    """The same on one line: line feeds, tabs and all that is not printable have codes too."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


class SlotmoeError(ValueError):
    """Base of every error that bad input, a bad file or an impossible request can cause.

    Messages quote names from files of strangers, so control characters are escaped: they neither
    break the line nor reach the terminal, and what is very long loses its middle.
    """

    def __init__(self, message: str):
        plain = one_line(message)
        super().__init__(plain if len(plain) < 1000 else f"{plain[:600]} … {plain[-300:]}")


class ConfigError(SlotmoeError):
    """A ``config.json``, tokenizer or option that is malformed or asks for what is unsupported."""


class CheckpointError(SlotmoeError):
    """A source checkpoint whose files are missing, damaged or not what its config promises."""


class ExportError(SlotmoeError):
    """A damaged, truncated or mismatched export, or a destination that can't take one."""


class PlanError(SlotmoeError):
    """A request that can't fit: budgets, context or prompt length."""


class PromptError(PlanError):
    """A prompt that the context can't hold, of so many ``tokens`` at least."""

    def __init__(self, message: str, tokens: int):
        super().__init__(message)
        self.tokens = tokens


class DeviceError(SlotmoeError):
    """A GPU that failed at work, or whose memory another program took.  (Exit code 1.)"""


class DownloadError(SlotmoeError):
    """A download that network or server made fail; the same command resumes it.  (Exit code 1.)"""


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
_WORDS |= {NoneType: "None", Path: "a path"}
_WIDE: dict[type, type] = {int: Integral, float: Real, tuple: Sequence}


def check_types(values: Mapping[str, object], types: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for the first of ``values`` that is of none of its ``types``, which are
    annotations.  Numbers may be numpy's; texts are no lists, and truth values no numbers."""
    for name, value in values.items():
        of = types[name]
        kinds = [get_origin(t) or t for t in (get_args(of) if isinstance(of, UnionType) else [of])]
        wide = tuple(_WIDE.get(kind, kind) for kind in kinds)
        own = next((kind for kind in (bool, str, bytes) if isinstance(value, kind)), None)
        if not (isinstance(value, wide) if own is None else own in kinds):
            expected = " or ".join(_WORDS.get(kind, "a list") for kind in kinds)
            raise ConfigError(f"{name} is {value!r:.40}, expected {expected}")


@contextmanager
def naming(path: object) -> Iterator[None]:
    """An ``OSError`` meanwhile, of a call that knows a file by its number, names ``path``."""
    try:
        yield
    except OSError as problem:
        problem.filename = problem.filename or str(path)
        raise


@contextmanager
def refused(path: Path, error: type[SlotmoeError], what: str, advice: str = "") -> Iterator[None]:
    """The system's refusals meanwhile are an ``error`` that names ``path``."""
    try:
        yield
    except OSError as problem:
        raise error(f"{path}: {what} ({problem.strerror or problem}){advice}") from None


reading = partial(refused, what="can't be read")
"""While a path is read: rights, too many open files and a bad disk do not call it damaged."""
