"""``python -m slotmoe.tools.bench gap`` where there is no GPU, on its twin: ``python -m
tests.support.gap EXPORT SLOTS``.  The twin computes on the same thread, so Python's own code is out
of the processor's caches more often than beside a GPU; and its calls are not CUDA's."""

import sys

from slotmoe.tools.bench import turns
from slotmoe.tools.bench.decode import gap_row
from tests.support.twin import Twin, open_on

if __name__ == "__main__":
    options = {"slots": int(sys.argv[2]), "misses": "fetch", "prefetch": False}
    with open_on(sys.argv[1], Twin(), kernels="torch", **options) as runtime:
        runtime.warm()
        turns.finish([gap_row(runtime, 200)])
