"""Which defects the tests of CI would find: single changes of the files that hold invariants, each
tried against tests that reach it.

A line that tests run is not yet a line that they check.  A mutant is the product with one operator,
constant, condition or statement changed (campaigns.edits).  Where no test fails, the mutant
survives: a programmer's slip of that kind would land.

1. The suite runs once, as ./check runs it, in a copy of the tree whose files of interest say which
   lines each test reaches (campaigns.reached).  --map keeps that for as long as no file of the tree
   changes.
2. The seed orders the mutants of each part.  All are tried: a night.  --seconds 360 is an hour's
   sample, --count 30 one of thirty each.
3. Each mutant runs in a copy of the tree against tests that reach its line, at most --limit of
   them, in as many seconds: those near its module, those that name what it changes, and those
   that take different ways through the file.  A failure or a hang kills it.  A test that fails
   without the mutant too does not count.

--limit makes the figure a lower bound: another test might have killed a survivor.  Mutants that
change nothing that a test could see survive whatever the tests: equivalent.toml lists them, each
with the reason, and they do not count.  The checkout is never changed.
"""

import ast
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain, groupby
from pathlib import Path
from queue import Queue

import psutil

from campaigns.edits import edits, watched
from campaigns.reached import run_pytest
from campaigns.runner import Attack

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PARTS = {
    "experts": (
        "offload/experts/store.py",
        "offload/experts/slots.py",
        "offload/experts/experts.py",
    ),
    "disk": ("offload/experts/disk.py",),
    "step": ("offload/engine/engine.py", "offload/engine/passes.py"),
    "scheduler": ("offload/engine/batch.py", "offload/engine/requests.py"),
    "sessions": ("offload/sessions/blocks.py", "offload/sessions/store.py"),
    "writer": ("quant/export/writer.py",),
    "quantize": ("offload/ingest/quantize.py",),
    "child": ("model/child.py",),
    "memory": ("offload/plan/memory.py",),
    "readers": ("quant/export/reader.py", "quant/codecs/codec.py", "quant/codecs/weight.py"),
}
FILES = [file for files in PARTS.values() for file in files]
LEAST = 0.9  # of the mutants of a part are killed
SPAN = 100_000  # numbers for the lines of a file
PLUGIN = Path(__file__).with_name("reached.py")
KEY = "file", "behind", "before", "after"  # of a mutant, whatever its line's number
EQUIVALENT = Path(__file__).with_name("equivalent.toml")
# Imported once for all mutants: of seven CPU seconds that it takes to start tests, one is left.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    "pytest hypothesis.stateful xdist.plugin anyio.pytest_plugin torch safetensors.torch tokenizers"
    " jinja2 psutil xxhash".split()
)


class Copy:
    """A copy of a tree to run tests in, which may be changed."""

    def __init__(self, tree, folder):
        self.root, self.folder, self.changes = folder / "tree", folder, 0
        skipped = shutil.ignore_patterns(".git", ".*_cache", ".hypothesis", "__pycache__", "build")
        shutil.copytree(tree, self.root, symlinks=True, ignore=skipped)
        shutil.copy(PLUGIN, self.root)

    def changed(self, file):
        """Python reads a file anew if its time differs in whole seconds."""
        self.changes += 1
        os.utime(self.root / file, (self.changes, self.changes))

    def pytest(self, *arguments, seconds=None, slowest=None, output=os.devnull):
        """Exit code, None after ``seconds``, and the records of the tests that ran; a test that
        takes longer than ``slowest`` ends all."""
        records = tempfile.mkdtemp(dir=self.folder)
        places = {"TMPDIR": records, "MUTANTS_FOLDER": records, "PYTHONPATH": str(self.root)}
        places["MUTANTS_SLOWEST"] = str(slowest or "")
        process = FORKS.Process(target=run_pytest, args=(self.root, places, arguments, output))
        process.start()
        process.join(seconds)
        code = process.exitcode
        with suppress(OSError):  # what a test has started and not ended
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        for left in psutil.process_iter():
            with suppress(psutil.Error):
                if left.environ().get("MUTANTS_FOLDER") == records:
                    left.kill()
        lines = [line for path in Path(records).glob("*.json") for line in path.open()]
        shutil.rmtree(records, ignore_errors=True)
        return code, [json.loads(line) for line in lines if line.endswith("}\n")]


def digest_of(tree):
    """Of the product and its tests, which decide which tests reach a line."""
    total = hashlib.sha256(repr(FILES).encode() + PLUGIN.read_bytes())
    for path in (tree / "pyproject.toml", *sorted(tree.rglob("*.py"))):
        if not path.relative_to(tree).parts[0].startswith((".", "campaigns")):
            total.update(str(path.relative_to(tree)).encode() + path.read_bytes())
    return total.hexdigest()


