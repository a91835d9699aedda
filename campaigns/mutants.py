"""Which defects the tests of CI would find: single-line changes of the core files, each tried
against tests that reach its line.  ``python -m campaigns.mutants``

A line that tests run is not yet a line that they check.  A mutant is the product with one operator,
constant, condition or statement changed.  Where no test fails, the mutant survives: a programmer's
slip of that kind would land.

1. A seed decides which mutants of ``FILES`` are made: at most one a line, ten a file.
2. The suite runs once, as ``./check`` runs it, in a copy of the tree whose core files say which
   lines each test reaches (``campaigns.reached``).  ``--map`` keeps that for as long as no file of
   the tree changes.
3. Each mutant runs in a copy of the tree against tests that reach its line, at most ``--limit`` of
   them: those that reach the fewest other lines first.  A failure or a hang kills it.  A test that
   fails without the mutant too does not count.

``--limit`` makes the figure a lower bound: another test might have killed a survivor.  With a
higher one and ``--keep``, only the survivors run again.  Equivalent mutants survive whatever the
tests.  The checkout is never changed.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Queue

import psutil

from campaigns.edits import Finder, watched

FILES = (
    "offload/experts/slots.py",
    "offload/experts/disk.py",
    "offload/experts/experts.py",
    "offload/sessions/blocks.py",
    "quant/export/writer.py",
    "offload/ingest/quantize.py",
    "model/child.py",
    "offload/engine/engine.py",
    "offload/plan/memory.py",
    "quant/export/reader.py",
)
EACH = 10  # mutants of a file
SPAN = 100_000  # numbers for the lines of a file
PLUGIN = Path(__file__).with_name("reached.py")


def sample(tree, seed):
    """``EACH`` mutants of each file, in different lines."""
    chosen = []
    for file in FILES:
        by_line = {}
        for mutant in Finder(file, (tree / file).read_text()).found:
            by_line.setdefault(mutant.line, []).append(mutant)
        dice = random.Random(f"{seed} {file}")
        for line in sorted(dice.sample(sorted(by_line), min(EACH, len(by_line)))):
            chosen.append(dice.choice(by_line[line]))
    return chosen


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

    def pytest(self, *arguments, seconds=None, slowest=None, output=subprocess.DEVNULL):
        """Exit code, None after ``seconds``, and the records of the tests that ran; a test that
        takes longer than ``slowest`` ends all."""
        records = tempfile.mkdtemp(dir=self.folder)
        places = {"TMPDIR": records, "MUTANTS_FOLDER": records, "PYTHONPATH": str(self.root)}
        process = {"cwd": self.root, "stdout": output, "stderr": output, "timeout": seconds}
        process["env"] = os.environ | places | {"MUTANTS_SLOWEST": str(slowest or "")}
        command = [sys.executable, "-m", "pytest", "-p", "reached", *arguments]
        try:
            code = subprocess.run(command, **process).returncode
        except subprocess.TimeoutExpired:
            code = None
        for left in psutil.process_iter():  # what a test has started and not ended
            with suppress(psutil.Error):
                if left.environ().get("MUTANTS_FOLDER") == records:
                    left.kill()
        lines = [line for path in Path(records).glob("*.json") for line in path.open()]
        shutil.rmtree(records, ignore_errors=True)
        return code, [json.loads(line) for line in lines if line.endswith("}\n")]


def digest_of(tree):
    """Of the product and its tests, which decide which tests reach a line."""
    total = hashlib.sha256(repr((FILES, [])).encode() + PLUGIN.read_bytes())
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
            return kept
        print(f"{path} is of another tree: the suite runs again", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        copy = Copy(tree, Path(folder))
        for number, file in enumerate(FILES):
            source = (copy.root / file).read_text()
            (copy.root / file).write_text(watched(source, SPAN * number))
        code, records = copy.pytest(output=sys.stderr)
    if code not in (0, 1):  # tests failed, which then count for no mutant
        sys.exit(f"pytest did not run the tests: exit code {code}")
    passed = [record for record in records if record["outcome"] == "passed"]
    print(f"{len(passed)} of {len(records)} tests passed", file=sys.stderr)
    result = {"digest": digest, "tests": passed}
    if path:
        path.write_text(json.dumps(result))
    return result


def reaching(mutant, tests):
    """The tests that reach the mutant's line; the file, if the line runs when it is imported."""
    begin = SPAN * FILES.index(mutant.file)
    if mutant.start:
        return [test for test in tests if begin + mutant.start in test["lines"]]
    return [test for test in tests if any(begin < line < begin + SPAN for line in test["lines"])]


