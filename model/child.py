"""Libraries that read what a stranger wrote run in a child process, with limits on time and memory:
a sandbox bounds neither, and a native library may abort the process that it is in."""

import json
import subprocess
import sys
from dataclasses import dataclass

from slotmoe.errors import ConfigError


@dataclass(frozen=True)
class Child:
    """A ``program`` in Python that imports its libraries and then calls ``limit()``, from where on
    it has ``seconds`` of CPU time and ``memory`` bytes more.  ``what`` is what it reads."""

    what: str
    program: str
    seconds: float
    memory: int

    def run(self, data: bytes) -> bytes:
        """What the program writes when it reads ``data``.  Raises ``ConfigError``."""
        # What Python would search, without the working directory; so it need not look for it (-S).
        paths = json.dumps([path for path in sys.path if path])
        limits = map(str, (self.seconds, self.memory))
        command = [sys.executable, "-I", "-S", "-c", _LIMITS + self.program, paths, *limits]
        timeout = 60 * self.seconds  # for a machine that stands still: the child bounds CPU time
        try:  # the environment may hold keys: who breaks out finds it empty
            child = subprocess.run(
                command, input=data, capture_output=True, timeout=timeout, env={}
            )
        except subprocess.TimeoutExpired:
            causes = "the machine is overloaded, or the file is hostile"
            raise ConfigError(f"{self.what}: did not finish; {causes}") from None
        if child.returncode < 0:
            problem = f"crashed the library that reads it (signal {-child.returncode})"
            if child.returncode == -_TOO_LONG:
                problem = f"did not finish in {self.seconds} seconds"
            raise ConfigError(f"{self.what}: {problem}; it is broken or hostile")
        if child.returncode:
            lines = child.stderr.decode(errors="replace").strip().splitlines() or ["out of memory"]
            raise ConfigError(f"{self.what}: failed ({lines[-1][:160]})")
        return child.stdout


_TOO_LONG = 27  # SIGPROF, which kills
_LIMITS = """
import json, resource, signal, sys
def limit():
    seconds, memory = float(sys.argv[2]), int(sys.argv[3])
    signal.setitimer(signal.ITIMER_PROF, seconds)
    memory += int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
sys.path[:] = json.loads(sys.argv[1])
"""
