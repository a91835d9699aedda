"""How large the project is, against one table, in code tokens: comments, docstrings, blank lines,
tests, docs and generated tables are not counted, so nothing is gained by packing a line.  A change
that makes a number much smaller lowers its bound; raising one needs an issue that grants it."""

import ast
import io
import re
import threading
import tokenize
from collections import Counter
from pathlib import Path

import pytest

from slotmoe.offload.runtime import Runtime

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("model", "quant", "offload", "tools", "slotmoe")
SAMPLE_SLOTS = 56  # a quarter of the sample's
TOKEN_BOUNDS = {"product Python": 273_400, "C++ and GLSL": 116_500}
ROOM = 0.04  # a bound may be so much above its number; it is set 2% above
WAY_BOUNDS = {
    # the project's Python files that run for a decoded token of the sample
    "files, warm": 14,
    "files, a quarter of the slots": 21,
}
# Calls of their functions, warm.  No lower edge: Python 3.13 counts no comprehension.
CALLS = 72
ABOVE = "{} is {:,}, above its bound {:,}: raising one needs an issue that grants it by number"
BELOW = "{} is {:,}, well below its bound {:,}: lower that"
CODE_TOKENS = {tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING}


def product_files(*endings):
    """The product's files with these endings, without what links lead to."""
    paths = [path for folder in PRODUCT for path in (ROOT / folder).rglob("*")]
    return [path for path in paths if path.suffix in endings and path.resolve() == path]


def docstring_lines(tree):
    """Lines on which docstrings begin."""
    with_docstrings = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    definitions = [node for node in ast.walk(tree) if isinstance(node, with_docstrings)]
    return {node.body[0].lineno for node in definitions if ast.get_docstring(node)}


def python_tokens(text):
    """How many names, operators, numbers and strings are code."""
    skipped_lines = docstring_lines(ast.parse(text))
    count = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and token.start[0] in skipped_lines
        count += token.type in CODE_TOKENS and not is_docstring
    return count


def native_tokens(text):
    """The same of C++ and GLSL."""
    code = re.sub(r"//.*|/\*(?s:.*?)\*/", "", text)
    return len(re.findall(r'"(?:\\.|[^"\\])*"|\w+|[^\w\s]', code))


def check(counts, bounds, room):
    assert counts.keys() == bounds.keys()
    wrong = []
    for name, bound in bounds.items():
        if counts[name] > bound:
            wrong.append(ABOVE.format(name, counts[name], bound))
        if bound > max(counts[name] + 1, counts[name] * (1 + room)):
            wrong.append(BELOW.format(name, counts[name], bound))
    assert not wrong, "\n".join(wrong)


@pytest.mark.usefixtures("heavy")
def test_product_has_no_more_code_tokens_than_granted():
    python = [path.read_text(encoding="utf-8") for path in product_files(".py")]
    native = [
        path.read_text(encoding="utf-8") for path in product_files(".cpp", ".h", ".comp", ".glsl")
    ]
    counts = {
        "product Python": sum(map(python_tokens, python)),
        "C++ and GLSL": sum(map(native_tokens, native)),
    }
    check(counts, TOKEN_BOUNDS, ROOM)


def test_comments_docstrings_and_blank_lines_are_no_tokens():
    text = '"""Module."""\n\n\ndef add(a, b):  # a comment\n    """Sum."""\n    return a + b\n'
    assert python_tokens(text) == len("def add ( a , b ) : return a + b".split())
    assert native_tokens('int a = 1;  // one\n/* two */ f(a, "b c");') == 12


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
    counts = {"files, warm": len(warm), "files, a quarter of the slots": len(quarter)}
    check(counts, WAY_BOUNDS, room=0)
    assert round(calls) <= CALLS, ABOVE.format("calls, warm", round(calls), CALLS)
