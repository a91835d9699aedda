"""The errors that a user can cause, under one base."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLOSED = "this Runtime is closed; open the model again"


class SlotmoeError(ValueError):
    """Base of every error that bad input, a bad file or an impossible request can cause.

    Messages quote names from files of strangers, so control characters are escaped: they neither
    break the line nor reach the terminal, and what is very long loses its middle.
    """

    def __init__(self, message: str):
        plain = "".join(one if one.isprintable() else repr(one)[1:-1] for one in message)
        super().__init__(plain if len(plain) < 1000 else f"{plain[:600]} … {plain[-300:]}")


class ConfigError(SlotmoeError):
    """A ``config.json``, tokenizer or option that is malformed or asks for something
    unsupported."""


class CheckpointError(SlotmoeError):
    """A source checkpoint whose files are missing, damaged or not what its config promises."""


class ExportError(SlotmoeError):
    """An export that is damaged, truncated, mismatched or half-written, or a destination that can't
    take one."""


class PlanError(SlotmoeError):
    """A request that can't fit: budgets, context or prompt length."""


class DeviceError(SlotmoeError):
    """A graphics card that failed at work, or whose memory another program took.  The command line
    exits with 1."""


class DownloadError(SlotmoeError):
    """A download that the network or the server made fail; the same command resumes it.  The
    command line exits with 1."""


@contextmanager
def reading(path: Path, error: type[SlotmoeError]) -> Iterator[None]:
    """While ``path`` is read: what the system refuses (rights, too many open files, a bad disk) is
    an ``error`` that names the file and does not call it damaged."""
    try:
        yield
    except OSError as problem:
        raise error(f"{path}: can't be read ({problem.strerror or problem})") from None
