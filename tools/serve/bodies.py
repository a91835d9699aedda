"""The bodies of requests before their fields are checked: JSON, with a bounded number of values."""

import json

from slotmoe.tools.serve.errors import RefusedError

MAX_VALUES = 1 << 18  # in one body; the longest prompt of DeepSeek-V2 has 163,840 token ids
MAX_KEYS = 1 << 16  # of all objects in one body
_NOT_JSON = "the body is not JSON"


def check(body: bytes) -> None:
    """Raises ``RefusedError`` unless ``body`` is a JSON object, or empty; also where it holds too
    many values or keys, in time and memory of a few copies of it."""
    if _excess(body):  # perhaps in its strings, which do not count
        outside = body.replace(rb"\\", b"").replace(rb"\"", b"")
        if outside.count(b'"') <= 4 * MAX_VALUES:  # as many as all keys and values may have
            outside = b"".join(outside.split(b'"')[::2])
        if excess := _excess(outside):
            raise RefusedError(f"the body holds more than {excess}", status=413)
    try:
        value = json.loads(body.decode("utf-8-sig")) if body else {}
    except json.JSONDecodeError as problem:
        where = f"line {problem.lineno}, column {problem.colno}"
        raise RefusedError(f"{_NOT_JSON}: {problem.msg} at {where}") from None
    except UnicodeDecodeError as problem:
        raise RefusedError(f"{_NOT_JSON}: byte {problem.start} is not UTF-8") from None
    except RecursionError:
        raise RefusedError(f"{_NOT_JSON} that this server reads: it is nested too deeply") from None
    except ValueError:  # Python's bound on digits
        raise RefusedError(f"{_NOT_JSON} that this server reads: a number is too long") from None
    if not isinstance(value, dict):
        raise RefusedError("the body is not a JSON object")


def _excess(text: bytes) -> str:
    if sum(text.count(mark) for mark in b"[{,") > MAX_VALUES:
        return f"{MAX_VALUES} values"
    return f"{MAX_KEYS} keys" if text.count(b":") > MAX_KEYS else ""
