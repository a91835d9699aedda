"""Writes requirements.lock: the exact releases, with their hashes, that development and the tests
use on Linux, x86-64, with this Python.

``python scripts/lock.py`` lets pip decide, as for a fresh environment.  What comes with torch is
left out, and torch's release is a comment, for those who list: each machine has its own build.
Install with

    pip install torch && pip install --no-deps --require-hashes -r requirements.lock
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WITH_TORCH = ("triton", "nvidia-", "cuda-")


def resolved() -> dict[str, tuple[str, str]]:
    """Version and SHA-256 of each package that an empty environment would get, torch among them."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
    command += ["--ignore-installed", "--only-binary", ":all:", "--report", "-", f"{ROOT}[dev]"]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    found = {}
    for package in report["install"]:
        name, hashes = package["metadata"]["name"], package["download_info"].get("archive_info")
        if hashes is not None and not name.startswith(WITH_TORCH):
            found[name] = package["metadata"]["version"], hashes["hashes"]["sha256"]
    return found


def main() -> None:
    python = ".".join(map(str, sys.version_info[:2]))
    lines, found = [f"# Made by scripts/lock.py for Python {python}, Linux, x86-64."], resolved()
    lines.append(f"# torch=={found.pop('torch')[0].partition('+')[0]}")
    for name, (version, digest) in sorted(found.items(), key=lambda item: item[0].lower()):
        lines.append(f"{name}=={version} --hash=sha256:{digest}")
    (ROOT / "requirements.lock").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
