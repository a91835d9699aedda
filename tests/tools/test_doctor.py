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
    first, rest = "system processor kernels compiler GPU Vulkan RAM pages", "serve chat plots gguf"
    assert " ".join(checks) == f"{first} {rest} cache disk"
    assert (code == 0) == all(check["state"] != "bad" for check in checks.values())
    assert metadata.version("torch") in checks["GPU"]["found"]
    assert len(slotmoe("doctor")[1].splitlines()) < 24  # a screen


def test_missing_kernels(report, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.machine.quant, "__file__", str(tmp_path / "__init__.py"))
    code, checks = report()
    assert (code, checks["kernels"]["state"]) == (1, "bad")
    assert "up to 200 times slower" in checks["kernels"]["found"]
    assert checks["kernels"]["advice"].startswith("install slotmoe again")


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
