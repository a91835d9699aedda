"""The shape of the project itself: who imports whom, how long files are, and what is public."""

import ast
import functools
import graphlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import slotmoe
from slotmoe.offload.runtime import Runtime

ROOT = Path(__file__).parent.parent
FOLDERS = ("model", "quant", "offload", "tools")
FORBIDDEN = {
    "model": ("slotmoe.offload", "slotmoe.tools"),
    "quant": ("slotmoe.model", "slotmoe.offload", "slotmoe.tools"),
    "offload": ("slotmoe.tools",),
    "slotmoe": tuple(f"slotmoe.{folder}" for folder in FOLDERS),
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60
MAX_RUNTIME_METHODS = 20
EXTRAS = {
    "serve": ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client", "llguidance"),
    "chat": ("prompt_toolkit",),
    "plots": ("matplotlib",),
    "gguf": ("gguf",),
}
LIGHT = ["slotmoe", "slotmoe.model.config", "slotmoe.model.names", "slotmoe.quant.shapes"]
LIGHT += ["slotmoe.network.shapes"]
LIGHT += ["slotmoe.offload.machine"]
LIGHT_TOOLS = ("chat", "profile", "serve")
LIGHT += ["slotmoe.offload.model_cache"]


def module_name(path):
    """``model/config.py`` is ``slotmoe.model.config``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "slotmoe" else ("slotmoe", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# The links in slotmoe/ lead to the same files.
GROUND_FLOOR = [ROOT / "slotmoe", ROOT / "slotmoe" / "network", ROOT / "slotmoe" / "system"]
PUBLIC_FACE = ("slotmoe/__init__.py", "slotmoe/__main__.py")  # the package, and its command
FILES = [path for folder in GROUND_FLOOR for path in sorted(folder.glob("*.py"))]
FILES += [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
MODULES = {module_name(path): path for path in FILES}
TESTS = [path for folder in ("tests", "campaigns") for path in (ROOT / folder).rglob("*.py")]


@functools.cache
def nodes(path):
    return [*ast.walk(ast.parse(path.read_text()))]


@functools.cache
def imported(path):
    """Every module that a file's import statements name, wherever they stand; of ``from package
    import name`` the module ``package.name`` where there is one."""
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in MODULES else node.module)
    return names


def within(name, packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_packages_import_only_what_they_may(heavy):
    wrong = []
    for path in FILES:
        assert path.resolve() == path, f"{path} is a link: its imports would count as another's"
        name = path.relative_to(ROOT).as_posix()
        forbidden = () if name in PUBLIC_FACE else FORBIDDEN.get(name.partition("/")[0], ())
        upward = sorted(module for module in imported(path) if within(module, forbidden))
        wrong += [f"{name}: {module}" for module in upward]
    assert not wrong, "\n".join(wrong)


def test_one_package_knows_what_systems_do(heavy):
    """No other module imports what only some have, or reads Linux's own folder."""
    names = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "msvcrt", "winreg"}
    for path in FILES:
        if path.parent.name != "system":
            assert not imported(path) & names, path
            assert "/proc" not in path.read_text(), path
            # Text is UTF-8 whatever the system's encoding is.
            unsaid = r"(\.(read|write)_text\(|\bopen\(.*\"[rwax]\+?\")(?!.*(encoding=|\"utf-8\"))"
            assert not re.search(unsaid, path.read_text()), path


def test_no_import_circles(heavy):
    """Imports under ``TYPE_CHECKING`` and inside functions count as well."""
    graph = {name: imported(path) & set(MODULES) - {name} for name, path in MODULES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imported by ".join(error.args[1]))


def test_modules_are_not_imported_by_their_folders_names():
    """Nor conftest at all: pytest knows it by another name, and would make a second hub."""
    wrong = re.compile(rf"(?m)^\s*(from|import) ({'|'.join(FOLDERS)}|[\w.]*\bconftest)\b(?!\.py)")
    assert not [str(path) for path in [*FILES, *TESTS] if wrong.search(path.read_text())]


def test_files_and_functions_are_short(heavy):
    long = []
    for path in FILES:
        if (lines := path.read_text().count("\n")) > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}: {node.name}: {lines} lines")
    assert not long, "\n".join(long)


