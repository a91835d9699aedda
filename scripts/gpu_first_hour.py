"""A GPU's first hour, in under ten minutes: the list of docs/gpu.md in its order, into one JSON.

    python scripts/gpu_first_hour.py --out first-hour.json
    python scripts/gpu_first_hour.py --dry --only facts,one-text     without a GPU

``--dry`` runs on the CPU what can be run there, with the bundled sample in place of large models.
Each command is a process of its own with a limit of its own, so that nothing ends the list.
"""

import argparse
import gc
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
SLOTMOE, PYTEST = [PYTHON, "-m", "slotmoe"], [PYTHON, "-m", "pytest", "-q", "-n", "0"]
SANITIZER = ["compute-sanitizer", "--error-exitcode", "9"]
BENCH = ["--json", "--repetitions", "2", "--prompt-tokens", "256", "--decode-tokens", "32"]
TRITON, STEPS_OF = "tests/quant/test_triton.py", "tests/offload/test_gpu_steps.py"
PROMPT, TAIL = "It is a truth universally acknowledged", 1500
LEFT_BYTES = 48 << 20  # that the step ``taken`` leaves of a GPU's memory

# Steps that are functions of this script: name -> function of ``dry`` -> what it found, with "ok".
OWN: dict[str, Callable[[bool], dict[str, Any]]] = {}


@dataclass(frozen=True)
class Step:
    """``commands`` run one after the other, or ``dry`` ones without a GPU; none of these: the step
    is left out there.  ``limit`` is in seconds, for all of them."""

    name: str
    limit: float
    commands: list[list[str]]
    dry: list[list[str]] = field(default_factory=list)


def own(function: Callable[[bool], dict[str, Any]]) -> Callable[[bool], dict[str, Any]]:
    OWN[function.__name__.replace("_", "-")] = function
    return function


def printed(command: list[str]) -> str:
    """What a program prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@own
def facts(dry: bool) -> dict[str, Any]:
    """The GPU, its link and copy engines, and what Triton needs."""
    import ctypes

    from slotmoe.offload.devices.cuda import cuda_facts, why_not

    found = cuda_facts()
    engines, reason = ctypes.c_int(0), why_not(found)
    if not reason:
        driver = ctypes.CDLL("libcuda.so.1")
        driver.cuInit(0)
        driver.cuDeviceGetAttribute(ctypes.byref(engines), 40, 0)  # ASYNC_ENGINE_COUNT
    query = "name,memory.total,memory.free,driver_version,pcie.link.gen.current,pcie.link.gen.max"
    smi = ["nvidia-smi", f"--query-gpu={query},pcie.link.width.current", "--format=csv"]
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return {
        "ok": dry or not reason,
        "why_not": reason,
        "torch": found.torch,
        "gpu": found.name,
        "capability": found.capability,
        "copy_engines": engines.value,
        "nvidia_smi": printed(smi).splitlines(),
        "python_headers": header.is_file(),
        "compiler": shutil.which("gcc") or shutil.which("clang") or shutil.which("cc"),
        "sanitizer": shutil.which(SANITIZER[0]),
        "shared_memory": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
    }


def opened(dry: bool, **options: Any) -> Any:
    from slotmoe import Runtime

    budget = {"device": "cpu", "ram": "1GiB"} if dry else {"device": "cuda", "vram": "1GiB"}
    return Runtime.open("sample", context=256, **budget, **options)


@own
def open_close(dry: bool) -> dict[str, Any]:
    """Open, generate, close, twice; what is still allocated then, no garbage being collected."""
    import torch

    gc.collect()
    gc.disable()
    allocated, kernels = [], ""
    for _ in range(2):
        with opened(dry) as runtime:
            list(runtime.generate(PROMPT, max_new_tokens=8))
            kernels = runtime.stats()["kernels"]
        del runtime
        allocated.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
    return {"ok": max(allocated) < 1 << 20, "allocated": allocated, "kernels": kernels}


@own
def one_text(dry: bool) -> dict[str, Any]:
    """The sample with all experts, 56 and 22 in slots: one text, and logits of the same bits."""
    import torch

    texts, logits = [], []
    for slots in (None, 56, 22):
        options = {} if dry else {"misses": "fetch"}
        with opened(dry, slots=slots, **options) as runtime:
            tokens = runtime.generate(PROMPT, max_new_tokens=24)
            texts.append("".join(token.text for token in tokens))
            logits.append(runtime.logits(runtime.tokenizer.encode(PROMPT)))
    same = [bool(torch.equal(logits[0], other)) for other in logits[1:]]
    return {"ok": len(set(texts)) == 1 and all(same), "texts": sorted(set(texts)), "bits": same}


@own
def timeline(dry: bool) -> dict[str, Any]:
    """Kernels and copies of 8 decoded tokens with half of the sample's experts in slots, and with
    all; the traces are for chrome://tracing."""
    import torch

    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU] if dry else [activity.CPU, activity.CUDA]
    found: dict[str, Any] = {"ok": True}
    for name, slots in (("half", 112), ("all", None)):
        with opened(dry, slots=slots) as runtime:
            tokens = runtime.generate(PROMPT, max_new_tokens=12)
            next(tokens)
            for _ in range(2):  # what is captured is captured by now
                next(tokens)
            with torch.profiler.profile(activities=kinds) as profiler:
                count = sum(1 for _ in zip(range(8), tokens, strict=False))
        path = Path(tempfile.gettempdir()) / f"slotmoe-timeline-{name}.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in profiler.events() if "cuda" in str(event.device_type).lower()]
        found[name] = {"trace": str(path), "tokens": count, "device_events": len(events)}
    return found


