"""Where the packages lie, and the native kernels; everything else is in pyproject.toml.

The top-level folders install inside one package, `slotmoe`: `model/` as `slotmoe.model`, and so on.
`package_dir` says so to setuptools; the links in `slotmoe/` say the same to mypy and to editors
(docs/decisions/import-package.md has the reason).

`optional=True`: where the kernels do not compile, the package installs without them and runs on
torch. One binary serves every CPU of its architecture: each isa_*.cpp asks for its own instruction
set, chosen at run time. It is loaded through ctypes and knows nothing of Python, so one wheel
serves every version from 3.10 on (`py_limited_api`).

Each build compiles what changed: an object is kept in build/ beside a `.d` file, which lists what
the compiler has read, and a `.command` file, which was written when the compilation started.
`python setup.py build_ext --inplace` keeps them; pip builds in a folder of its own, from nothing.

On Windows clang-cl compiles, of Visual Studio or LLVM, since cl knows no vectors of GCC's kind; or
MinGW-w64's GCC. scripts/wheels compiles for Windows elsewhere.
"""

import os
import shlex
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

FOLDERS = ("model", "quant", "offload", "tools")
KERNELS = Path("quant/kernels/cpu")
VULKAN = Path("quant/kernels/vulkan")  # left out where glslang or the headers of Vulkan are missing
FLAGS = "-O3 -std=c++17 -fvisibility=hidden -pthread -g0".split()
ARITHMETIC = "-ffp-contract=off -fno-math-errno -fno-trapping-math".split()
CLANG_CL = ["/O2", "/std:c++17", "/EHsc", *(f"/clang:{flag}" for flag in ARITHMETIC)]
FLAGS += ARITHMETIC
FLAGS += [f"-ffile-prefix-map={Path.cwd()}=."]  # the same bytes wherever it is built
if sys.platform == "darwin":  # its headers refuse aligned memory where they aim at old systems
    FLAGS += ["-faligned-allocation"]
PACKAGES = ["slotmoe", "slotmoe.network", "slotmoe.system"]
FOLDER_NAMES = [name for folder in FOLDERS for name in (folder, f"{folder}.*")]
PACKAGES += [f"slotmoe.{package}" for package in find_packages(include=FOLDER_NAMES)]


class BuildChanged(build_ext):
    """Compiles several files of an extension at once, and only those that changed; setuptools
    compiles several extensions at once, and all files of each."""

    def get_ext_filename(self, fullname):
        name = super().get_ext_filename(fullname)  # it ends as this system's do
        return name.replace(".abi3.so", os.getenv("SETUPTOOLS_EXT_SUFFIX", ".abi3.so"))

    def get_export_symbols(self, extension):
        return []  # the sources say what they export; there is no PyInit__native

    def build_extension(self, extension):
        if self.compiler.compiler_type == "msvc":
            self.compiler.initialize()
            self.compiler.cc = "clang-cl"
            extension.extra_compile_args, extension.extra_link_args = CLANG_CL, []
        elif self.compiler.compiler_type == "mingw32":  # GCC there does not align stacks for AVX
            extension.extra_compile_args += ["-Wa,-muse-unaligned-vector-move"]
            extension.extra_link_args += ["-static"]
        folder = Path(self.build_temp) / "generated"
        folder.mkdir(parents=True, exist_ok=True)
        extension.include_dirs.append(str(folder))
        signatures = (KERNELS / "signatures.txt").read_text(encoding="utf-8")
        checksum = zlib.crc32(signatures.encode())
        write_changed(folder / "signatures.h", f"#define SLOTMOE_SIGNATURES {checksum}\n")
        if compiler := shutil.which("glslangValidator") or shutil.which("glslang"):
            self.embed_shaders(extension, compiler, folder)
        compile_in_turn = self.compiler.compile

        def compile_at_once(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda one: compile_in_turn([one], **options), sources)
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile_at_once
        if self.compiler.compiler_type != "msvc":  # clang-cl compiles all
            self.compiler._compile = partial(compile_changed, self.compiler, self.compiler._compile)
        self.force = self.compiler.force = True  # only `compile_changed` knows what changed
        super().build_extension(extension)

    def embed_shaders(self, extension, compiler, folder):
        """Each shader as an array of SPIR-V's words, in a header that the others include."""
        shaders, embedded = sorted(VULKAN.glob("shaders/*.comp")), folder / "embedded"
        for shader in shaders:
            words = ["--vn", f"{shader.stem}_spirv", "-o", embedded, shader]
            options = ["-V", "-g0", "--target-env", "vulkan1.3", *words]
            subprocess.run([compiler, *options], check=True, stdout=subprocess.DEVNULL)
            write_changed(folder / f"{shader.stem}.h", embedded.read_text(encoding="utf-8"))
        whole = "".join(f'#include "{shader.stem}.h"\n' for shader in shaders)
        write_changed(folder / "shaders.h", f"#include <cstdint>\n{whole}")
        extension.define_macros.append(("SLOTMOE_SHADERS", "1"))


def compile_changed(compiler, compile_file, path, source, suffix, before, after, preprocessor):
    """Compile a file unless its object is current; the arguments from `path` on are those of
    `compile_file`, setuptools' own method."""
    listed, command = Path(path).with_suffix(".d"), Path(path).with_suffix(".command")
    after = [*after, "-MD", "-MF", str(listed)]
    text = shlex.join([*compiler.compiler_so_cxx, *before, *after])
    if is_current(listed, command, text):
        return
    command.unlink(missing_ok=True)
    started = command.with_suffix(".started")  # before the compiler reads any file
    started.write_text(text, encoding="utf-8")
    compile_file(path, source, suffix, before, after, preprocessor)
    started.replace(command)


def is_current(listed, command, text):
    """Whether the last compilation succeeded, by the same command, and no file that the compiler
    read has changed since it started."""
    try:
        if command.read_text(encoding="utf-8") != text:
            return False
        _, _, names = listed.read_text(encoding="utf-8").replace("\\\n", " ").partition(": ")
        compiled = command.stat().st_mtime_ns
        return all(Path(name).stat().st_mtime_ns < compiled for name in shlex.split(names))
    except FileNotFoundError:
        return False


def write_changed(path, text):
    """Write a file unless it has this text, so that its time says when it changed."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


setup(
    cmdclass={"build_ext": BuildChanged},
    packages=PACKAGES,
    package_dir={f"slotmoe.{folder}": folder for folder in FOLDERS},
    ext_modules=[
        Extension(
            "slotmoe.quant.kernels.cpu._native",
            sources=[str(path) for path in sorted((*KERNELS.glob("*.cpp"), *VULKAN.glob("*.cpp")))],
            language="c++",
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            optional=True,
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
