"""What parsers that the fuzzer attacks share."""

import json
from contextlib import suppress

from slotmoe.errors import SlotmoeError
from slotmoe.quant.export.manifest import manifest_checksum


def lawful(action):
    """Whether ``action`` went well; errors of ours are lawful, if they are one line."""
    try:
        action()
    except SlotmoeError as problem:
        if not str(problem).isprintable() or len(str(problem)) > 1000:
            raise ValueError("not one line for people") from problem
        return False
    return True


def in_file(path, good, read, end=b""):
    """A parser whose input is a file's bytes, before ``end``."""

    def parse(data):
        path.write_bytes(data + end)
        return lawful(read)

    return [good], parse


def signed(sign, values):
    """JSON with the right checksum, as someone with bad intentions would write it, or the bytes as
    they are where that can't be."""
    with suppress(ValueError, AttributeError, TypeError, RecursionError):
        return sign(json.loads(values))
    return values


def sign_manifest(values):
    return json.dumps({**values, "checksum": manifest_checksum(values)}).encode()
