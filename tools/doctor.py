"""``slotmoe doctor``: what this machine has for a model, what is missing, and how to get it."""

import ctypes
import importlib.machinery
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from mmap import mmap
from pathlib import Path

import click
import psutil

from slotmoe import __version__, quant, system
from slotmoe.errors import ConfigError
from slotmoe.offload import machine
from slotmoe.offload.model_cache import listing
from slotmoe.offload.plan.speed import stored_bandwidths
from slotmoe.quant.shapes import ALIGNMENT
from slotmoe.sizes import format_size
from slotmoe.tools.options import JSON, flag, option
from slotmoe.tools.screen import visible

_MEASURE_HELP = "Measure the disk's speed: write 256 MiB to the cache folder and read them back."
_EXPERTS_HELP = "Look at the drive of this copy of an export's experts too; may be repeated."
_MEASURED_BYTES, _READ_BYTES, _READERS = 256 << 20, 4 << 20, 4
_CPUINFO = Path("/proc/cpuinfo")
_SETS = {"avx512_vnni": "AVX-512 VNNI", "avx2": "AVX2"}  # by their flags there
_SETS |= {"asimd": "NEON", "asimddp": "sdot", "i8mm": "i8mm"}
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
@flag("--measure", _MEASURE_HELP)
@option("--experts-dir experts_dirs", "DIR", _EXPERTS_HELP, multiple=True)
@JSON
def command(measure: bool, experts_dirs: tuple[str, ...], as_json: bool) -> int:
    """Show what this machine has for slotmoe: processor, kernels, GPU, memory, disk and libraries;
    and for what is missing (!!) or could be added (--) how to get it.  The exit code is 1 if
    anything is missing.

    \b
    Examples:
      slotmoe doctor
      slotmoe doctor --measure --json
    """
    checks = [check for find in _CHECKS for check in find()]
    checks += [_cache(), _disk(measure), *(_drive(Path(path), measure) for path in experts_dirs)]
    is_well = all(check.state != "bad" for check in checks)
    if as_json:
        report = {"version": __version__, "ok": is_well, "checks": list(map(asdict, checks))}
        print(json.dumps(report))
        return int(not is_well)
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{_MARKS[check.state]}  {check.name:{width}}  {visible(check.found)}")
        if check.advice:
            print(f"    {'':{width}}  -> {check.advice}")
    return int(not is_well)


def _system() -> Iterator[Check]:
    name, python = platform.system(), platform.python_version()
    found = f"{name} {platform.release()}, {platform.machine()}; Python {python}"
    if name == "Linux":
        yield Check("system", "ok", f"slotmoe {__version__}; {found}")
    else:
        state = "note" if name == "Darwin" else "bad"
        yield Check("system", state, found, "slotmoe is tested on Linux alone; see docs/install.md")


def _processor() -> Iterator[Check]:
    facts = {"model name": platform.machine()}
    with suppress(OSError):
        lines = _CPUINFO.read_text(errors="replace").splitlines()
        pairs = (line.partition(":") for line in reversed(lines))
        facts |= {key.strip(): value.strip() for key, _, value in pairs}
    if platform.system() == "Darwin":
        with suppress(OSError, subprocess.SubprocessError):
            query = ["sysctl", "-n", "machdep.cpu.brand_string"]
            facts["model name"] = subprocess.check_output(query, text=True, timeout=5).strip()
    flags = f"{facts.get('flags', '')} {facts.get('Features', '')}".split()
    best = "".join(f", {text}" for flag, text in _SETS.items() if flag in flags)
    yield Check("processor", "ok", f"{facts['model name']}, {system.cores()} cores{best}")


