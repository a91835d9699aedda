"""What tests and campaigns share: their tiers, exports of the sample and of the least model, the
command line in this process, and a hub on loopback.  Heavy libraries are imported where they are
used: the process that only hands tests to others needs none.

A test's tier follows from the fixtures that it requests, also through others.  Those of ``KINDS``
say what it does beside computing for a moment in this process, and leave it out of
``./check --fast``; ``nightly`` leaves it out of ``./check`` too."""

import gc
import os
import signal
from importlib.util import find_spec
from tempfile import TemporaryDirectory

# OpenMP reads it when torch is imported.  Threads of torch that spin while they wait take the cores
# from the other test process: with two processes on two cores a run took ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

KINDS = {
    "processes": "It starts processes.",
    "network": "It listens on loopback.",
    "interpreter": "It runs Triton's interpreter.",
    "oracle": "It runs transformers.",
    "twin": "It simulates a GPU.",
    "heavy": "It computes for half a second or more.",
    "nightly": "It takes too long for each change.",
}
# A shell starts what runs in the background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Nothing that a test does may depend on the user's own folders, or leave anything there.
CACHE = TemporaryDirectory()
os.environ["SLOTMOE_CACHE"] = os.environ["XDG_CONFIG_HOME"] = CACHE.name
for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)


def kind(name):
    @pytest.fixture(scope="session", name=name)
    def fixture():
        if name == "interpreter" and find_spec("triton") and "TRITON_INTERPRET" in os.environ:
            from tests.support.interpreter import keep_inside, quicken, shuffle

            quicken()
            shuffle(0)
            keep_inside()

    fixture.__doc__ = KINDS[name]
    return fixture


globals().update({name: kind(name) for name in KINDS})


def pytest_collectstart():
    """What decides for a process when it is imported: the hub's address, and whether Triton
    compiles for a GPU or interprets on the CPU."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    import tests.support.hub  # noqa: F401


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items):
    for item in items:
        assert " at 0x" not in item.name, f"{item.nodeid}: other workers give it another name"
        if not KINDS.keys().isdisjoint(item.fixturenames):
            item.add_marker("full")
        if "nightly" in item.fixturenames:
            item.add_marker("slow")


def pytest_collection_finish():
    """A child process checks the sample's tokenizer once, before any test: a verdict is kept."""
    from slotmoe.offload.model_source import read_model
    from tests.support.tiny import SAMPLE

    read_model(SAMPLE)


@pytest.fixture(scope="session", autouse=True)
def alone_on_the_machine():
    """No machine loses its power here, and a busy disk takes its time.  Threads that wait for each
    other would wait for cores that other test processes have: torch, kernels and engines that are
    asked for no number have one.  What is imported by now stays: no collection of garbage looks
    at it."""
    import torch

    from slotmoe.offload.engine import loading
    from slotmoe.quant.kernels.cpu import bindings

    gc.collect()
    gc.freeze()
    torch.set_num_threads(1)
    if (kernels := bindings.load()) is not None:
        kernels.set_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        chosen = loading.choose_placement
        patch.setattr(loading, "choose_placement", lambda size, threads: chosen(size, threads or 1))
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda handle: None)
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def sample_export():
    """The bundled sample, quantized with the default settings; not to be changed."""
    from tests.support.exports import made_once

    with made_once("sample") as export:
        yield export


@pytest.fixture(scope="session")
def small_export():
    """The least model, for what takes long; not to be changed."""
    from tests.support.exports import made_once
    from tests.support.tiny import SMALL

    with made_once("small", **SMALL) as export:
        yield export


@pytest.fixture
def slotmoe(capsys):
    """Run a command line: its exit code, stdout and stderr."""
    from slotmoe.tools.cli import main

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return caught.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def hub(network, tmp_path, monkeypatch):
    """The hub on loopback, empty, and an empty cache of huggingface_hub's."""
    from huggingface_hub import constants

    from tests.support.hub import HUB, hurried

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    hurried(monkeypatch)
    HUB.reset()
    yield HUB
    HUB.reset()