@own
def beside(dry: bool) -> dict[str, Any]:
    """A chat and a run at the same time, in two processes on one device."""
    budget = ["--device", "cpu", "--ram", "1GiB"] if dry else ["--device", "cuda", "--vram", "1GiB"]
    ways = {
        "chat": ([*SLOTMOE, "chat", "sample", "-n", "16", *budget], "Good morning.\n"),
        "run": ([*SLOTMOE, "run", "sample", PROMPT, "-n", "16", *budget], ""),
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    begun = {
        name: subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
        for name, (command, _) in ways.items()
    }
    told = {name: process.communicate(ways[name][1]) for name, process in begun.items()}
    codes = {name: process.returncode for name, process in begun.items()}
    good = not any(codes.values()) and all(out.strip() for out, _ in told.values())
    errors = {name: err[-300:] for name, (_, err) in told.items()}
    return {"ok": good, "codes": codes, "errors": errors}


@own
def taken(dry: bool) -> dict[str, Any]:
    """Another process (this one) has taken the memory: opening is refused in one line."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(1, free - LEFT_BYTES), dtype=torch.uint8, device="cuda")
    command = [*SLOTMOE, "run", "sample", PROMPT, "-n", "2", "--device", "cuda", "--vram", "1GiB"]
    done = subprocess.run(command, capture_output=True, text=True)
    good = done.returncode in (1, 2) and "Traceback" not in done.stderr
    return {"ok": good, "held": held.nbytes, "code": done.returncode, "error": done.stderr[-500:]}


def itself(name: str, *more: str) -> list[str]:
    return [PYTHON, str(Path(__file__).resolve()), "--step", name, *more]


def steps(work: Path) -> list[Step]:
    """The list, with exports in ``work``."""
    lite, v2 = str(work / "lite"), str(work / "v2")
    gpu = [PYTHON, "-m", "slotmoe.tools.bench", "gpu", "--repetitions", "3"]
    small = ["--device", "cpu", "--json", "--repetitions", "1", "--prompt-tokens", "8"]
    sample = [*SLOTMOE, "bench", "sample", *small, "--decode-tokens", "4"]
    half = [*SLOTMOE, "bench", lite, *BENCH, "--misses", "fetch", "--slots", "832"]
    modes = [
        [*SLOTMOE, "bench", v2, *BENCH, "--ram", "24GiB", "--misses", mode]
        for mode in ("fetch", "cpu", "hybrid")
    ]
    variants = [[*gpu, "--variant", variant] for variant in ("8x4", "16x4")]
    dry = [itself(name, "--dry") for name in OWN]
    by_name = dict(zip(OWN, dry, strict=True))
    return [
        Step("facts", 30, [itself("facts")], [by_name["facts"]]),
        Step("kernel-tests", 90, [[*PYTEST, TRITON, "-k", "not compile"]],
             [[*PYTEST, TRITON, "-k", "weighted_sum"]]),
        Step("step-tests", 90, [[*PYTEST, STEPS_OF]] * 3,
             [[*PYTEST, STEPS_OF, "-k", "captured_function"]]),
        Step("gpu-tests", 60, [[*PYTEST, "-m", "gpu", "tests/offload/test_on_gpu.py"]]),
        Step("open-close", 40, [itself("open-close")], [by_name["open-close"]]),
        Step("one-text", 40, [itself("one-text")], [by_name["one-text"]]),
        Step("kernels", 60, [gpu]),
        Step("variants", 60, variants),
        Step("lite", 150, [[*SLOTMOE, "synth", "v2-lite", lite, "--share-layers", "2"],
                           [*SLOTMOE, "bench", lite, *BENCH, "--calibrate"], half], [sample]),
        Step("timeline", 40, [itself("timeline")], [by_name["timeline"]]),
        Step("beside", 40, [itself("beside")], [by_name["beside"]]),
        Step("taken", 40, [itself("taken")]),
        Step("sanitizer", 60, [[*SANITIZER, *PYTEST, TRITON, "-k", "experts_are or norm_logits"]]),
        Step("v2", 240, [[*SLOTMOE, "synth", "v2", v2, "--resident", "nf4", "--share-layers", "4"],
                         *modes], [[*sample, "--slots", "56"]]),
    ]  # fmt: skip


def run(command: list[str], limit: float) -> dict[str, Any]:
    """A command: its exit code, seconds, its last line where that is JSON, else its last words."""
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT)
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        code, err = 124, f"ended after its {limit:.0f} s"
        out = late.stdout.decode(errors="replace") if late.stdout else ""
    except OSError as problem:
        code, out, err = 127, "", str(problem)
    result: dict[str, Any] = {"command": command, "code": code}
    result["seconds"] = round(time.perf_counter() - started, 2)
    try:
        result["found"] = json.loads(out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        result["output"] = (out + err)[-TAIL:]
    if code:
        result["error"] = err[-TAIL:]
    return result


def peak_of_plan(found: Any) -> float | None:
    """Measured peak over the plan, of a benchmark's report."""
    memory = found.get("memory") if isinstance(found, dict) else None
    if not memory or "peak_vram" not in memory:
        return None
    return round(memory["peak_vram"] / sum(memory["plan"].values()), 4)


def run_step(step: Step, dry: bool, left: float) -> dict[str, Any]:
    commands = step.dry if dry else step.commands
    report: dict[str, Any] = {"step": step.name}
    if not commands or left < 5:
        return report | {"state": "skipped", "why": "needs a GPU" if not commands else "no time"}
    until, runs = time.perf_counter() + min(step.limit, left), []
    for command in commands:
        runs.append(run(command, max(1.0, until - time.perf_counter())))
        if runs[-1]["code"]:
            break
    good = all(not one["code"] and one.get("found", {}).get("ok", True) for one in runs)
    peaks = [peak for one in runs if (peak := peak_of_plan(one.get("found"))) is not None]
    return report | {"state": "ok" if good else "failed", "runs": runs, "peak_of_plan": peaks}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("first-hour.json"))
    parser.add_argument("--dry", action="store_true", help="on the CPU, what can be run there")
    parser.add_argument("--only", default="", help="names of steps, separated by commas")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it [9.5]")
    parser.add_argument("--work", type=Path, help="where exports go [a folder in /dev/shm]")
    parser.add_argument("--step", choices=OWN, help="one step, in this process")
    given = parser.parse_args()
    if given.step:
        print(json.dumps(OWN[given.step](given.dry)))
        return 0
    shared = Path("/dev/shm")
    place = given.work or (shared if shared.is_dir() and not given.dry else None)
    until, reports = time.perf_counter() + 60 * given.minutes, []
    with tempfile.TemporaryDirectory(prefix="slotmoe-", dir=place) as folder:
        for step in steps(Path(folder)):
            if given.only and step.name not in given.only.split(","):
                continue
            reports.append(run_step(step, given.dry, until - time.perf_counter()))
            print(f"{step.name}: {reports[-1]['state']}", file=sys.stderr, flush=True)
            given.out.write_text(json.dumps({"dry": given.dry, "steps": reports}, indent=1))
    return int(any(report["state"] == "failed" for report in reports))


if __name__ == "__main__":
    raise SystemExit(main())
