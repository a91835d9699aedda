"""Steps of ``scripts/gpu_first_hour.py`` that need Python, each in a process of its own:
``python -m scripts.gpu.steps NAME '{"argument": value}'`` prints what it found as one JSON object.

``ok`` in it says whether the step is well; ``skipped`` why it could not be done here.
"""

import ctypes
import gc
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

Found = dict[str, Any]
STEPS: dict[str, Callable[..., Found]] = {}
PROMPT = "It is a truth universally acknowledged"
SLOTMOE = [sys.executable, "-m", "slotmoe"]
SANITIZER = "compute-sanitizer"
SANITIZED = (  # how tests begin; the first one of each is run under the sanitizer's tools
    "tests/quant/test_triton.py::test_experts_are",
    "tests/quant/test_triton.py::test_a_layer_in_two_launches",
    "tests/quant/test_triton.py::test_norm_logits",
    "tests/quant/test_triton.py::test_weighted_sum",
    "tests/quant/test_ops.py::test_an_operation",
    "tests/quant/test_ops.py::test_an_indexer",
)
# What a model may leave when it is closed the second time and had not when it was the first: less
# than the least block of torch's allocator that a weight or a graph's pool would keep.
LEFT_BYTES = 1 << 20
# What others leave of a GPU: too little for a CUDA context (some 300 to 600 MiB), and enough for
# that and for a part of the experts, but not for the budget that is asked for.
TOO_LITTLE, SOME = 48 << 20, 2 << 30


def step(function: Callable[..., Found]) -> Callable[..., Found]:
    STEPS[function.__name__.replace("_", "-")] = function
    return function


def printed(command: list[str]) -> str:
    """What a program prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def opened(dry: bool, export: str = "sample", **options: Any) -> Any:
    """An open model on the GPU, or on its twin."""
    from scripts.gpu.on_twin import on_twin
    from slotmoe import Runtime

    with on_twin() if dry else nullcontext():
        return Runtime.open(export, device="cuda", **{"vram": "1GiB", "context": 256, **options})


@step
def facts(dry: bool) -> Found:
    """The GPU, its link and copy engines, and what Triton needs."""
    import torch

    from slotmoe.offload.devices.cuda import judge_gpu
    from slotmoe.offload.machine import instruction_set

    engines, (name, reason, _) = ctypes.c_int(0), judge_gpu(0)
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
        "torch": torch.__version__,
        "gpu": name,
        "capability": None if reason else torch.cuda.get_device_capability(0),
        "copy_engines": engines.value,
        "nvidia_smi": printed(smi).splitlines(),
        "native_kernels": instruction_set(),
        "python_headers": header.is_file(),
        "compiler": shutil.which("gcc") or shutil.which("clang") or shutil.which("cc"),
        "sanitizer": shutil.which(SANITIZER),
        "shared_memory": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
    }


@step
def export(dry: bool, geometry: str, path: str, layers: int, resident: str) -> Found:
    """An export with random weights, unless a run before left it: of so many ``layers`` of a
    geometry, 0 for all, two of them distinct on the disk."""
    from slotmoe.offload.plan.advice import geometry_path

    if (Path(path) / "slotmoe.json").is_file():
        return {"ok": True, "export": path, "seconds": 0}
    config = json.loads(geometry_path(geometry).read_text())
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    source = Path(f"{path}.json")
    source.write_text(json.dumps(config))
    command = [*SLOTMOE, "synth", str(source), path, "--share-layers", "2", "--json"]
    done = subprocess.run([*command, "--resident", resident], capture_output=True, text=True)
    good = done.returncode == 0
    return {"ok": good, **(json.loads(done.stdout) if good else {"error": done.stderr[-1500:]})}


@step
def open_close(dry: bool) -> Found:
    """Open, generate, close, twice, no garbage being collected.  What the first leaves is torch's
    and cuBLAS's (8.5 MB, on compute capability 9.0 32 MiB); the second adds nothing."""
    import torch

    gc.collect()
    gc.disable()
    left, kernels = list[int](), ""
    for _ in range(2):
        with opened(dry) as runtime:
            list(runtime.generate(PROMPT, max_new_tokens=8))
            kernels = runtime.stats()["kernels"]
        del runtime
        left.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
    return {"ok": left[1] - left[0] < LEFT_BYTES, "allocated": left, "kernels": kernels}


