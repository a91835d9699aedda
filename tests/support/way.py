"""A token's way: what runs in the engine's threads for a decoded token of the sample."""

import threading
from collections import Counter
from pathlib import Path

from slotmoe.offload.runtime import Runtime

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "It is a truth universally acknowledged,"


def way_of_a_token(export, slots=None):
    """The project's Python files that run while ``export`` decodes with its cache full, by path
    from the root, and their calls a token.  ``slots`` as for ``Runtime.open``."""
    calls, counting = Counter(), threading.Event()

    def count(frame, event, _):
        if event == "call" and counting.is_set():
            calls[frame.f_code.co_filename] += 1

    threading.setprofile(count)
    try:
        runtime = Runtime.open(export, device="cpu", threads=2, context=256, slots=slots)
    finally:
        threading.setprofile(None)
    with runtime:
        runtime.warm()
        tokens = runtime.generate(PROMPT, 24)
        next(tokens)
        before = runtime.stats()["tokens"]["decode_tokens"]
        counting.set()
        tokens.read()
        counting.clear()
        decoded = runtime.stats()["tokens"]["decode_tokens"] - before
    files = Counter()
    for name, count in calls.items():
        if (path := Path(name).resolve()).is_relative_to(ROOT) and path.is_file():
            files[str(path.relative_to(ROOT))] += count
    return sorted(files), sum(files.values()) / decoded
