"""This engine beside ik_llama.cpp, or beside another tree of it, in turns of seconds."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from bench import turns
from slotmoe.errors import ConfigError
from slotmoe.offload.runtime import Runtime
from slotmoe.tools.bench import speed
from slotmoe.tools.options import count, flag, option

_TREE = """
import sys
from bench.turns import random_ids
from slotmoe.offload.runtime import Runtime
from slotmoe.tools.bench import speed

(export, ram), (threads, context), depth = sys.argv[3:], map(int, sys.argv[1:3]), 1
with Runtime.open(export, context=context, threads=threads, ram=ram or None) as runtime:
    runtime.warm()
    for line in sys.stdin:
        what, ids = line.split()[0], random_ids(int(line.split()[1]))
        depth = len(ids) if what == "depth" else depth
        decode = what == "decode"
        spent = speed.token_seconds(runtime, ids, depth) if decode else [0.0]
        spent = [speed.prefill_seconds(runtime, ids)] if what == "prefill" else spent
        print("seconds", sum(spent), flush=True)
"""


class _Peer:
    """The driver's process, which waits for its next line in between; that of a tree has kernels of
    its own, and ``ram``."""

    def __init__(self, driver: Path, model: Path, threads: int, context: int, ram: str | None):
        command = [str(driver), str(model), str(threads), str(context)]
        if driver.is_dir():
            command = [sys.executable, "-c", _TREE, *command[2:], str(model.absolute()), ram or ""]
        pipe, folder = subprocess.PIPE, driver if driver.is_dir() else None
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=folder)

    def seconds(self, what: str, tokens: int) -> float:
        """Raises ``ConfigError`` if the driver ended."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{what} {tokens}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise ConfigError(f"the driver ended with code {self._process.wait()}")

    def close(self) -> None:
        self._process.communicate()


def _spin() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    while True:
        pass


@click.command()
@turns.EXPORT
@click.argument("driver", metavar="DRIVER", type=Path)
@click.argument("model", metavar="GGUF", type=Path)
@count("--prompt-tokens", 0, "Prefill so many tokens from an empty cache.", 0)
@count("--decode-tokens", 0, "Decode so many tokens.", 0)
@count("--depth", 0, "Decode after so many cached tokens.", 0)
@turns.repetitions(7)
@turns.THREADS
@option("--ram", "SIZE", "RAM budget.")
@flag("--busy", "Beside both a process that never rests takes half of one core.")
def peer(
    export: str, driver: Path, model: Path, repetitions: int, busy: bool, **given: Any
) -> None:
    """Prefill or decode EXPORT, and GGUF by ik_llama.cpp's DRIVER, in turn.  DRIVER is made of
    peer.cpp, as docs/benchmarks.md says; or it is another working tree of slotmoe, and GGUF an
    export, which gets the same --ram."""
    names = ("prompt_tokens", "decode_tokens", "depth")
    prompt, decode, depth = (int(given.pop(name)) for name in names)
    if bool(prompt) == bool(decode):
        raise ConfigError("give --prompt-tokens or --decode-tokens")
    tokens, what = (prompt, "prefill") if prompt else (decode, "decode")
    context = max(depth, 1) + tokens + 8
    with Runtime.open(export, context=context, **given) as runtime:
        runtime.warm()
        other = _Peer(driver, model, runtime.threads, context, given.get("ram"))
        neighbour = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)

        def ours() -> float:
            ids = turns.random_ids(tokens)
            if prompt:
                return tokens / speed.prefill_seconds(runtime, ids)
            return tokens / sum(speed.token_seconds(runtime, ids, depth))

        try:
            if depth:
                other.seconds("depth", depth)
            ways = {"slotmoe": ours, "peer": lambda: tokens / other.seconds(what, tokens)}
            if busy:
                neighbour.start()
            rows = turns.compare(ways, repetitions, "peer", "tokens_per_second")
        finally:
            other.close()
            if busy:
                neighbour.kill()
        of = {"prompt": prompt, "decode": decode, "depth": depth}
        turns.finish(rows, threads=runtime.threads, busy=busy, **of)


if __name__ == "__main__":
    peer()