@step
def one_text(dry: bool) -> Found:
    """The sample with all experts, 56 and 22 in slots: one text, and logits of the same bits."""
    import torch

    texts, logits = list[str](), []
    for slots in (None, 56, 22):
        with opened(dry, slots=slots, misses="fetch") as runtime:
            tokens = runtime.generate(PROMPT, max_new_tokens=8 if dry else 24)
            texts.append("".join(token.text for token in tokens))
            logits.append(runtime.logits(runtime.tokenizer.encode(PROMPT)))
    same = [bool(torch.equal(logits[0], other)) for other in logits[1:]]
    return {"ok": len(set(texts)) == 1 and all(same), "texts": sorted(set(texts)), "bits": same}


@step
def taken(dry: bool, path: str) -> Found:
    """Another process (this one) has taken the memory: opening is refused in one line, and where
    some is left the budget that the line names works."""
    import torch

    if dry:
        return {"ok": True, "skipped": "needs a GPU"}
    told = list[Found]()

    def run(left: int, vram: str) -> str:
        free = torch.cuda.mem_get_info()[0]
        held = torch.empty(max(1, free - left), dtype=torch.uint8, device="cuda")
        command = [*SLOTMOE, "run", path, PROMPT, "-n", "2", "--device", "cuda", "--vram", vram]
        done = subprocess.run(command, capture_output=True, text=True)
        told.append(
            {"left": left, "vram": vram, "code": done.returncode, "said": done.stderr[-500:]}
        )
        del held
        torch.cuda.empty_cache()
        return done.stderr

    run(TOO_LITTLE, "1GiB")
    named = re.search(r"give --vram (\S+) or less", run(SOME, "3GiB"))
    if named:
        run(SOME, named[1])
    lines = all("Traceback" not in run["said"] for run in told)
    codes = [run["code"] for run in told]
    return {"ok": lines and codes[0] in (1, 2) and codes[1:] == [2, 0], "runs": told}


@step
def sanitizer(dry: bool, probe: float, tests: float) -> Found:
    """Memory errors and races of six kernel tests, each tool in so many seconds; how slow it makes
    them is not known, so that its end is no error."""
    import os

    if shutil.which(SANITIZER) is None:
        return {"ok": True, "skipped": f"{SANITIZER} is not here"}
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor has bounds

    def run(tool: str, limit: float, command: list[str]) -> Found:
        started = time.perf_counter()
        watched = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, *command]
        try:
            done = subprocess.run(
                watched, capture_output=True, text=True, env=environment, timeout=limit
            )
            code, said = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as late:
            code, said = 124, (late.stdout or b"").decode(errors="replace")
        spent = round(time.perf_counter() - started, 1)
        return {"tool": tool, "code": code, "seconds": spent, "said": said[-1500:]}

    tried = run("memcheck", probe, ["-c", "import torch; torch.zeros(1, device='cuda').item()"])
    if tried["code"]:
        return {"ok": True, "skipped": f"{SANITIZER} does not run here", "probe": tried}
    six = ["-m", "pytest", "-W", "ignore", "-n", "0", *six_tests()]
    runs = [run(tool, tests, six) for tool in ("memcheck", "racecheck")]
    return {"ok": all(run["code"] in (0, 124) for run in runs), "runs": runs}


def six_tests() -> list[str]:
    """The first test of each of ``SANITIZED``, as pytest names it."""
    files = dict.fromkeys(name.partition("::")[0] for name in SANITIZED)
    collect = [sys.executable, "-m", "pytest", "-n", "0", "--collect-only", *files]
    ids = subprocess.run(collect, capture_output=True, text=True).stdout.splitlines()
    return [next(line for line in ids if line.startswith(name)) for name in SANITIZED]


