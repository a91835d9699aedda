"""A GPU that is visible and not used: each command says so in one line, why, and what mends it.
There is no GPU: ``nvidia-smi``, torch's answers and the C compiler are faked."""

import io
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import partial

import pytest
import torch

from slotmoe.errors import ConfigError
from slotmoe.offload import machine, runtime
from slotmoe.offload.devices import cuda
from slotmoe.offload.devices.cuda import choose_device, gpu_report

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and used"),
    pytest.mark.skipif(sys.platform != "linux", reason="its programs are scripts"),
]
OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update your"
WAYS = {  # torch's answers, the compiler's script, and what is said
    "driver": (OLD, (), None, "too old .*; pip install .*'torch<2.11', .* fits driver 550.54.14;"),
    "capability": ("", (7, 5), None, "capability is 7.5, slotmoe's kernels need 8.0; the CPU"),
    "newer": ("", (12, 0), None, "has no kernels for compute capability 12.0 .*sm_75, sm_80.; pip"),
    "compiler": ("", (8, 9), "", "Triton finds no C compiler .*; apt install gcc, or set CC"),
    "headers": ("", (8, 9), "true", r"Python's headers .*; apt install python3\.\d+-dev"),
    "failing gcc": ("", (8, 9), "echo an error >&2; exit 1", "fails .an error.; apt install"),
    "no CUDA": (None, (), None, "it was built without that; pip install .*'torch<2.11'"),
}
COMMANDS = {
    "run": ("run", "sample", "Call me"),
    "chat": ("chat", "sample"),
    "serve": ("serve", "sample", "--port", "0"),
    "profile": ("profile", "sample"),
    "bench": ("bench", "sample"),
    "doctor": ("doctor",),
    "plan": ("plan", "v2-lite"),
}


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a program on the path, before others."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def write(name, script):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
        return str(tmp_path / name)

    return write


@pytest.fixture
def seen(program):
    return partial(program, "nvidia-smi", "echo 'NVIDIA RTX, 24564, 550.54.14'")


@pytest.fixture
def there(seen, program, monkeypatch, tmp_path):
    """Fakes one of ``WAYS``."""

    def fake(way):
        problem, capability, compiler, told = WAYS[way]
        seen()

        def init():
            if problem:
                raise RuntimeError(problem)

        answers = {"init": init, "get_device_name": "NVIDIA RTX {}".format}
        answers |= {"device_count": lambda: 2, "get_arch_list": lambda: ["sm_75", "sm_80"]}
        answers["get_device_capability"] = lambda index: capability
        monkeypatch.setattr(torch.version, "cuda", None if problem is None else "13.2")
        if problem is not None:
            for name, answer in answers.items():
                monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.delenv("CC", raising=False)
        if compiler == "":
            monkeypatch.setenv("PATH", str(tmp_path))
            (tmp_path / "sh").symlink_to("/bin/sh")
        elif compiler is not None:
            monkeypatch.setenv("CC", program("cc", compiler))
        if way == "headers":
            monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": "/nowhere"})
        return told

    return fake


def refuse(*_, **__):
    raise ConfigError("opened")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("way", WAYS)
def test_each_command_says_why(heavy, there, slotmoe, monkeypatch, way, command):
    """Models are not opened; ``doctor`` and ``plan`` ask in this process."""
    told = there(way)
    monkeypatch.setattr(runtime, "open_model", refuse)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(machine, "ask_gpu", lambda index, *kind: gpu_report(index))
    _, out, err = slotmoe(*COMMANDS[command])
    said = " ".join(re.sub(r"\s+->", ";", out + err).split())
    assert said.count("not used: ") == 1 and re.search(f"NVIDIA RTX.* not used: .*{told}", said)


def test_doctor_and_plan_ask_in_a_process_of_their_own(heavy, seen, program, slotmoe, monkeypatch):
    """Torch as it is here; one that crashes is a sentence, and so is memory that nobody tells."""
    seen()
    assert ("use CUDA: " if torch.version.cuda else "built without that") in slotmoe("doctor")[1]
    program("nvidia-smi", "echo 'NVIDIA GB10, [N/A], 580.95'")
    for script, told in (("kill -SEGV $$", "ends with -11"), ("echo a fault >&2; exit 1", "fault")):
        monkeypatch.setattr(sys, "executable", program("python", script))
        for command in (("doctor",), ("plan", "v2-lite")):
            _, out, _ = slotmoe(*command)
            asked = rf"NVIDIA GB10.* not used: torch can't be asked about it \(.*{told}\)"
            assert re.search(asked, " ".join(out.split()))
    assert "memory that its driver does not tell" in slotmoe("doctor")[1]
    found = {"name": "NVIDIA GB10", "reason": "", "free": 100 << 30, "all": ["it"]}
    monkeypatch.setattr(machine, "ask_gpu", lambda index, *kind: found)
    assert "ok  GPU        NVIDIA GB10, memory that" in slotmoe("doctor")[1]
    report = json.loads(slotmoe("plan", "v2-lite", "--json")[1])
    assert (report["gpu"], report["budget"]["vram"]) == ("NVIDIA GB10", 90 << 30)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "not used" not in slotmoe("plan", "v2-lite")[1]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler is here")
@pytest.mark.parametrize(("code", "told"), [(803, "an NVIDIA GPU is not used: "), (100, "")])
def test_a_driver_that_does_not_start_is_a_gpu_that_is_not_used(
    processes, slotmoe, tmp_path, monkeypatch, code, told
):
    """As after its update, until the machine is started again."""
    source, library = tmp_path / "driver.c", tmp_path / "driver.so"
    source.write_text(f"int cuInit(unsigned flags) {{ return {code}; }}")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    monkeypatch.setattr(machine, "CUDA", str(library))
    monkeypatch.setattr(runtime, "open_model", refuse)
    err = slotmoe("run", "sample", "Call me")[2]
    assert told in err and ("is not used" in err) == bool(told)


@pytest.mark.parametrize("name", ["t4", "RTX 2080 Ti", "v100", "gtx-1080"])
def test_plan_refuses_cards_that_no_kernel_serves(slotmoe, name):
    code, _, err = slotmoe("plan", "v2-lite", "--gpu", name)
    assert code == 2 and "kernels need 8.0: run takes the CPU beside it; plan that with" in err


def test_which_gpu_is_taken(there, monkeypatch):
    there("compiler")
    monkeypatch.setattr(cuda, "lacking", lambda capability: ("", ""))
    assert choose_device("cuda", str) == ("0", "as asked")
    assert choose_device("cuda:1", str)[0] == "1"
    assert choose_device("auto", str) == ("0", "NVIDIA RTX 0 is here")
    assert choose_device("cpu", str)[0].tier == "ram"
    known = "is unknown: auto, cpu, cuda.:N. or vulkan.:N.$"
    wrong = dict.fromkeys(("gpu", "cuda:", "cuda:-1"), known)
    wrong["cuda:2"] = "only cuda:0 to cuda:1 .*; or use --device cpu$"
    for name, told in wrong.items():
        with pytest.raises(ConfigError, match=f"^device .*{told}"):
            choose_device(name, str)
    assert cuda._runs("compute_90", (12, 0)) and not cuda._runs("sm_90", (12, 0))
