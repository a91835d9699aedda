"""How large the project is, against one table.  A change that makes a number smaller lowers it
there; raising one needs an issue that grants it by number."""

import threading
from collections import Counter
from pathlib import Path

import pytest

from slotmoe.offload.runtime import Runtime

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("model", "quant", "offload", "tools", "slotmoe")
SAMPLE_SLOTS = 56  # a quarter of the sample's
BOUNDS = {
    # lines of Python
    "model": 5_303,
    "quant": 6_585,
    "offload": 11_425,
    "tools": 8_124,
    "slotmoe": 2_224,
    "product": 33_661,
    "bench": 1_084,
    "tests": 20_616,
    "campaigns": 3_438,
    # its files
    "product files": 152,
    # lines of C++, headers and shaders
    "C++ and GLSL": 9_642,
    # words of README.md and docs/
    "words": 21_528,
}
WAY = {
    # the project's Python files that run for a decoded token of the sample
    "files, warm": 15,
    "files, a quarter of the slots": 21,
}
# Calls of their functions, warm.  No lower edge: Python 3.13 counts no comprehension.
CALLS = 72
SLACK = 0.01  # a number may be so much below its bound
OVER = "{} is {:,}, above its bound {:,}: raising one needs an issue that grants it by number"
UNDER = "{} is {:,}, well below its bound {:,}: lower that"


def files(folder, *endings):
    """Those of a folder, without what its links lead to."""
    paths = [path for ending in endings for path in (ROOT / folder).rglob(f"*{ending}")]
    return [path for path in paths if path.resolve() == path]


def lines(paths):
    return sum(path.read_bytes().count(b"\n") for path in paths)


def check(found, bounds):
    assert found.keys() == bounds.keys()
    wrong = []
    for name, most in bounds.items():
        if not most - max(1, SLACK * most) <= found[name] <= most:
            told = OVER if found[name] > most else UNDER
            wrong.append(told.format(name, found[name], most))
    assert not wrong, "\n".join(wrong)


def test_size():
    python = {folder: files(folder, ".py") for folder in (*PRODUCT, "bench", "tests", "campaigns")}
    pages = [ROOT / "README.md", *files("docs", ".md")]
    found = {folder: lines(paths) for folder, paths in python.items()}
    found["product"] = sum(found[folder] for folder in PRODUCT)
    found["product files"] = sum(len(python[folder]) for folder in PRODUCT)
    found["C++ and GLSL"] = lines(files("quant", ".cpp", ".h", ".comp", ".glsl"))
    found["words"] = sum(len(page.read_text(encoding="utf-8").split()) for page in pages)
    check(found, BOUNDS)


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
        tokens = runtime.generate(PROMPT, 64)
        next(tokens)
        before = runtime.stats()["tokens"]["decode_tokens"]
        counting.set()
        tokens.read()
        counting.clear()
        decoded = runtime.stats()["tokens"]["decode_tokens"] - before
    files = Counter()
    for name, count in calls.items():
        if {ROOT / folder for folder in PRODUCT} & {*(path := Path(name).resolve()).parents}:
            files[str(path.relative_to(ROOT))] += count
    return sorted(files), sum(files.values()) / decoded


@pytest.mark.usefixtures("heavy")
def test_the_way_of_a_token(sample_export):
    warm, calls = way_of_a_token(sample_export)
    quarter, _ = way_of_a_token(sample_export, slots=SAMPLE_SLOTS)
    check(dict(zip(WAY, (len(warm), len(quarter)), strict=True)), WAY)
    assert round(calls) <= CALLS, OVER.format("calls, warm", round(calls), CALLS)
