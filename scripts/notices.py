"""Writes THIRD_PARTY.md: what slotmoe and its extras install, and under which licences.

``python scripts/notices.py`` asks the packages that are installed here.  A package of which torch
alone decides whether it is needed is left out: it differs from machine to machine.
"""

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTRAS = ("serve", "chat", "plots", "gguf")
_INTRODUCTION = """# Third-party packages

slotmoe's own files are under the [Apache License 2.0](LICENSE). Of others' code it ships LLVM's C++
library, in wheels that `scripts/wheels` builds for another processor (Apache-2.0 WITH
LLVM-exception). pip installs these packages beside it; each brings its licence. `python
scripts/notices.py` makes this list.

| package | licence |
|---|---|
"""


def needed() -> dict[str, Distribution]:
    """Every package that an installation with all extras has, by name."""
    found, waiting = dict[str, Distribution](), [("slotmoe", EXTRAS)]
    while waiting:
        name, extras = waiting.pop()
        try:
            package = distribution(name)
        except PackageNotFoundError:  # for another system
            continue
        for line in package.requires or ():
            requirement, _, marker = line.partition(";")
            required = re.match(r"[\w.-]+", requirement)
            wanted = re.search(r"extra *== *['\"]([\w-]+)", marker)
            if required is None or (wanted and wanted[1] not in extras):
                continue
            key = re.sub(r"[-_.]+", "-", required[0]).lower()
            if key not in found and not key.startswith(("nvidia-", "cuda-", "triton", "slotmoe")):
                waiting.append((key, ()))
        if name != "slotmoe":
            found[name] = package
    return dict(sorted(found.items()))


def licence(package: Distribution) -> str:
    """As its metadata says; the classifiers where that is a whole text."""
    about = package.metadata
    short = [about[key] for key in ("License-Expression", "License") if about[key]]
    short = [text for text in short if len(text) < 60 and "\n" not in text]
    classes = [line for line in about.get_all("Classifier") or () if line.startswith("License ::")]
    return (short or [line.rpartition(" :: ")[2] for line in classes] or ["see the package"])[0]


def main() -> None:
    rows = [f"| {name} | {licence(package)} |" for name, package in needed().items()]
    (ROOT / "THIRD_PARTY.md").write_text(_INTRODUCTION + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
