"""A dry run's GPU, the tests' twin: ``python -m scripts.gpu.on_twin slotmoe|bench ARGUMENTS`` runs
``python -m slotmoe ARGUMENTS`` or ``python -m bench ARGUMENTS`` on it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

CAPACITY = 64 << 30  # a number: memory is taken when it is asked for


@contextmanager
def on_twin() -> Iterator[None]:
    """Models that are opened inside are on a twin, however they are asked for."""
    from tests.support.twin import Twin

    twin = Twin(capacity=CAPACITY)
    with patch("slotmoe.offload.runtime.choose_device", lambda wanted, notify: (twin, "a dry run")):
        yield


def main() -> None:
    program, *arguments = sys.argv[1:]
    from bench.__main__ import bench
    from slotmoe.tools.cli import cli, main

    with on_twin():
        main(arguments, bench if program == "bench" else cli)


if __name__ == "__main__":
    main()
