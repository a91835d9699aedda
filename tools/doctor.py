"""``slotmoe doctor``: what this machine has for a model, what is missing, and how to get it."""

import ctypes
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from mmap import PAGESIZE, mmap
from pathlib import Path

import click
import psutil

from slotmoe import __version__, system
from slotmoe.errors import ConfigError
from slotmoe.offload import machine
from slotmoe.offload.machine import file_system
from slotmoe.offload.model_cache import listing
from slotmoe.offload.plan.speed import stored_bandwidths
from slotmoe.quant.shapes import ALIGNMENT
from slotmoe.sizes import format_size
from slotmoe.tools.options import JSON, libraries
from slotmoe.tools.screen import json_of, show

# By the flags that Linux shows.
_SETS = {"avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI", "avx2": "AVX2"}
_SETS |= {"asimd": "NEON", "asimddp": "sdot", "i8mm": "i8mm"}
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MARKS = {"ok": "ok", "note": "--", "bad": "!!"}


@dataclass(frozen=True)
class Check:
    """What was ``found`` of one thing.  ``state`` is ``ok``, ``note`` (slotmoe runs without it) or
    ``bad`` (slotmoe does not run, or far slower than it could); ``advice`` says how to get it."""

    name: str
    state: str
    found: str
    advice: str = ""


@click.command(name="doctor")
@JSON
def command(as_json: bool) -> int:
    """Show what this machine has for slotmoe: processor, kernels, GPU, memory, disk and libraries;
    and for what is missing (!!) or could be added (--) how to get it.  The exit code is 1 if
    anything is missing.

    \b
    Examples:
      slotmoe doctor
      slotmoe doctor --json
    """
    checks = [_system(), *_processor(), *_kernels(), _gpu(), _vulkan(), *_memory(), *_libraries()]
    checks += [_cache(), _disk()]
    is_well = all(check.state != "bad" for check in checks)
    if as_json:
        print(json_of({"version": __version__, "ok": is_well, "checks": list(map(asdict, checks))}))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            show(f"{_MARKS[check.state]}  {check.name:{width}}  {check.found}")
            if check.advice:
                show(f"    {'':{width}}  -> {check.advice}")
    return int(not is_well)


def _system() -> Check:
    name, python = platform.system(), platform.python_version()
    found = f"{name} {platform.release()}, {platform.machine()}; Python {python}"
    if name == "Linux":
        return Check("system", "ok", f"slotmoe {__version__}; {found}")
    tested = "Windows under Wine alone" if name == "Windows" else "Linux alone"
    state = "note" if name in ("Darwin", "Windows") else "bad"
    return Check("system", state, found, f"slotmoe is tested on {tested}; see docs/install.md")


def _processor() -> Iterator[Check]:
    """And where threads run and memory lies, if that is a question here."""
    name, flags = system.processor_name()
    best = "".join(f", {text}" for flag, text in _SETS.items() if flag in flags)
    yield Check("processor", "ok", f"{name or platform.machine()}, {system.cores()} cores{best}")
    nodes = [node for processor in system.processors() for node in processor.nodes]
    if len(nodes) > 1:
        page = mmap(-1, ALIGNMENT)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        if system.lie_on(nodes, address, ALIGNMENT):
            yield Check("NUMA", "ok", f"{len(nodes)} nodes; memory lies where threads run")
        else:
            advice = "allow the system call mbind (as in: docker run --cap-add SYS_NICE)"
            yield Check("NUMA", "note", f"{len(nodes)} nodes; memory can't be placed", advice)


def _kernels() -> Iterator[Check]:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    again = "install slotmoe again: pip install --force-reinstall --no-deps ."
    first = "" if compiler else "install a C++ compiler (as in: apt install g++), then "
    problem = "not built: torch computes all, up to 200 times slower, and experts stay by lru"
    missing = Check("kernels", "bad", problem, first + again)
    try:
        isa = machine.instruction_set()
        yield missing if isa is None else Check("kernels", "ok", f"native, {isa}")
    except ConfigError as failure:
        yield Check("kernels", "bad", str(failure), "unset SLOTMOE_INSTRUCTIONS")
    except (OSError, AttributeError) as failure:
        advice = "they were built for another machine; install slotmoe again from source"
        yield Check("kernels", "bad", f"do not load ({str(failure)[:80]})", advice)
    found = f"{compiler or 'no C++ compiler'}; only an install needs it"
    yield Check("compiler", "ok" if compiler else "note", found)


