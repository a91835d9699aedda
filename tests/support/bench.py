"""Benchmarks, run as ``python -m slotmoe.tools.bench NAME`` runs them, but in this process: to
import torch costs more than what most of them measure here."""

import contextlib
import io
import json

import pytest

from slotmoe.quant.kernels.cpu import bindings
from slotmoe.tools.bench.__main__ import bench
from slotmoe.tools.cli import main


def benchmark(*arguments):
    """The JSON object of a benchmark's last line."""
    native = bindings.load()
    before = native and native.threads
    printed = io.StringIO()
    try:
        with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(printed):
            main([str(argument) for argument in arguments], group=bench)
    finally:
        if native:
            native.set_threads(before)
    assert not ended.value.code
    return json.loads(printed.getvalue().splitlines()[-1])
