"""Print the lowest version that pyproject.toml allows of each dependency, as constraints for pip.

``python scripts/lower_bounds.py`` has to run with Python 3.11 or later.
"""

import re
from pathlib import Path

import tomllib

ROOT = Path(__file__).parent.parent


def lower_bounds() -> dict[str, str]:
    """By name, of what the program needs and of its extras, but for those of developers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + [
        one for name, some in extras.items() if name not in ("dev", "nightly") for one in some
    ]
    pinned = (re.fullmatch(r"([\w.-]+)>=([\w.]+)", one) for one in needed)
    return {match[1]: match[2] for match in pinned if match}


if __name__ == "__main__":
    for name, version in lower_bounds().items():
        print(f"{name}=={version}")