def _gpu() -> Check:
    """A process of its own asks torch, Triton and the C compiler: one may end that."""
    if find_spec("torch") is None:
        return Check("GPU", "bad", "torch is not installed, so nothing runs", "pip install torch")
    torch = metadata.version("torch")
    if (gpu := machine.visible_gpu(0)) is None:
        return Check("GPU", "note", f"none found; the CPU computes (torch {torch})")
    size = format_size(gpu.memory) if gpu.memory else "memory that its driver does not tell"
    found, asked = f"{gpu.name}, {size}, driver {gpu.driver}", machine.ask_gpu(0)
    if reason := asked["reason"]:
        return Check("GPU", "bad", f"{found}; not used: {reason}", asked["mend"])
    return Check("GPU", "ok", f"{found}; torch {torch}")


def _vulkan() -> Check:
    """What ``--device vulkan`` takes; ``auto`` does not yet."""
    if reason := (asked := machine.ask_gpu(0, "vulkan"))["reason"]:
        return Check("Vulkan", "note", f"none: {reason}")
    return Check("Vulkan", "ok", f"--device vulkan: {', '.join(asked['all'])}")


def _memory() -> Iterator[Check]:
    total, free = machine.total_memory(), format_size(machine.available_memory())
    limit = ", the limit of a memory cgroup" if total < psutil.virtual_memory().total else ""
    yield Check("RAM", "ok", f"{free} free of {format_size(total)}{limit}{_stored('ram')}")
    huge, advice = "unknown", f"echo madvise > {_HUGE_PAGES}, as root"
    with suppress(OSError):
        huge = re.findall(r"\[(\w+)\]", _HUGE_PAGES.read_text(encoding="utf-8"))[0]
    found = f"{PAGESIZE} bytes; transparent huge pages: {huge}"
    yield Check("pages", *(("note", found, advice) if huge == "never" else ("ok", found)))


def _libraries() -> Iterator[Check]:
    for extra in ("serve", "chat", "plots", "gguf"):
        there = libraries(extra)
        if missing := [name for name in there if not there[name]]:
            found = f"not installed: {', '.join(missing)}"
            yield Check(extra, "note", found, f"pip install 'slotmoe[{extra}]'")
        else:
            yield Check(extra, "ok", ", ".join(there))


def _stored(name: str) -> str:
    """The bandwidth that ``slotmoe bench --calibrate`` measured, if it did."""
    with suppress(ConfigError):
        rates = stored_bandwidths(machine.cache_folder() / "machine.json")
        if (origin := rates.origin_of(name)) != "assumed":
            return f", {getattr(rates, name) / 1e9:.1f} GB/s {origin}"
    return ""


def _cache() -> Check:
    """The exports in the cache folder."""
    try:
        folder = machine.cache_folder()
        there = next(filter(Path.exists, (folder.absolute(), *folder.absolute().parents)))
        if not there.is_dir():
            raise ConfigError(f"{folder}: {there} is no folder")
        held = sum(cached.bytes for cached in listing(folder))
    except (ConfigError, OSError) as problem:
        return Check("cache", "bad", str(problem), "set SLOTMOE_CACHE to a folder that can be read")
    return Check("cache", "ok", f"{folder}, {format_size(held)} of exports (slotmoe list)")


def _disk() -> Check:
    """The disk of the cache folder, or of the present one if there is none."""
    there = Path.cwd()
    with suppress(ConfigError):
        there = machine.cache_disk()
    found = f"{format_size(shutil.disk_usage(there).free)} free on {file_system(there)[0]}"
    try:
        with tempfile.TemporaryFile(dir=there) as file:  # which has no name to be left behind
            file.write(bytes(ALIGNMENT))
            file.flush()
            os.fsync(file.fileno())
            is_direct = system.bypass_page_cache(file.fileno(), ALIGNMENT)
    except OSError as problem:
        advice = "set SLOTMOE_CACHE to a folder that can be written"
        return Check("disk", "bad", f"{found}; can't be written ({problem.strerror})", advice)
    found += "" if is_direct else "; no direct reads"
    found += _stored("disk") or "; slotmoe bench measures its speed"
    advice = "reads go through the page cache; keep exports on a local disk (ext4, xfs)"
    return Check("disk", "ok", found) if is_direct else Check("disk", "note", found, advice)
