"""A GPU's first hour, on a rented or borrowed machine: six runs of at most ten minutes each, as
docs/gpu.md has them.  Each run makes what it needs and writes one JSON.

    python scripts/gpu_first_hour.py --run 3 --out run3.json
    python scripts/gpu_first_hour.py --run all --dry        without a GPU: on the tests' twin

Each command is a process of its own with a limit of its own, so that nothing ends the run.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-q", "-W", "ignore"]
KERNELS = [f"tests/quant/test_{name}.py" for name in ("triton", "ops")]
STEPS_OF = "tests/offload/test_gpu_steps.py"
RUN_SECONDS = 570  # of the ten minutes; the rest is for what ends it
TAIL = 1500
WORK_BYTES = 10 << 30  # exports and caches; a container's /dev/shm may be far smaller
NATIVE = ROOT / "quant" / "kernels" / "cpu"


@dataclass(frozen=True)
class Scale:
    """What is measured: on a GPU models of billions, in a dry run the sample."""

    lite: str = "v2-lite"
    wide: str = "v2"
    wide_layers: int = 8
    wide_to: int = 60
    part: int = 8  # layers of V2-Lite, 2.7 GB, of which 0.9 suffice
    half: int = 832  # of V2-Lite's 1,664 experts
    few: int = 134  # 12% of the experts of seven of V2's layers
    vram: str = "12GiB"
    depths: tuple[int, ...] = (8192, 65536)
    prompts: tuple[int, ...] = (512, 4096)
    decode: int = 32
    clients: str = "1,2,4,8"
    answer: int = 64


DRY = Scale("sample", "sample", 3, 8, 2, 112, 12, "1GiB", (24, 48), (8, 16), 3, "1,2", 4)


@dataclass(frozen=True)
class Step:
    """``commands`` run one after the other, within ``limit`` seconds for all of them; without a GPU
    those in ``dry``, or the step is left out."""

    name: str
    limit: float
    commands: list[list[str]]
    dry: list[list[str]] = field(default_factory=list)


def itself(name: str, dry: bool, **arguments: Any) -> list[str]:
    """A step of ``scripts/gpu/steps.py``."""
    return [PYTHON, "-m", "scripts.gpu.steps", name, json.dumps({"dry": dry, **arguments})]


def both(name: str, limit: float, **arguments: Any) -> Step:
    """The same step on a GPU and on its twin."""
    commands = ([itself(name, dry, **arguments)] for dry in (False, True))
    return Step(name, limit, *commands)


def bench(dry: bool, *arguments: str) -> list[str]:
    module = ["scripts.gpu.on_twin", "bench"] if dry else ["bench"]
    return [PYTHON, "-m", *module, *arguments]


def set_up(limit: float, site: Path, wheels: Path | None) -> Step:
    """Carried wheels, and the native kernels, where a run before has not left them."""
    commands = []
    if wheels is not None and not site.is_dir():
        files = sorted(map(str, wheels.glob("*.whl")))
        how = "--quiet --no-index --no-deps --no-compile --no-cache-dir --target".split()
        commands.append([PYTHON, "-m", "pip", "install", *how, str(site), *files])
    if not any(NATIVE.glob("_native*")):
        commands.append([PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"])
    check = [PYTHON, "-c", "import slotmoe.offload.runtime, slotmoe.tools.cli"]
    return Step("set-up", limit, [*commands, check], [*commands, check])


def of_kernels(site: Path, wheels: Path | None) -> dict[int, list[Step]]:
    """Those that need no model: tests of kernels and devices, and the kernels' speed."""
    gpu = [PYTHON, "-m", "bench", "gpu", "--repetitions", "3"]
    return {
        1: [
            set_up(120, site, wheels),
            both("facts", 30),
            Step("kernel-tests", 180, [[*PYTEST, "-n", "12", *KERNELS, "-k", "not compile"]],
                 [[*PYTEST, "-n", "0", KERNELS[0], "-k", "weighted_sum"]]),
            Step("step-tests", 150, [[*PYTEST, "-n", "6", STEPS_OF]] * 3,
                 [[*PYTEST, "-n", "0", STEPS_OF, "-k", "captured_steps"]]),
            Step("gpu-tests", 80, [[*PYTEST, "-n", "0", "-m", "gpu",
                                    "tests/offload/test_on_gpu.py"]]),
        ],
        3: [
            set_up(100, site, wheels),
            Step("kernels", 150, [gpu]),
            Step("without-hint", 150, [[*gpu, "--no-hint"]]),
            Step("variants", 160, [[*gpu, "--variant", name] for name in ("8x4", "16x4")]),
        ],
    }  # fmt: skip


