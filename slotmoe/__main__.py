"""``python -m slotmoe``: the command line."""

from slotmoe.tools.cli import main

main()