def _kernels() -> Iterator[Check]:
    folder = Path(str(quant.__file__)).parent / "kernels" / "cpu"
    paths = [folder / f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if path is None:
        again = "install slotmoe again: pip install --force-reinstall --no-deps ."
        get = (
            again if compiler else f"install a C++ compiler (as in: apt install g++), then {again}"
        )
        problem = "not built: torch computes everything, up to 200 times slower"
        yield Check("kernels", "bad", problem, get)
    else:
        try:
            isa = ctypes.CDLL(str(path)).slotmoe_isa
            isa.restype = ctypes.c_char_p
            yield Check("kernels", "ok", f"native, {isa().decode()}")
        except (OSError, AttributeError) as problem:
            advice = "they were built for another machine; install slotmoe again from source"
            yield Check("kernels", "bad", f"do not load ({str(problem)[:80]})", advice)
    found = compiler or "no C++ compiler"
    yield Check("compiler", "ok" if compiler else "note", f"{found}; only an install needs it")


def _gpu() -> Iterator[Check]:
    if not _is_installed("torch"):
        yield Check("GPU", "bad", "torch is not installed, so nothing runs", "pip install torch")
        return
    torch, query = metadata.version("torch"), "--query-gpu=name,memory.total,driver_version"
    program = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(program, capture_output=True, text=True, timeout=5, check=True)
        name, total, driver = run.stdout.splitlines()[0].split(", ")
        found = f"{name}, {format_size(int(total) << 20)}, driver {driver}"
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        yield Check("GPU", "note", f"none found; the CPU computes (torch {torch})")
        return
    if "+cpu" in torch:
        advice = "install a CUDA build of torch: pip install --force-reinstall torch"
        yield Check("GPU", "bad", f"{found}; but torch {torch} has no CUDA", advice)
    else:
        yield Check("GPU", "ok", f"{found}; torch {torch}")


def _memory() -> Iterator[Check]:
    total, free = machine.total_memory(), machine.available_memory()
    found = f"{format_size(free)} free of {format_size(total)}"
    if total < psutil.virtual_memory().total:
        found += ", the limit of a memory cgroup"
    yield Check("RAM", "ok", f"{found}{_stored('ram')}")
    page, huge = os.sysconf("SC_PAGE_SIZE"), "unknown"
    with suppress(OSError):
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        huge = re.findall(r"\[(\w+)\]", modes)[0]
    found = f"{page} bytes; transparent huge pages: {huge}"
    advice = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, as root"
    is_off = huge == "never"
    yield Check("pages", "note" if is_off else "ok", found, advice if is_off else "")


def _libraries() -> Iterator[Check]:
    extras: dict[str, list[str]] = {}
    for requirement in metadata.requires("slotmoe") or []:
        match = re.match(r"([\w.-]+)[^;]*; extra == ['\"](\w+)['\"]$", requirement)
        if match and match[2] in ("chat", "serve", "plots", "gguf"):
            extras.setdefault(match[2], []).append(match[1])
    for extra, libraries in extras.items():
        missing = [name for name in libraries if not _is_installed(name)]
        if missing:
            found = f"not installed: {', '.join(missing)}"
            yield Check(extra, "note", found, f"pip install 'slotmoe[{extra}]'")
        else:
            yield Check(extra, "ok", ", ".join(libraries))


def _is_installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


_CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    _system, _processor, _kernels, _gpu, _memory, _libraries,
)  # fmt: skip


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
        held = sum(cached.bytes for cached in listing(folder))
    except (ConfigError, OSError) as problem:
        return Check("cache", "bad", str(problem), "set SLOTMOE_CACHE to a folder that can be read")
    return Check("cache", "ok", f"{folder}, {format_size(held)} of exports (slotmoe list)")


def _disk(measure: bool) -> Check:
    """The disk of the cache folder, or of the present one if there is none."""
    there = Path.cwd()
    with suppress(ConfigError):
        folder = machine.cache_folder().absolute()
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
    found = f"{format_size(shutil.disk_usage(there).free)} free on {_file_system(there)}"
    try:
        with tempfile.NamedTemporaryFile(dir=there) as file:
            file.write(bytes(_READ_BYTES))
            file.flush()
            is_direct = _opens_direct(file.name)
            if measure:
                _fill(Path(file.name))
                speed = _read_speed(Path(file.name))
            else:
                speed = _stored("disk") or "; --measure measures its speed"
    except OSError as problem:
        advice = "set SLOTMOE_CACHE to a folder that can be written"
        return Check("disk", "bad", f"{found}; can't be written ({problem.strerror})", advice)
    if is_direct:
        return Check("disk", "ok", f"{found}; direct reads{speed}")
    advice = "reads go through the page cache; keep exports on a local disk (ext4, xfs)"
    return Check("disk", "note", f"{found}; no direct reads{speed}", advice)


def _drive(folder: Path, measure: bool) -> Check:
    """A folder for --experts-dir."""
    files = sorted(folder.glob("layer-*.safetensors"))
    if not files:
        advice = "copy the files of an export's experts folder there"
        return Check("drive", "bad", f"{folder} has no layer-*.safetensors", advice)
    is_direct = _opens_direct(str(files[0]))
    found = f"{len(files)} layers in {folder} on {_file_system(folder)}"
    found += f"; {'direct' if is_direct else 'no direct'} reads"
    speed = _read_speed(files[0]) if measure else ""
    return Check("drive", "ok" if is_direct else "note", found + speed)


def _file_system(folder: Path) -> str:
    """Its type, as in ``ext4``."""
    resolved, best = str(folder.resolve()), ("", "unknown file system")
    for part in psutil.disk_partitions(all=True):
        mount = part.mountpoint.rstrip("/")
        if (resolved == mount or resolved.startswith(f"{mount}/")) and len(mount) >= len(best[0]):
            best = (mount, part.fstype)
    return best[1]


def _opens_direct(path: str) -> bool:
    """Whether aligned bytes can be read past the page cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        return system.bypass_page_cache(handle, ALIGNMENT)
    finally:
        os.close(handle)


def _fill(path: Path) -> None:
    block = os.urandom(_READ_BYTES)
    with open(path, "r+b") as file:
        for _ in range(_MEASURED_BYTES // _READ_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _read_speed(path: Path) -> str:
    """Bytes a second of a few threads that read the file past the page cache."""
    size = min(_MEASURED_BYTES, path.stat().st_size)

    def read(start: int) -> None:
        handle, memory = os.open(path, os.O_RDONLY), mmap(-1, _READ_BYTES)
        try:
            system.bypass_page_cache(handle, ALIGNMENT)
            for position in range(start, size, _READERS * _READ_BYTES):
                os.preadv(handle, [memory], position)
        finally:
            os.close(handle)

    started = time.perf_counter()
    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(read, range(0, _READERS * _READ_BYTES, _READ_BYTES)))
    return f", {size / (time.perf_counter() - started) / 1e9:.1f} GB/s measured now"
