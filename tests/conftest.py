"""Fixtures that several files share: the bundled sample as a checkpoint and as an export, and a hub
on loopback."""

import os
from importlib.util import find_spec

# OpenMP reads it when torch is imported.  Threads of torch that spin while they wait take the cores
# from the other test process: with two processes on two cores a run took ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from slotmoe.offload.ingest.quantize import quantize
from tests.support.hub import HOME, HUB, TOKEN
from tests.support.interpreter import quicken
from tests.support.tiny import SAMPLE

# huggingface_hub reads these when it is imported, which any test may be the first to do.
os.environ |= {
    "HF_ENDPOINT": HUB.endpoint,
    "HF_HOME": HOME.name,
    "HF_TOKEN": TOKEN,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "NO_PROXY": "127.0.0.1",
}
# Triton decides when it is imported whether it compiles for a GPU or interprets on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """Nothing a test does may depend on, or leave anything in, the user's own cache folder."""
    os.environ["SLOTMOE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """No machine loses its power here, and a busy disk takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Where Triton interprets kernels: a third of its time is nothing but looking up names."""
    if "TRITON_INTERPRET" in os.environ and find_spec("triton"):
        quicken()


@pytest.fixture(scope="session")
def sample_export(tmp_path_factory):
    """The bundled sample, quantized with the default settings."""
    destination = tmp_path_factory.mktemp("sample") / "export"
    quantize(SAMPLE, destination)
    return destination


@pytest.fixture
def slotmoe(capsys):
    """Run a command line: its exit code, stdout and stderr."""
    from slotmoe.tools.cli import main

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return run


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub on loopback, empty, and an empty cache of huggingface_hub's."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    HUB.reset()
    yield HUB
    HUB.reset()