@step
def speed(dry: bool, path: str, cases: list[dict[str, int]], layers: int, **options: Any) -> Found:
    """``slotmoe bench`` of each case on one open model, beside what ``slotmoe plan`` expects with
    the bandwidths measured here.  With ``layers`` a model of fewer is extrapolated to so many: a
    layer's time is a MoE layer's share of the token, so that the head counts too often."""
    from slotmoe.offload.observe import measure as observed
    from slotmoe.offload.plan.speed import Bandwidths
    from slotmoe.tools.bench.speed import measure

    needed = max(case["prompt_tokens"] + case["depth"] + case["decode_tokens"] for case in cases)
    with opened(dry, path, context=needed, **options) as runtime:
        runtime.warm()
        reports = [measure(runtime, **case, repetitions=1 if dry else 2) for case in cases]
        closed, moe_layers = observed.Lasting(runtime.model), len(runtime.config.moe_layers)
    rates = {"gpu": reports[0]["ceiling"]["read_bandwidth"]}
    rates |= {name: reports[0]["link"][name] for name in ("pcie", "pcie_busy", "experts")}
    setting = closed.setting(Bandwidths().updated("measured", **rates))
    kinds = ("prefill_tokens_per_second", "decode_tokens_per_second")
    rows = list[Found]()
    for case, report in zip(cases, reports, strict=True):
        before = max(1, case["depth"] or case["prompt_tokens"])
        predicted = observed.predict(setting, before, case["decode_tokens"])
        row = {**case, **{kind: report[kind] for kind in kinds}}
        row["predicted"] = {kind: predicted[kind] for kind in kinds}
        row["predicted_seconds"] = predicted["decode_seconds"]
        if layers:
            row["extrapolated"] = {kind: report[kind] * moe_layers / layers for kind in kinds}
        rows.append(row | {name: report[name] for name in ("link", "ceiling", "cache", "misses")})
    memory, settings = reports[-1]["memory"], reports[-1]["settings"]
    planned = sum(memory["plan"].values()) - memory["plan"]["page tables"]  # no tensor of torch's
    return {
        "ok": True,
        "settings": settings,
        "cases": rows,
        "peak_of_plan": round(memory["peak_vram"] / planned, 4),
        "memory": memory,
    }


@step
def timeline(dry: bool, path: str, slots: int, traces: str, **options: Any) -> Found:
    """What the GPU does in 8 decoded tokens with every expert in a slot, and with so many
    ``slots``; the traces are for chrome://tracing."""
    import torch

    from bench.turns import random_ids
    from slotmoe.tools.bench.speed import token_seconds

    activity, tokens = torch.profiler.ProfilerActivity, 8
    kinds = [activity.CPU] if dry else [activity.CPU, activity.CUDA]
    found: Found = {"ok": True}
    for name, given in (("all", {}), ("some", {"slots": slots, "misses": "fetch"})):
        with opened(dry, path, **options, **given) as runtime:
            runtime.warm()
            ids = random_ids(tokens)
            token_seconds(runtime, ids)  # what is captured is captured by now
            seconds = median(token_seconds(runtime, ids))
            with torch.profiler.profile(activities=kinds) as profiler:
                token_seconds(runtime, ids)
        trace = Path(traces) / f"timeline-{name}.json.gz"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in profiler.events() if "cuda" in str(event.device_type).lower()]
        spent, calls = Counter[str](), Counter(event.name for event in profiler.events())
        for event in events:
            spent[event.name[:60]] += event.self_device_time_total / tokens
        found[name] = {
            "trace": str(trace),
            "seconds_per_token": seconds,
            "busy": round(sum(spent.values()) / 1e6 / seconds, 3),
            "device_events_per_token": len(events) / tokens,
            "graphs_per_token": calls["cudaGraphLaunch"] / tokens,
            "microseconds_per_token": dict(spent.most_common(12)),
        }
    return found


@step
def beside(dry: bool) -> Found:
    """A chat and a run at the same time, in two processes on one device."""
    program = [sys.executable, "-m", "scripts.gpu.on_twin", "slotmoe"] if dry else SLOTMOE
    budget = ["--device", "cuda", "--vram", "1GiB", "-n", "4" if dry else "16"]
    ways = {
        "chat": ([*program, "chat", "sample", *budget], "Good morning.\n"),
        "run": ([*program, "run", "sample", PROMPT, *budget], ""),
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


if __name__ == "__main__":
    print(json.dumps(STEPS[sys.argv[1]](**json.loads(sys.argv[2]))))
