"""Whether a build of the kernels compiles what changed, and nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "setup.py"
CPU = Path("quant/kernels/cpu")
pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))) or os.name == "nt",
    reason="no compiler here that lists what it has read",
)


@pytest.fixture
def project(tmp_path, processes):
    """A project of two files with a header each, and setup.py."""
    shutil.copy(SETUP, tmp_path)
    for folder in ("slotmoe/system", CPU, "quant/kernels/vulkan"):
        (tmp_path / folder).mkdir(parents=True)
    for package in ("slotmoe", "slotmoe/system"):
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / CPU / "signatures.txt").write_text("first: x:pointer\n")
    for name in ("first", "second"):
        (tmp_path / CPU / f"{name}.h").write_text("#pragma once\n")
        source = f'#include "{name}.h"\nextern "C" int {name}() {{ return 1; }}\n'
        (tmp_path / CPU / f"{name}.cpp").write_text(source)
    return tmp_path


def compiled(project, **environment):
    """Names of the files that a build compiles."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    ran = subprocess.run(
        command, cwd=project, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert ran.returncode == 0 and "failed" not in ran.stderr, ran.stderr
    assert (project / CPU / "_native.abi3.so").exists()
    lines = [line.split() for line in ran.stdout.splitlines() if " -c " in line]
    return sorted(Path(words[words.index("-c") + 1]).stem for words in lines)


def test_a_build_compiles_only_what_changed(project):
    assert compiled(project) == ["first", "second"]
    assert compiled(project) == []
    (project / CPU / "second.cpp").touch()
    assert compiled(project) == ["second"]
    (project / CPU / "first.h").touch()
    assert compiled(project) == ["first"]
    assert compiled(project, CXXFLAGS="-DOTHER") == ["first", "second"]


def test_a_file_that_did_not_compile_is_compiled_again(project):
    with (project / CPU / "first.cpp").open("a") as source:
        source.write("#ifdef OTHER\n#error other\n#endif\n")
    assert compiled(project) == ["first", "second"]
    with pytest.raises(AssertionError, match="#error other"):
        compiled(project, CXXFLAGS="-DOTHER")
    assert "first" in compiled(project)  # though its last good command is the same


def test_shaders_that_did_not_change_compile_nothing(project, monkeypatch):
    """The shader compiler here copies: its file has the shader's text, and is new each time."""
    program = project / "bin" / "glslangValidator"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\ncp "${9}" "${8}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    shader = project / "quant/kernels/vulkan/shaders/sum.comp"
    shader.parent.mkdir()
    shader.write_text("int sum_spirv();\n")
    source = project / CPU / "second.cpp"
    source.write_text('#include "shaders.h"\n' + source.read_text())
    assert compiled(project) == ["first", "second"]
    shader.touch()
    assert compiled(project) == []
    shader.write_text("long sum_spirv();\n")
    assert compiled(project) == ["second"]