def runs(work: Path, out: Path, s: Scale, dry: bool, wheels: Path | None) -> dict[int, list[Step]]:
    """The six of them, with exports in ``work`` and traces beside ``out``."""
    lite, wide = str(work / f"{s.lite}-all"), str(work / f"{s.wide}-{s.wide_layers}")
    part = str(work / f"{s.lite}-{s.part}")
    site, first = work / "site", {"decode_tokens": s.decode}
    make_lite = both("export", 60, geometry=s.lite, path=lite, layers=0, resident="int8")
    make_wide = both("export", 80, geometry=s.wide, path=wide, layers=s.wide_layers, resident="nf4")
    plain = [first | {"prompt_tokens": s.prompts[0], "depth": 0}]
    deep = [first | {"prompt_tokens": 8, "depth": depth} for depth in s.depths]
    wider = [first | {"prompt_tokens": prompt, "depth": 0} for prompt in s.prompts]
    on_lite: dict[str, Any] = {"path": lite, "layers": 0, "vram": s.vram}
    on_half = on_lite | {"cases": plain, "slots": s.half, "misses": "fetch"}
    on_wide: dict[str, Any] = {"path": wide, "layers": s.wide_to, "cases": wider}
    on_wide |= {"slots": s.few, "vram": s.vram, "ram": "2GiB" if dry else "24GiB"}

    def speeds(name: str, limit: float, *ways: dict[str, Any]) -> Step:
        commands = ([itself("speed", dry, **way) for way in ways] for dry in (False, True))
        return Step(name, limit, *commands)

    def served(name: str, limit: float, *more: str) -> Step:
        clients = ["--clients", s.clients, "--tokens", str(s.answer), "--repetitions", "2"]
        given = ["serve", lite, "--device", "cuda", "--vram", s.vram, *clients, "--no-cost", *more]
        long = ["--long", "16"] if dry else []
        return Step(name, limit, [bench(False, *given)], [bench(True, *given, *long)])

    traces = str(out.resolve().parent)
    others = {
        2: [
            set_up(90, site, wheels),
            both("sanitizer", 280, probe=40, tests=110),
            both("open-close", 40),
            both("one-text", 50),
            both("export", 40, geometry=s.lite, path=part, layers=s.part, resident="int8"),
            both("taken", 70, path=part),
        ],
        4: [
            set_up(100, site, wheels), make_lite,
            speeds("lite", 130, on_lite | {"cases": [*plain, *deep]}),
            speeds("half", 130, on_half, on_half | {"prefetch": False}),
            both("timeline", 90, path=lite, slots=s.half, traces=traces, vram=s.vram),
        ],
        5: [
            set_up(100, site, wheels), make_wide,
            speeds("v2", 380, *(on_wide | {"misses": way} for way in ("fetch", "cpu", "hybrid"))),
        ],
        6: [
            set_up(100, site, wheels), make_lite,
            served("serve", 190),
            served("serve-half", 160, "--slots", str(s.half)),
            both("beside", 50),
        ],
    }  # fmt: skip
    return dict(sorted({**of_kernels(site, wheels), **others}.items()))


def run(command: list[str], limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """A command: its exit code, seconds, its last line where that is JSON, else its last words."""
    started, pipe = time.perf_counter(), subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, errors="replace",
            cwd=ROOT, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=limit)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers, too
            code, err = 124, f"ended after its {limit:.0f} s"
            out = process.communicate()[0]
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


def run_step(step: Step, dry: bool, left: float, environment: dict[str, str]) -> dict[str, Any]:
    commands = step.dry if dry else step.commands
    report: dict[str, Any] = {"step": step.name, "limit": step.limit}
    if not commands or left < 5:
        return report | {"state": "skipped", "why": "needs a GPU" if not commands else "no time"}
    until, done = time.perf_counter() + min(step.limit, left), list[dict[str, Any]]()
    for command in commands:
        done.append(run(command, max(1.0, until - time.perf_counter()), environment))
        if done[-1]["code"]:
            break
    found = [one["found"] for one in done if isinstance(one.get("found"), dict)]
    good = not any(one["code"] for one in done) and all(one.get("ok", True) for one in found)
    state = "ok" if good else "failed"
    if why := next((one["skipped"] for one in found if "skipped" in one), None):
        return report | {"state": "skipped", "why": why, "runs": done}
    return report | {"state": state, "runs": done}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", required=True, choices=[*"123456", "all"], help="which of the six")
    parser.add_argument("--out", type=Path, help="the JSON [run-N.json]")
    parser.add_argument("--only", default="", help="names of steps, separated by commas")
    parser.add_argument("--work", type=Path, help="exports and caches, kept for the next run")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install from")
    parser.add_argument("--dry", action="store_true", help="on the twin, what can be run there")
    given = parser.parse_args()
    out = given.out or Path(f"run-{given.run}.json")
    shared, place = Path("/dev/shm"), Path(tempfile.gettempdir())
    if shared.is_dir() and shutil.disk_usage(shared).free > WORK_BYTES:
        place = shared
    work = (given.work or place / "slotmoe-first-hour").resolve()
    work.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(work / "site"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "SLOTMOE_CACHE": str(work / "cache")}
    environment |= {"TRITON_CACHE_DIR": str(work / "triton"), "XDG_CONFIG_HOME": str(work)}
    scale, reports = DRY if given.dry else Scale(), list[dict[str, Any]]()
    for number, steps in runs(work, out, scale, given.dry, given.wheels).items():
        if given.run not in ("all", str(number)):
            continue
        until = time.perf_counter() + RUN_SECONDS
        for step in steps:
            if given.only and step.name not in ("set-up", "export", *given.only.split(",")):
                continue
            left = until - time.perf_counter()
            report = run_step(step, given.dry, left, environment)
            reports.append({"run": number, **report})
            print(f"run {number}, {step.name}: {report['state']}", file=sys.stderr, flush=True)
            out.write_text(json.dumps({"dry": given.dry, "steps": reports}, indent=1))
    return int(any(report["state"] == "failed" for report in reports))


if __name__ == "__main__":
    raise SystemExit(main())
