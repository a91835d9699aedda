"""Looks the releases of requirements.lock, and torch's, up among the known advisories.

``python scripts/audit.py`` runs pip-audit (``.[nightly]``), which asks pypi.org.  The exit code is
1 if one is known, and 3 if releases were not looked up.  pip-audit calls that a success: behind a
mirror, which has no advisories, it finds none.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def releases() -> list[str]:
    """Each locked release as a requirement."""
    return re.findall(r"^(?:# )?([\w.-]+==[\w.]+)", (ROOT / "requirements.lock").read_text(), re.M)


def judged(report: dict[str, Any]) -> tuple[list[str], int]:
    """What pip-audit's report says in lines, and the exit code."""
    known, skipped, packages = [], [], report["dependencies"]
    for package in packages:
        if "skip_reason" in package:
            skipped.append(package["skip_reason"])
        for advisory in package.get("vulns", ()):
            fixed = ", ".join(advisory["fix_versions"]) or "no release"
            known.append(
                f"{package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}"
            )
    lines = [*known, f"{len(packages) - len(skipped)} releases looked up, {len(known)} advisories"]
    if skipped:
        lines.append(f"{len(skipped)} releases were not looked up: {skipped[0]}")
    return lines, 1 if known else 3 if skipped else 0


def main() -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
        listed.write("\n".join(releases()))
        listed.flush()
        command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip"]
        command += ["--progress-spinner", "off", "--format", "json", "--requirement", listed.name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        print("no release was looked up: see above", file=sys.stderr)
        raise SystemExit(3)
    lines, code = judged(json.loads(done.stdout))
    print("\n".join(lines))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
