"""Runs in the Windows Python beside a command: ends it as Windows does for Ctrl-C, or breaks a
child's limits.  It knows slotmoe and nothing of campaigns."""

import ctypes
import json
import os
import sys
import time

import psutil

from slotmoe import system
from slotmoe.errors import ConfigError
from slotmoe.model.child import Child

PROGRAM = """
def answer(data):
    limit()
    exec(data, globals())
    return b"said"
"""
BREAKS = {
    "says": "0",
    "endless": "while True: 0",
    "native, endless": "10 ** 10 ** 9",
    "recurses": "def deeper(): deeper()\ndeeper()",
    "raises": "raise ValueError('a')",
    "ends": "os._exit(3)",
    "exits": "sys.exit('bye')",
    "half": "os.write(1, b'\\0\\5' + b'\\0' * 7 + b'ab'); os._exit(0)",
    "says again": "0",
}


def strike():
    """For each line, the number of an event, let commands of slotmoe have that event.  Windows too
    begins a thread in them at this routine."""
    kernel, pointer = ctypes.WinDLL("kernel32"), ctypes.c_void_p
    routine = ctypes.cast(ctypes.WinDLL("kernelbase").CtrlRoutine, pointer)
    kernel.OpenProcess.restype = pointer
    kernel.CreateRemoteThread.argtypes = [
        *(pointer, pointer, ctypes.c_size_t, pointer, pointer, ctypes.c_uint32, pointer)
    ]
    print("ready", flush=True)
    for line in sys.stdin:
        struck = 0
        for process in psutil.process_iter(["cmdline"]):
            if "slotmoe" in (process.info["cmdline"] or ()):
                handle = kernel.OpenProcess(0x1FFFFF, False, process.pid)
                kernel.CreateRemoteThread(handle, None, 0, routine, int(line), 0, None)
                struck += 1
        print(struck, flush=True)


def limits():
    """What is said of each of ``BREAKS``, and of one that waits."""
    if os.name == "nt" and hasattr(ctypes.WinDLL("ntdll"), "wine_get_version"):
        # Wine says the asking process's time for any; that of threads it knows.
        def used(number):
            threads = psutil.Process(number).threads()
            return sum(thread.user_time + thread.system_time for thread in threads)

        system.own._used = used
    child, said = Child(PROGRAM, 0.5, 64 << 20), {}
    for name, code in [*BREAKS.items(), ("waits", "import time; time.sleep(60)")]:
        if name == "waits":
            child._seconds = 0.05
        began = time.monotonic()
        try:
            said[name] = child.run(code.encode(), "this").decode()
        except ConfigError as problem:
            said[name] = str(problem)
        if time.monotonic() - began > 20:
            said[name] += ", after 20 seconds"
    child.close()
    print(json.dumps(said))


if __name__ == "__main__":
    {"strike": strike, "limits": limits}[sys.argv[1]]()
