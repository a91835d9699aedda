"""``slotmoe doctor``: what it finds on this machine and on others, within one screen."""

import json
from importlib import metadata

import pytest

from slotmoe.tools import doctor

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture
def report(slotmoe):
    """Exit code, and the checks by name."""

    def run(*arguments):
        code, out, _ = slotmoe("doctor", "--json", *arguments)
        report = json.loads(out)
        assert report["ok"] == (code == 0)
        return code, {check["name"]: check for check in report["checks"]}

    return run


def test_this_machine(report, slotmoe, monkeypatch):
    code, checks = report()
    assert list(checks) == (
        "system processor kernels compiler GPU RAM pages serve chat plots gguf cache disk".split()
    )
    assert (code == 0) == all(check["state"] != "bad" for check in checks.values())
    assert metadata.version("torch") in checks["GPU"]["found"]
    assert len(slotmoe("doctor")[1].splitlines()) < 24  # a screen


def test_missing_kernels(report, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.machine.quant, "__file__", str(tmp_path / "__init__.py"))
    code, checks = report()
    assert (code, checks["kernels"]["state"]) == (1, "bad")
    assert "up to 200 times slower" in checks["kernels"]["found"]
    assert checks["kernels"]["advice"].startswith("install slotmoe again")


def test_a_gpu_needs_a_cuda_build_of_torch(report, monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 4090, 24564, 570.86'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for torch, state in (("2.13.0+cpu", "bad"), ("2.13.0+cu130", "ok")):
        there = {"torch": torch}
        monkeypatch.setattr(metadata, "version", lambda name, there=there: there.get(name, "1"))
        code, checks = report()
        assert (code == 1, checks["GPU"]["state"]) == (state == "bad", state)
    found = checks["GPU"]["found"]
    assert found.startswith("NVIDIA GeForce RTX 4090, 24.0 GiB, driver 570.86; ")


def test_cache_and_disk(report, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path / "file" / "folder"))
    code, checks = report()
    assert (code, checks["cache"]["state"]) == (1, "bad")
    assert checks["cache"]["found"].endswith(f"{tmp_path / 'file'} is no folder")
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("SLOTMOE_CACHE", str(cache / "not" / "yet"))
    assert "slotmoe bench measures its speed" in report()[1]["disk"]["found"]
    assert list(cache.iterdir()) == []
