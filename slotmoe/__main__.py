"""The command line: ``slotmoe``, or ``python -m slotmoe``."""

import atexit
import signal

from slotmoe.signals import Handling, leave


def main() -> None:
    Handling(leave).__enter__()
    # The first to be registered is the last to be called: then Python forgets its handlers.
    atexit.register(Handling(signal.SIG_IGN).__enter__)
    from slotmoe.tools.cli import main

    main()


if __name__ == "__main__":
    main()
