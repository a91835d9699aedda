"""Defects that the tests would miss: cosmic-ray changes a file in one place, and the quick tests of
its package must fail.

Usage: python scripts/mutants.py FILE [--count 50] [--seed 0] [--tests PATH...]
The tree is copied first: cosmic-ray changes files in place.  Tests of other packages might kill a
survivor, so the figure is a lower bound.
"""

import argparse
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db

ROOT = Path(__file__).parents[1]
CONFIG = """[cosmic-ray]
module-path = "{file}"
timeout = 120.0
excluded-modules = []
test-command = "python -m pytest -n 0 -x -p no:cacheprovider -m 'not (slow or full)' {tests}"
[cosmic-ray.distributor]
name = "local"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="such as offload/experts/store.py")
    parser.add_argument("--count", type=int, default=50, help="mutants [50]")
    parser.add_argument("--seed", type=int, default=0, help="of which ones [0]")
    parser.add_argument("--tests", nargs="*", help="files or folders [tests/PACKAGE]")
    given = parser.parse_args()
    tests = given.tests or [f"tests/{Path(given.file).parts[0]}"]
    with tempfile.TemporaryDirectory() as work:
        tree = Path(work) / "tree"
        skipped = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__")
        shutil.copytree(ROOT, tree, symlinks=True, ignore=skipped)
        (tree / "mutants.toml").write_text(CONFIG.format(file=given.file, tests=" ".join(tests)))

        def run(command: str) -> None:
            subprocess.run(command.split(), cwd=tree, check=True)

        run("cosmic-ray init mutants.toml mutants.sqlite")
        with use_db(tree / "mutants.sqlite", WorkDB.Mode.open) as db:
            items = db.work_items
            db.clear()
            db.add_work_items(random.Random(given.seed).sample(items, min(given.count, len(items))))
        run("cosmic-ray exec mutants.toml mutants.sqlite")
        run("cr-report --surviving-only --show-diff mutants.sqlite")


if __name__ == "__main__":
    main()
