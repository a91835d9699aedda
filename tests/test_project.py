"""The shape of the project itself: who imports whom, and what is public."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from slotmoe.offload.runtime import Runtime

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "model": {"quant", "offload", "tools"},
    "quant": {"model", "offload", "tools"},
    "offload": {"tools"},
}


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_only_what_they_may(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not FORBIDDEN[package] & set(imported_packages(path)), path


LIGHT = "slotmoe.offload.plan.memory slotmoe.offload.plan.speed slotmoe.offload.machine slotmoe.offload.policy.cache slotmoe.offload.policy.prefetch slotmoe.offload.observe.profiler slotmoe.offload.study.replay slotmoe.offload.ingest.hub_id".split()
LIGHT += "slotmoe.model.config slotmoe.model.names slotmoe.quant.shapes slotmoe.tools.cli slotmoe.tools.run slotmoe.tools.chat slotmoe.tools.serve slotmoe.tools.quantize slotmoe.tools.verify".split()
LIGHT += "slotmoe.tools.plan slotmoe.tools.profile slotmoe.tools.replay slotmoe.offload.policy.hybrid".split()


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_without_torch(module):
    code = f"import {module}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "module", ["slotmoe.offload.ingest.hub", "slotmoe.offload.runtime", "slotmoe.tools.quantize"]
)
def test_hub_library_is_imported_only_for_a_hub_id(module):
    code = f"import {module}, sys; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_prompt_library_is_imported_only_on_a_terminal():
    code = "import slotmoe.tools.chat, slotmoe.tools.chat.conversation, sys; assert 'prompt_toolkit' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_contract_of_the_runtime():
    parameters = inspect.signature(Runtime.open).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [
        "path",
        "device",
        "vram",
        "ram",
        "context",
        "threads",
        "cache_policy",
        "prefetch",
        "quantize",
    ]
    assert list(inspect.signature(Runtime.generate).parameters)[1:4] == [
        "prompt",
        "max_new_tokens",
        "temperature",
    ]


def test_version_is_one():
    from slotmoe import __version__

    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_conftest_is_imported_once():
    """pytest knows it by another name: an import would make a second hub, at another address."""
    for path in (ROOT / "tests").glob("*.py"):
        modules = [
            node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        ]
        assert "tests.conftest" not in modules, path
