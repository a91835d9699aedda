"""The command line: ``slotmoe``, or ``python -m slotmoe``."""

from slotmoe.signals import take


def main() -> None:
    take()
    from slotmoe.tools.cli import main

    main()


if __name__ == "__main__":
    main()
