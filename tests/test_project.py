"""The shape of the project itself: who imports whom, how long files are, and what is public."""

import ast
import functools
import graphlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from zipfile import ZipFile

import pytest

import slotmoe
from slotmoe.offload.runtime import Runtime

ROOT = Path(__file__).parent.parent
FOLDERS = ("model", "quant", "offload", "tools")
FORBIDDEN = {
    "model": ("slotmoe.quant", "slotmoe.offload", "slotmoe.tools"),
    "quant": ("slotmoe.model", "slotmoe.offload", "slotmoe.tools"),
    "offload": ("slotmoe.tools",),
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60
MAX_RUNTIME_METHODS = 20
EXTRAS = {
    "serve": ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client", "llguidance"),
    "chat": ("prompt_toolkit",),
    "plots": ("matplotlib",),
    "gguf": ("gguf",),
}
LIGHT = ["slotmoe", "slotmoe.model.config", "slotmoe.model.names", "slotmoe.quant.shapes"]
LIGHT += ["slotmoe.offload.machine"]
LIGHT += ["slotmoe.offload.study.replay", "slotmoe.offload.ingest.hub_id"]


def module_name(path):
    """``model/config.py`` is ``slotmoe.model.config``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "slotmoe" else ("slotmoe", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# The links in slotmoe/ lead to the same files.
FILES = [*(ROOT / "slotmoe").glob("*.py")]
FILES += [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
MODULES = {module_name(path): path for path in FILES}
PRODUCT = [path for path in FILES if ROOT / "tools" / "bench" not in path.parents]


@functools.cache
def imported(path):
    """Every module that a file's import statements name, wherever they stand; of ``from package
    import name`` the module ``package.name`` where there is one."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
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


def python(code, *arguments, **options):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_packages_import_only_what_they_may():
    wrong = []
    for path in FILES:
        folder = path.relative_to(ROOT).parts[0]
        forbidden = FORBIDDEN.get(folder, ())
        if folder == "slotmoe" and path.name != "__main__.py":
            forbidden = ("slotmoe.tools",)
        wrong += [f"{path}: {name}" for name in imported(path) if within(name, forbidden)]
    assert not wrong, "\n".join(wrong)


def test_no_import_circles():
    """Imports under ``TYPE_CHECKING`` and inside functions count as well."""
    graph = {name: imported(path) & set(MODULES) - {name} for name, path in MODULES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imported by ".join(error.args[1]))


def test_modules_are_not_imported_by_their_folders_names():
    files = [*FILES, *(ROOT / "tests").rglob("*.py")]
    wrong = [
        f"{path}: {name}" for path in files for name in imported(path) if within(name, FOLDERS)
    ]
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_are_short():
    long = []
    for path in PRODUCT:
        text = path.read_text()
        if (lines := text.count("\n")) > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(
                        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines"
                    )
    assert not long, "\n".join(long)


@pytest.mark.usefixtures("processes")
def test_light_modules_import_nothing_heavy():
    """So that help and ``slotmoe plan`` answer at once, and policies need no torch."""
    folders = ("offload/plan", "offload/policy", "tools")
    names = [
        *LIGHT,
        *(module_name(path) for name in folders for path in (ROOT / name).glob("*.py")),
    ]
    names += [f"slotmoe.tools.{name}" for name in ("chat", "chat.conversation", "profile", "serve")]
    heavy = ["torch", *(module for modules in EXTRAS.values() for module in modules)]
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    for heavy in {heavy}:
        assert heavy not in sys.modules, f"{{name}} imports {{heavy}}"
"""
    done = python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("processes")
def test_core_needs_no_extra():
    """Without any extra every module imports but those that the extras are for, and the command of
    one is refused with what installs it."""
    missing = [module for modules in EXTRAS.values() for module in modules]
    optional = {
        module_name(path)
        for path in FILES
        if {name.split(".")[0] for name in imported(path)} & set(missing) and "tools" in path.parts
    }
    names = [name for name, path in MODULES.items() if path in PRODUCT and name not in optional]
    names = [
        name for name in names if not within(name, ("slotmoe.tools.serve", "slotmoe.__main__"))
    ]
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({missing}))
for name in {names}:
    if "triton" not in name:
        importlib.import_module(name)
from slotmoe.tools.cli import main
main(["serve", "sample"])
"""
    done = python(code, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "pip install 'slotmoe[serve]'" in done.stderr


def test_dependencies_are_declared():
    """What the packages import is a dependency or belongs to an extra of ``EXTRAS``."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def declared(requirements):
        return {requirement.partition(">")[0] for requirement in requirements}

    assert {name: declared(extras[name]) for name in EXTRAS} == {
        name: set(modules) for name, modules in EXTRAS.items()
    }
    known = declared(project["dependencies"]).union(*EXTRAS.values(), {"slotmoe", "triton"})
    third_party = {name.partition(".")[0] for path in PRODUCT for name in imported(path)}
    assert third_party - set(sys.stdlib_module_names) <= known
    assert known - {"slotmoe", "triton"} <= third_party


def test_public_names():
    assert slotmoe.__all__ == [
        "CheckpointError",
        "ConfigError",
        "DeviceError",
        "DownloadError",
        "Export",
        "ExportError",
        "PlanError",
        "Runtime",
        "SlotmoeError",
        "Token",
        "__version__",
    ]
    assert set(slotmoe.__all__) <= set(dir(slotmoe))
    assert slotmoe.Runtime is Runtime
    assert slotmoe.Token.__name__ == "Token"
    assert callable(slotmoe.Export.open)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = slotmoe.Nothing


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
    public = [name for name, _ in inspect.getmembers(Runtime, inspect.isroutine) if name[0] != "_"]
    assert len(public) <= MAX_RUNTIME_METHODS, public


@pytest.mark.usefixtures("processes")
def test_version_is_one():
    assert f'version = "{slotmoe.__version__}"' in (ROOT / "pyproject.toml").read_text()
    done = subprocess.run(
        [sys.executable, "-m", "slotmoe", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == f"slotmoe, version {slotmoe.__version__}\n"


def test_conftest_is_imported_once():
    """pytest knows it by another name: an import would make a second hub, at another address."""
    for path in (ROOT / "tests").rglob("*.py"):
        assert "tests.conftest" not in imported(path), path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the project, without a C++ compiler: kernels are optional."""
    try:
        major = int(version("setuptools").partition(".")[0])
    except PackageNotFoundError:
        major = 0
    if major < 77:
        pytest.skip("setuptools >= 77 is not installed, and a build must not download it")
    project = tmp_path_factory.mktemp("project")
    for folder in (*FOLDERS, "slotmoe"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        shutil.copytree(ROOT / folder, project / folder, symlinks=True, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, project)
    wheels = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--disable-pip-version-check", "--wheel-dir", wheels, project]
    without_compiler = {"CC": "no-compiler", "CXX": "no-compiler", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | without_compiler
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = wheels.iterdir()
    return path


@pytest.mark.usefixtures("processes")
def test_wheel_installs_one_name(wheel):
    names = ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {
        "slotmoe",
        f"slotmoe-{slotmoe.__version__}.dist-info",
    }
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    assert "-cp310-abi3-" in wheel.name  # one for every Python
    sources = {module_name(path): path for path in FILES}
    modules = {name for name in names if name.endswith(".py")}
    assert len(modules) == len(sources)
    wanted = ["py.typed", "tools/profile/report.html", "tools/serve/page.html"]
    wanted += ["offload/plan/divergence.json"]
    for folder in ("sample", "geometries"):
        wanted += [f"model/{folder}/{path.name}" for path in (ROOT / "model" / folder).iterdir()]
    assert {f"slotmoe/{name}" for name in wanted} <= set(names)


@pytest.mark.usefixtures("processes")
def test_wheel_works_beside_a_users_modules(wheel, tmp_path):
    site, user = tmp_path / "site", tmp_path / "user"
    ZipFile(wheel).extractall(site)  # a wheel of Python alone: installing it does no more
    for folder in FOLDERS:
        (user / folder).mkdir(parents=True)
        (user / folder / "__init__.py").write_text("raise ImportError('the user\\'s own')")
    (user / "model.py").write_text("raise ImportError('the user\\'s own')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (user, site)))}
    code = "import slotmoe; slotmoe.Runtime; print(slotmoe.__file__)"
    done = python(code, cwd=user, env=environment)
    assert done.stdout == f"{site / 'slotmoe' / '__init__.py'}\n", done.stderr
    for command in (["-m", "slotmoe", "--help"], ["-m", "slotmoe", "plan", "v2-lite", "--json"]):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=user, env=environment
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("nightly")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_kernels_are_the_same_bytes_wherever_they_are_built(tmp_path):
    built = []
    for place in (tmp_path / "a", tmp_path / "another place" / "deeper"):
        shutil.copytree(ROOT / "quant", place / "quant", ignore=shutil.ignore_patterns("*.so"))
        for folder in ("model", "offload", "tools"):
            (place / folder).mkdir()
        shutil.copy(ROOT / "setup.py", place)
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=place, check=True, capture_output=True)
        (library,) = place.glob("quant/kernels/cpu/_native*.so")
        built.append(library.read_bytes())
    assert built[0] == built[1]


def test_dependencies_are_locked_and_listed_with_their_licences():
    """``scripts/lock.py`` and ``scripts/notices.py`` make the lists."""

    def names(pattern, text):
        return {name.replace("_", "-").lower() for name in re.findall(pattern, text, re.MULTILINE)}

    project = (ROOT / "pyproject.toml").read_text()
    locked = names(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text())
    assert names(r'^  "([\w.-]+)>=', project) - locked == {"torch", "triton"}
    listed = names(r"^\| ([\w.-]+) \| .+ \|$", (ROOT / "THIRD_PARTY.md").read_text())
    assert names(r'^  "([\w.-]+)>=', project.partition("dev = [")[0]) <= listed