@pytest.mark.usefixtures("processes")
def test_light_modules_import_nothing_heavy_and_the_core_needs_no_extra():
    """So that help and ``slotmoe plan`` answer at once, and policies need no torch.  Without any
    extra every module imports but those that the extras are for, and the command of one is refused
    with what installs it."""
    extras = [module for modules in EXTRAS.values() for module in modules]
    light = [*LIGHT, *(f"slotmoe.tools.{name}" for name in LIGHT_TOOLS)]
    for folder in ("offload/plan", "offload/policy", "tools"):
        light += [module_name(path) for path in (ROOT / folder).glob("*.py")]
    optional = {
        module_name(path)
        for path in FILES
        if {name.split(".")[0] for name in imported(path)} & {*extras} and "tools" in path.parts
    }
    kept = [name for name, path in MODULES.items() if "triton" not in name]
    others = ("slotmoe.tools.serve", "slotmoe.__main__", "slotmoe.system.windows", *optional)
    core = [name for name in kept if not within(name, others)]
    code = f"""
import importlib, sys
for name in {light}:
    importlib.import_module(name)
    for heavy in ["torch", *{extras}]:
        assert heavy not in sys.modules, f"{{name}} imports {{heavy}}"
sys.modules.update(dict.fromkeys({extras}))
for name in {core}:
    importlib.import_module(name)
from slotmoe.tools.cli import main
try:
    main(["serve", "sample"])
except SystemExit as stopped:
    assert stopped.code == 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert "pip install 'slotmoe[serve]'" in done.stderr


def test_dependencies_are_declared(heavy):
    """What the packages import is a dependency or belongs to an extra of ``EXTRAS``."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def declared(requirements):
        return {requirement.partition(">")[0] for requirement in requirements}

    for name, modules in EXTRAS.items():
        assert declared(project["optional-dependencies"][name]) == set(modules)
    known = declared(project["dependencies"]).union(*EXTRAS.values(), {"slotmoe", "triton"})
    known.add("typing_extensions")  # for type checkers alone, which bring it
    third_party = {name.partition(".")[0] for path in FILES for name in imported(path)}
    assert third_party - set(sys.stdlib_module_names) <= known
    assert known - {"slotmoe", "triton"} <= third_party


def test_a_release_can_be_made():
    """Its workflow starts scripts that are here, and finds notes of this version."""
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    scripts = {*re.findall(r"scripts/\w+", workflow)}
    assert {"scripts/wheels", "scripts/try_wheel"} == {
        name for name in scripts if os.access(ROOT / name, os.X_OK)
    }
    assert re.findall(r"arch: \[(.*)\]", workflow) == ["x86_64, aarch64, win_amd64"] * 2
    assert (ROOT / "release" / f"{slotmoe.__version__}.md").is_file()


def test_contract_of_the_package():
    errors = "CheckpointError ConfigError DeviceError DownloadError ExportError PlanError"
    names = f"{errors} SlotmoeError Export Runtime Token __version__"
    assert slotmoe.__all__ == sorted(names.split())
    assert slotmoe.Runtime is Runtime
    assert f'version = "{slotmoe.__version__}"' in (ROOT / "pyproject.toml").read_text()
    parameters = inspect.signature(Runtime.open).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    sizes = ["path", "device", "vram", "ram", "context", "threads"]
    assert positional == [*sizes, "cache_policy", "prefetch", "quantize"]
    generate = list(inspect.signature(Runtime.generate).parameters)
    assert generate[1:4] == ["prompt", "max_new_tokens", "temperature"]
    public = [name for name, _ in inspect.getmembers(Runtime, inspect.isroutine) if name[0] != "_"]
    assert len(public) <= MAX_RUNTIME_METHODS, public