def choose(tests, limit):
    """At most ``limit`` tests, those of a file together: first those that reach the fewest lines,
    then by time; of a function one parameter, of a file five tests, before there are more."""
    functions, files, ranks = Counter(), Counter(), []
    for test in sorted(tests, key=lambda test: (len(test["lines"]), test["seconds"])):
        function = test["test"].partition("[")[0]
        file = function.partition("::")[0]
        ranks.append((functions[function] + files[file] // 5, len(ranks), file, test))
        functions[function] += 1
        files[file] += functions[function] == 1
    chosen = sorted(ranks, key=lambda rank: rank[:2])[:limit]
    order = list(dict.fromkeys(file for *_, file, _ in chosen))
    return [test for *_, file, test in sorted(chosen, key=lambda rank: order.index(rank[2]))]


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
                    return killer or f"exit {code}"
                if killer is None:
                    return None
            return None
        finally:
            self.copies.put(copy)

    def mutated(self, copy, mutant, tests):
        path = copy.root / mutant.file
        source = path.read_text()
        mutant.apply(path)
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


def read_kept(path, digest):
    """Mutant -> its record, of an earlier run on the same tree."""
    lines = path.read_text().splitlines() if path and path.exists() else []
    records = [json.loads(line) for line in lines]
    return {record["mutant"]: record for record in records if record["digest"] == digest}


def arguments():
    parser = argparse.ArgumentParser(prog="python -m campaigns.mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    own = Path(__file__).resolve().parents[1]
    parser.add_argument("--tree", type=Path, default=own, help="the checkout (default: its own)")
    parser.add_argument("--seed", default="0", help="which mutants (default: 0)")
    parser.add_argument("--limit", type=int, default=40, help="tests for a mutant (default: 40)")
    parser.add_argument("--workers", type=int, default=2, help="mutants at once (default: 2)")
    parser.add_argument("--map", type=Path, help="a file for what tests reach")
    parser.add_argument("--keep", type=Path, help="a file for results: an interrupted run goes on")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    return parser.parse_args()


def main():
    options = arguments()
    tree = options.tree.resolve()
    tests = make_map(tree, options.map)
    mutants = sample(tree, options.seed)
    kept = read_kept(options.keep, tests["digest"])
    begin = time.monotonic()

    def attempt(mutant):
        reach = reaching(mutant, tests["tests"])
        chosen = choose(reach, options.limit)
        record = kept.get(str(mutant))
        if not record or (not record["killed by"] and record["tests"] < len(chosen)):
            record = {"mutant": str(mutant), "digest": tests["digest"], "reach": len(reach)}
            record |= {"tests": len(chosen), "killed by": trial.run(mutant, chosen)}
            if options.keep:
                with open(options.keep, "a") as file:
                    file.write(json.dumps(record) + "\n")
        print(f"{mutant}\n  {record['killed by'] or 'SURVIVES'}", file=sys.stderr, flush=True)
        return record

    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        trial = Trial(tree, Path(folder), options.workers)
        with ThreadPoolExecutor(options.workers) as pool:
            records = list(pool.map(attempt, mutants))
    survivors = [record for record in records if not record["killed by"]]
    for record in survivors:
        print(f"{record['mutant']}\n  survives {record['tests']} of {record['reach']} tests")
    killed, minutes = len(records) - len(survivors), (time.monotonic() - begin) / 60
    share = f"{killed} of {len(records)} mutants killed ({killed / len(records):.0%})"
    print(f"{share} in {minutes:.0f} minutes, seed {options.seed}")
    if options.json:
        print(json.dumps({"killed": killed, "mutants": len(records), "survivors": survivors}))


if __name__ == "__main__":
    main()
