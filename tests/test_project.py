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
from importlib.metadata import distributions
from pathlib import Path
from zipfile import ZipFile

import pytest

import slotmoe
from scripts.audit import judged, releases
from scripts.notices import needed
from slotmoe.offload.runtime import Runtime

ROOT = Path(__file__).parent.parent
FOLDERS = ("model", "quant", "offload", "tools")
FORBIDDEN = {
    "model": ("slotmoe.offload", "slotmoe.tools"),
    "quant": ("slotmoe.model", "slotmoe.offload", "slotmoe.tools"),
    "offload": ("slotmoe.tools",),
    "slotmoe": ("slotmoe.tools",),
}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_TEST_FILE_LINES = 450, 60, 500
MAX_RUNTIME_METHODS = 20
SETUPTOOLS = next((int(it.version.partition(".")[0]) for it in distributions(name="setuptools")), 0)
EXTRAS = {
    "serve": ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client", "llguidance"),
    "chat": ("prompt_toolkit",),
    "plots": ("matplotlib",),
    "gguf": ("gguf",),
}
LIGHT = ["slotmoe", "slotmoe.model.config", "slotmoe.model.names", "slotmoe.quant.shapes"]
LIGHT += ["slotmoe.offload.machine"]
LIGHT_TOOLS = ("chat", "chat.conversation", "profile", "serve")
LIGHT += ["slotmoe.offload.model_cache"]


def module_name(path):
    """``model/config.py`` is ``slotmoe.model.config``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "slotmoe" else ("slotmoe", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# The links in slotmoe/ lead to the same files.
FILES = [*(ROOT / "slotmoe").glob("*.py"), *(ROOT / "slotmoe" / "system").glob("*.py")]
FILES += [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
MODULES = {module_name(path): path for path in FILES}
TESTS = [path for folder in ("tests", "campaigns") for path in (ROOT / folder).rglob("*.py")]


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


def test_packages_import_only_what_they_may():
    wrong = []
    for path in FILES:
        forbidden = FORBIDDEN.get(path.relative_to(ROOT).parts[0], ())
        if path == ROOT / "slotmoe" / "__main__.py":
            forbidden = ()
        wrong += [f"{path}: {name}" for name in imported(path) if within(name, forbidden)]
    assert not wrong, "\n".join(wrong)


def test_one_package_knows_what_systems_do():
    """No other module imports what only some have, or reads Linux's own folder."""
    names = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "msvcrt", "winreg"}
    for path in FILES:
        if path.parent.name != "system":
            assert not imported(path) & names, path
            assert "/proc" not in path.read_text(), path
            # Text is UTF-8 whatever the system's encoding is.
            unsaid = r"(\.(read|write)_text\(|\bopen\(.*\"[rwax]\+?\")(?!.*(encoding=|\"utf-8\"))"
            assert not re.search(unsaid, path.read_text()), path


def test_no_import_circles():
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


def test_files_and_functions_are_short():
    long = []
    for path in FILES:
        text = path.read_text()
        if (lines := text.count("\n")) > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}: {node.name}: {lines} lines")
    assert not long, "\n".join(long)


def test_test_files_are_short():
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in TESTS}
    assert not {path for path, count in lines.items() if count > MAX_TEST_FILE_LINES}


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


def test_dependencies_are_declared():
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


def test_public_names():
    errors = "CheckpointError ConfigError DeviceError DownloadError ExportError PlanError"
    names = f"{errors} SlotmoeError Export Runtime Token __version__"
    assert slotmoe.__all__ == sorted(names.split())
    assert set(slotmoe.__all__) <= set(dir(slotmoe))
    assert slotmoe.Runtime is Runtime
    assert slotmoe.Token.__name__ == "Token"
    assert callable(slotmoe.Export.open)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = slotmoe.Nothing


def test_contract_of_the_runtime():
    parameters = inspect.signature(Runtime.open).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    sizes = ["path", "device", "vram", "ram", "context", "threads"]
    assert positional == [*sizes, "cache_policy", "prefetch", "quantize"]
    generate = list(inspect.signature(Runtime.generate).parameters)
    assert generate[1:4] == ["prompt", "max_new_tokens", "temperature"]
    public = [name for name, _ in inspect.getmembers(Runtime, inspect.isroutine) if name[0] != "_"]
    assert len(public) <= MAX_RUNTIME_METHODS, public


def test_version_is_one():
    assert f'version = "{slotmoe.__version__}"' in (ROOT / "pyproject.toml").read_text()


def python(code, **options):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copied(source, target):
    """Without the weights, which would be compressed."""
    Path(target).touch() if source.endswith(".safetensors") else shutil.copy(source, target)


