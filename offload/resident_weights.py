"""Resident weights of an export, on their way to where they are used."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from slotmoe.errors import ConfigError
from slotmoe.offload.devices.pages import Arena
from slotmoe.quant.backends.base import Prepared
from slotmoe.quant.codecs.weight import Weight
from slotmoe.quant.export.reader import Export

Place = Callable[[str, Weight], Prepared]
"""Copies a weight, by its checkpoint name, to where it is multiplied."""

_LOADERS = 6  # threads: more than cores, since reading waits for the disk; 4 were no faster


def load_resident(
    export: Export, shapes: dict[str, tuple[int, ...]], place: Place
) -> dict[str, Prepared]:
    """The weights of ``shapes``, verified and placed; reading and copying overlap."""
    thread = threading.local()  # each thread's staging memory

    def load(name: str) -> Prepared:
        if not hasattr(thread, "staging"):
            thread.staging = Arena(4 << 20, alignment=4096)
        thread.staging.reuse()
        weight = export.resident(name, thread.staging.empty)
        if tuple(weight.shape) != shapes[name]:
            asked = f"config.json asks for {list(shapes[name])}"
            raise ConfigError(f"{export.folder}: {name} has shape {list(weight.shape)}, {asked}")
        return place(name, weight)

    pool = ThreadPoolExecutor(_LOADERS)
    try:
        # The largest first, so that no thread ends alone.
        names = sorted(shapes, key=lambda name: -math.prod(shapes[name]))
        return dict(zip(names, pool.map(load, names), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)
