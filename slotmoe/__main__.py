"""The command line: ``slotmoe``, or ``python -m slotmoe``."""

import atexit
import signal

from slotmoe.signals import ENDING, Stopping, leave


def main() -> None:
    Stopping(leave, once=False).__enter__()
    # Python forgets its handlers soon after this, which is the last exit handler to be called.
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in ENDING])
    from slotmoe.tools.cli import main

    main()


if __name__ == "__main__":
    main()