@pytest.mark.skipif(SETUPTOOLS < 77, reason="a build must not download setuptools >= 77")
def test_a_wheel_has_one_name_and_works_beside_a_users_modules(processes, tmp_path):
    """Built from a copy of the project, without a C++ compiler: kernels are optional.  Its links
    are files that name their aims, as git makes them where a system has no links."""
    names = "project", "wheels", "site", "user"
    project, wheels, site, user = (tmp_path / name for name in names)
    for folder in (*FOLDERS, "slotmoe"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        options = {"symlinks": True, "ignore": ignored, "copy_function": copied}
        shutil.copytree(ROOT / folder, project / folder, **options)
    for link in filter(Path.is_symlink, [*project.glob("slotmoe/*")]):
        aim = os.readlink(link)
        link.unlink()
        link.write_text(aim)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, project)
    environment = os.environ | {"CC": "no-compiler", "CXX": "no-compiler"}
    build = f"import setuptools.build_meta as b; b.build_wheel({str(wheels)!r})"
    python(build, cwd=project, env=environment | {"PYTHONWARNINGS": "ignore"})
    (wheel,) = wheels.iterdir()
    assert "-cp310-abi3-" in wheel.name  # one for every Python
    names = ZipFile(wheel).namelist()
    about = f"slotmoe-{slotmoe.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"slotmoe", about}
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
    assert len({name for name in names if name.endswith(".py")}) == len(FILES)
    wanted = ["py.typed", "tools/profile/report.html", "tools/serve/page.html"]
    wanted += ["offload/plan/divergence.json"]
    for folder in ("sample", "geometries"):
        wanted += [f"model/{folder}/{path.name}" for path in (ROOT / "model" / folder).iterdir()]
    assert {f"slotmoe/{name}" for name in wanted} <= set(names)
    ZipFile(wheel).extractall(site)  # a wheel of Python alone: installing it does no more
    stranger = "raise ImportError('the user\\'s own')"
    for folder in FOLDERS:
        (user / folder).mkdir(parents=True)
        (user / folder / "__init__.py").write_text(stranger)
    code = """
import runpy, sys
for command in (["--version"], ["--help"], ["plan", "v2-lite", "--json"]):
    sys.argv[1:] = command
    try:
        runpy.run_module("slotmoe", run_name="__main__")
    except SystemExit as ended:
        assert not ended.code
import slotmoe
slotmoe.Runtime
print(slotmoe.__file__)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (user, site)))}
    printed = python(code, cwd=user, env=environment).splitlines()
    assert printed[0] == f"slotmoe, version {slotmoe.__version__}"
    assert printed[-1] == str(site / "slotmoe" / "__init__.py")


@pytest.mark.usefixtures("nightly", "processes")
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


def names(pattern, text):
    return {name.replace("_", "-").lower() for name in re.findall(pattern, text, re.MULTILINE)}


@pytest.mark.usefixtures("nightly")  # a dependency's new release may need something new
def test_what_is_installed_is_locked_and_listed():
    """The bill of materials is made of the lock, and ``scripts/audit.py`` asks for its releases."""
    lock, notices = ((ROOT / name).read_text() for name in ("requirements.lock", "THIRD_PARTY.md"))
    if f"Python {sys.version_info[0]}.{sys.version_info[1]}," not in lock:
        pytest.skip("the lock is for another Python")
    assert {*needed()} - names(r"^([\w.-]+)==", "\n".join(releases())) == set()
    assert {*needed()} == names(r"^\| ([\w.-]+) \| .+ \|$", notices) - {"package"}


def test_an_audit_that_looked_nothing_up_is_no_success():
    """As pip-audit reports what a mirror of pypi.org does not know."""
    good = {"name": "a", "version": "1", "vulns": []}
    bad = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3", "2.1"]}]}
    skipped = {"name": "c", "skip_reason": "not found on PyPI"}
    assert judged({"dependencies": [good]}) == (["1 releases looked up, 0 advisories"], 0)
    lines, code = judged({"dependencies": [good, skipped]})
    assert (lines[-1], code) == ("1 releases were not looked up: not found on PyPI", 3)
    lines, code = judged({"dependencies": [good, bad, skipped]})
    assert (lines[0], code) == ("b 2: PYSEC-1, fixed in 3, 2.1", 1)


def test_dependencies_are_locked_and_listed_with_their_licences():
    """``scripts/lock.py`` and ``scripts/notices.py`` make the lists."""

    project = (ROOT / "pyproject.toml").read_text()
    locked = names(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text())
    assert names(r'^  "([\w.-]+)>=[^;"]*"', project) - locked == {"torch"}
    listed = names(r"^\| ([\w.-]+) \| .+ \|$", (ROOT / "THIRD_PARTY.md").read_text())
    assert names(r'^  "([\w.-]+)>=[^;"]*"', project.partition("dev = [")[0]) <= listed
