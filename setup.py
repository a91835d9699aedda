"""Only the native kernels; everything else about the package is in pyproject.toml.

`optional=True`: where they do not compile, the package installs without them and runs on torch.
One binary serves every CPU of its architecture: each isa_*.cpp asks for its own instruction set, chosen at run time.
"""

import os
from pathlib import Path

from setuptools import Extension, setup

sources = sorted(Path("quant/kernels").glob("*.cpp"))
flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

setup(
    ext_modules=[
        Extension(
            "quant.kernels._native",
            sources=[str(path) for path in sources],
            depends=[str(path) for path in sorted(Path("quant/kernels").glob("*.h"))],
            language="c++",
            extra_compile_args=[] if os.name == "nt" else [*flags, "-pthread"],
            extra_link_args=[] if os.name == "nt" else ["-pthread"],
            optional=True,
        )
    ]
)