def make_map(tree, path):
    """The records of all tests that pass, and the digest of the tree that they are for."""
    digest = digest_of(tree)
    if path and path.exists():
        kept = json.loads(path.read_text())
        if kept["digest"] == digest:
            return kept["tests"]
        print(f"{path} is of another tree: the suite runs again", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        copy = Copy(tree, Path(folder))
        for number, file in enumerate(FILES):
            source = (copy.root / file).read_text()
            (copy.root / file).write_text(watched(source, SPAN * number))
        code, records = copy.pytest(output="/dev/stderr")
    if code not in (0, 1):  # tests failed, which then count for no mutant
        sys.exit(f"pytest did not run the tests: exit code {code}")
    passed = [record for record in records if record["outcome"] == "passed"]
    print(f"{len(passed)} of {len(records)} tests passed", file=sys.stderr)
    if path:
        path.write_text(json.dumps({"digest": digest, "tests": passed}))
    return passed


def reaching(mutant, tests):
    """The tests that reach the mutant's line; the file, if the line runs when it is imported."""
    number = FILES.index(mutant.file)
    if mutant.start:
        return [test for test in tests if SPAN * number + mutant.start in test["lines"]]
    return [test for test in tests if number in test["ways"]]


def choose(mutant, tests, limit):
    """At most ``limit`` tests, in as many seconds, those of a file together.  Half are of files
    that import the mutant's, and little else.  Then come by turns one that says most of the
    mutant's words, rare ones first, one that reaches the fewest lines, and one that reaches most of
    the mutant's file; the fastest first.  Tests of one function, or which share a fixture's way
    through that file alone, come one by one."""
    number, wanted, orders = FILES.index(mutant.file), words_of_mutant(mutant), []
    module = f"slotmoe.{mutant.file[:-3].replace('/', '.')}"
    said = Counter(word for test in tests for word in wanted & test["words"])

    def way(test):
        return test["ways"][number]

    for group, worth in (
        (function_of, lambda test: -sum(1 / said[word] for word in wanted & test["words"])),
        (way, lambda test: len(test["lines"])),
        (way, lambda test: -way(test)[0]),
    ):
        seen, ranks = Counter(), []
        for test in sorted(tests, key=lambda test: (worth(test), test["seconds"])):
            ranks.append((seen[group(test)], len(ranks), test["test"]))
            seen[group(test)] += 1
        orders.append([name for *_, name in sorted(ranks)])
    by_name, chosen, left = {test["test"]: test for test in tests}, [], limit
    near = [test for test in tests if module in test["imports"]]
    near.sort(key=lambda test: (len(test["imports"]), test["seconds"]))
    nearest = [test["test"] for test in near[: limit // 2]]
    for name in dict.fromkeys(chain(nearest, *zip(*orders, strict=True))):
        test = by_name[name]
        if len(chosen) < limit and (not chosen or test["seconds"] <= left):
            chosen.append(test)
            left -= test["seconds"]
    files = list(dict.fromkeys(file_of(test) for test in chosen))
    return sorted(chosen, key=lambda test: files.index(file_of(test)))


def words_of(text):
    return frozenset(re.findall(r"[A-Za-z]\w{2,}", text))


def words_of_mutant(mutant):
    """Of the changed lines, the one above, and the names of what they are in."""
    names = [
        node.name
        for node in ast.walk(ast.parse(mutant.source))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.lineno <= mutant.line <= node.end_lineno
    ]
    return words_of(" ".join([mutant.behind, mutant.before, *names]))


def file_of(test):
    return test["test"].partition("::")[0]


def function_of(test):
    return test["test"].partition("[")[0]


def words_of_functions(tree, tests):
    """What each test function says, as words; a file's imports are those of the function ""."""
    found = {}
    for file in {file_of(test) for test in tests}:
        source = (tree / file).read_text()
        imports = re.findall(r"^from (\S+) import (.*)", source, re.MULTILINE)
        names = {f"{of}.{name}" for of, all in imports for name in re.findall(r"\w+", all)}
        found[file, ""] = frozenset(names.union(of for of, _ in imports))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                said = ast.get_source_segment(source, node)
                found[file, node.name] = words_of(said)
    return found


class Trial:
    """Tries mutants in copies of the tree, and knows which tests pass without one."""

    def __init__(self, tree, folder, workers):
        self.copies, self.sound, self.unsound = Queue(), set(), set()
        for number in range(workers):
            self.copies.put(Copy(tree, folder / str(number)))

    def run(self, mutant, tests):
        """What kills ``mutant``: a test, or a word; None if it survives."""
        copy = self.copies.get()
        try:
            while tests := [test for test in tests if test["test"] not in self.unsound]:
                code, records = self.mutated(copy, mutant, tests)
                ended = {"passed": [], "failed": [], "skipped": []}
                for record in records:
                    ended[record["outcome"]].append(record["test"])
                self.sound.update(ended["passed"])
                if code == 0:
                    return None
                if code is None:
                    return "hang"
                killer = next(iter(ended["failed"]), None)
                if self.is_sound(copy, killer, tests):
                    return killer or ("hang" if code == 1 else f"exit {code}")
                assert killer, "without the mutant no test starts either"
            return None
        finally:
            self.copies.put(copy)

    def mutated(self, copy, mutant, tests):
        path = copy.root / mutant.file
        source = path.read_text()
        path.write_text(mutant.source)
        copy.changed(mutant.file)
        try:
            seconds = [test["seconds"] for test in tests]
            limits = {"seconds": 60 + 10 * sum(seconds), "slowest": 60 + 10 * max(seconds)}
            return copy.pytest("-n", "0", "-x", *[test["test"] for test in tests], **limits)
        finally:
            path.write_text(source)
            copy.changed(mutant.file)

    def is_sound(self, copy, killer, tests):
        """Whether the failed test, or the start of all if none has failed, is right without the
        mutant."""
        if killer is None:
            names = [test["test"] for test in tests]
            return copy.pytest("-n", "0", "--collect-only", *names)[0] == 0
        if killer not in self.sound:
            passes = copy.pytest("-n", "0", killer)[0] == 0
            (self.sound if passes else self.unsound).add(killer)
        return killer in self.sound


def explained(tree):
    """The mutants that no test can kill, as ``file``, ``behind``, ``before`` and ``after``."""
    entries = tomllib.loads(EQUIVALENT.read_text())["equivalent"]
    for entry in entries:
        lines = (tree / entry["file"]).read_text().split("\n")
        if f"{entry['behind']}\n{entry['before']}" not in "\n".join(map(str.strip, lines)):
            raise ValueError(f"{EQUIVALENT.name}: {entry['file']} has no such lines: {entry}")
    return {tuple(entry[key] for key in KEY) for entry in entries}


@contextmanager
def prepare(folder, given):
    given.tree = given.tree.resolve()
    given.equivalent, given.tests = explained(given.tree), make_map(given.tree, given.map)
    words = words_of_functions(given.tree, given.tests)
    for test in given.tests:
        function = function_of(test).rpartition("::")[2]
        test["words"] = words.get((file_of(test), function), frozenset())
        test["imports"] = words[file_of(test), ""]
        of_files = groupby(test["lines"], lambda line: line // SPAN)
        ways = {number: tuple(lines) for number, lines in of_files}
        test["ways"] = {number: (len(lines), hash(lines)) for number, lines in ways.items()}
        test["lines"] = frozenset(test["lines"])
    yield Trial(given.tree, folder, given.workers)


def run(trial, part, aim):
    given, begin, killed, survivors = aim.given, time.monotonic(), Counter(), {}
    todo = [edit for file in PARTS[part] for edit in edits(file, (given.tree / file).read_text())]
    aim.chance.shuffle(todo)

    def work():
        while todo and aim.goes_on(killed.total() + len(survivors)):
            mutant = todo.pop().mutant()
            if mutant is None or tuple(getattr(mutant, key) for key in KEY) in given.equivalent:
                continue
            reach = reaching(mutant, given.tests)
            chosen = choose(mutant, reach, given.limit)
            if killer := trial.run(mutant, chosen):
                killed[mutant.file] += 1
            else:
                survivors[str(mutant)] = mutant.file
                killer = f"survives {len(chosen)} of {len(reach)} tests"
            print(f"{mutant}\n  {killer}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(given.workers) as pool:
        for worker in [pool.submit(work) for _ in range(given.workers)]:
            worker.result()
    of_files = Counter(survivors.values())
    report = {"killed": killed.total(), "mutants": killed.total() + len(survivors)}
    report |= {file: f"{killed[file]} of {killed[file] + of_files[file]}" for file in PARTS[part]}
    report |= {"minutes": round((time.monotonic() - begin) / 60), "survivors": [*survivors]}
    return report | {"wrong": [*survivors] if killed.total() < LEAST * report["mutants"] else []}


OWN = Path(__file__).resolve().parents[1]
ATTACK = Attack(
    run,
    PARTS,
    each="mutants of a part",
    count=10_000,
    prepare=prepare,
    options={
        "tree": {"type": Path, "default": OWN, "help": "the checkout [its own]"},
        "limit": {"type": int, "default": 40, "help": "tests for a mutant, and seconds [40]"},
        "workers": {"type": int, "default": 2, "help": "mutants at once [2]"},
        "map": {"type": Path, "help": "a file for what tests reach"},
    },
)
