"""What systems do each in its own way: cores, files and their locks, memory, a child's limits.

``posix`` is Linux and macOS, ``windows`` is Windows; nothing else asks which of them it runs on.
"""

import sys
import time
from pathlib import Path

from slotmoe.errors import naming
from slotmoe.system.placement import MAX_THREADS as MAX_THREADS
from slotmoe.system.placement import Placement as Placement
from slotmoe.system.placement import Processor as Processor
from slotmoe.system.placement import bind as bind
from slotmoe.system.placement import choose_placement as choose_placement
from slotmoe.system.placement import cores as cores
from slotmoe.system.placement import lie_on as lie_on
from slotmoe.system.placement import processors as processors

if sys.platform == "win32":
    from slotmoe.system import windows as own
else:
    from slotmoe.system import posix as own

NO_LINK, CACHES, CUDA = own.NO_LINK, own.CACHES, own.CUDA
MEMORY, ROOM = own.MEMORY, own.ROOM
open_file, patiently = own.open_file, own.patiently
bytes_on_disk, keep_sparse = own.bytes_on_disk, own.keep_sparse
bypass_page_cache, use_page_cache = own.bypass_page_cache, own.use_page_cache
read_at, write_at, move, sync_folder = own.read_at, own.write_at, own.move, own.sync_folder
processor_name = own.processor_name
private_pages, peak_rss, allow_open_files = own.private_pages, own.peak_rss, own.allow_open_files
hold, step_back, available_memory = own.hold, own.step_back, own.available_memory
ready_streams, terminal_mode = own.ready_streams, own.terminal_mode
bound, deadline, apart = own.bound, own.deadline, own.apart
TOO_LONG, NO_READER = own.TOO_LONG, own.NO_READER


def take_lock(path: Path, seconds: float, folder: bool = False) -> int:
    """As ``posix.lock``, but ``BlockingIOError`` comes if another has it for so many seconds."""
    until = time.monotonic() + seconds
    while True:
        try:
            with naming(path):
                return own.lock(path, folder)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.01)
