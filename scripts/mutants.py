"""Defects that the tests would miss: cosmic-ray changes a file in one place, and the tests that
concern the file must fail.

Usage: python scripts/mutants.py [AREA...] [--count 9] [--seed 0] [--tests PATH...]
An AREA is a name of ``AREAS`` or a file; without any, all of ``AREAS``.  In each ``--count`` places
are drawn, and in each place one of cosmic-ray's changes; type annotations are left out.  The tests
are those of ``./check`` that ``AREAS`` names, of another file those of its package.  Others might
kill a survivor, so the figure is a lower bound.  The tree is copied first: cosmic-ray changes files
in place.
"""

import argparse
import ast
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkItem

ROOT = Path(__file__).parents[1]
# An area's files, and its tests: those that fail soonest first.
AREAS = {
    "engine": (
        "offload/engine/*.py",
        "offload/engine offload/drafts offload/sharing offload/api offload/sequences"
        " offload/sessions offload/same_bits offload/gpu_faults offload/gpu hostile/files",
    ),
    "store": (
        "offload/experts/s*.py",
        "offload/states offload/engine offload/sharing offload/same_bits offload/gpu_faults",
    ),
    "sessions": (
        "offload/sessions/*.py",
        "offload/sessions offload/durable offload/sequences tools/sessions",
    ),
    "state": (
        "slotmoe/*ta*.py",
        "offload/plan offload/sequences offload/sessions offload/same_bits model/families",
    ),
    "codecs": (
        "quant/codecs/*.py",
        "quant/codecs quant/encode quant/ops offload/codecs offload/encoded",
    ),
    "plan": ("offload/plan/*.py", "offload/plan offload/fit offload/codecs tools/commands"),
}
# A change may make a test wait for ever; that ends it.
PYTEST = (
    "-m pytest -q -n 0 -x -p no:cacheprovider -m 'not slow' -o faulthandler_timeout=120"
    " -o faulthandler_exit_on_timeout=true"
)
CONFIG = """[cosmic-ray]
module-path = {files}
timeout = {timeout}
excluded-modules = []
test-command = "{command}"
[cosmic-ray.distributor]
name = "local"
"""


def only(item: WorkItem) -> MutationSpec:
    return item.mutations[0]


def is_typed(item: WorkItem) -> bool:
    """Whether the change is in a type annotation."""
    change = only(item)
    nodes = ast.walk(ast.parse((ROOT / change.module_path).read_text(encoding="utf-8")))
    given = (getattr(node, name, None) for node in nodes for name in ("annotation", "returns"))
    return any(
        (part.lineno, part.col_offset) <= change.start_pos < (part.end_lineno, part.end_col_offset)
        for part in given
        if part is not None
    )


def drawn(items: tuple[WorkItem, ...], count: int, seed: int) -> list[WorkItem]:
    """A change in each of so many places."""
    places = defaultdict[tuple, list[WorkItem]](list)
    for item in items:
        places[str(only(item).module_path), only(item).start_pos].append(item)
    source, chosen = random.Random(seed), list[WorkItem]()
    for place in source.sample(sorted(places), len(places)):
        there = sorted(
            places[place], key=lambda item: (only(item).operator_name, only(item).occurrence)
        )
        if len(chosen) < count and not is_typed(there[0]):
            chosen.append(source.choice(there))
    return chosen


def judge(tree: Path, area: str, given: argparse.Namespace) -> None:
    """Print what becomes of an area's mutants, and a row for each file."""
    pattern, names = AREAS.get(area, (area, ""))
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
    tests = ["tests/" + re.sub(r"(\w+)$", r"test_\1.py", name) for name in names.split()]
    tests = given.tests or tests or [f"tests/{Path(area).parts[0]}"]
    command = f"{sys.executable} {PYTEST} {' '.join(tests)}"
    base = tree / area.replace("/", "-")
    config, database = base.with_suffix(".toml"), base.with_suffix(".sqlite")

    def cosmic_ray(verb: str, timeout: float) -> None:
        config.write_text(CONFIG.format(files=files, timeout=timeout, command=command))
        arguments = [sys.executable, "-m", "cosmic_ray.cli", verb, config, database]
        subprocess.run(arguments, cwd=tree, check=True)

    started = time.monotonic()
    subprocess.run(f"exec {command}", shell=True, cwd=tree, check=True)  # they pass without
    timeout = 60 + 3 * (time.monotonic() - started)
    cosmic_ray("init", timeout)
    with use_db(database, WorkDB.Mode.open) as db:
        items = db.work_items
        db.clear()
        db.add_work_items(drawn(items, given.count, given.seed))
    cosmic_ray("exec", timeout)
    killed, all_ = Counter[str](), Counter[str]()
    with use_db(database, WorkDB.Mode.open) as db:
        for item, result in db.completed_work_items:
            path = str(only(item).module_path)
            all_[path] += 1
            killed[path] += result.test_outcome == TestOutcome.KILLED
            if result.test_outcome != TestOutcome.KILLED:
                print(f"\n{result.test_outcome}: {only(item).operator_name}\n{result.diff}")
            elif result.output == "timeout":
                print(f"\nkilled by its time: {only(item).operator_name}\n{result.diff}")
    for path in sorted(all_):
        print(f"| {path} | {killed[path]} of {all_[path]} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("areas", nargs="*", help=f"of {', '.join(AREAS)}, or files [all of them]")
    parser.add_argument("--count", type=int, default=9, help="mutants of each [9]")
    parser.add_argument("--seed", type=int, default=0, help="of which ones [0]")
    parser.add_argument("--tests", nargs="*", help="files or folders in place of AREAS'")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        tree = Path(work) / "tree"
        skipped = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__")
        shutil.copytree(ROOT, tree, symlinks=True, ignore=skipped)
        for area in given.areas or AREAS:
            judge(tree, area, given)


if __name__ == "__main__":
    main()
