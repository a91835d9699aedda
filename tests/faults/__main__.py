"""All campaigns one after the other, each as long as its gate in docs/reliability.md asks (hours).

``python -m tests.faults NAME...`` runs some of them.
"""

import subprocess
import sys

CAMPAIGNS = {
    "campaign": [],
    "fuzz": ["--seconds", "3600"],
    "flips": [],
    "interrupts": [],
    "kills": [],
    "races": [],
    "environments": [],
    "soak": [],
    "clients": [],
}


def main() -> None:
    failed = []
    for name in sys.argv[1:] or CAMPAIGNS:
        print(f"# python -m tests.faults.{name}", flush=True)
        command = [sys.executable, "-m", f"tests.faults.{name}", *CAMPAIGNS[name]]
        if subprocess.run(command).returncode:
            failed.append(name)
    raise SystemExit(", ".join(failed) or 0)


if __name__ == "__main__":
    main()
