"""Checks what a built wheel holds: everything that runs, no sources of the kernels, one binary that
needs nothing but Windows where it is for Windows, and a name that says where it runs."""

import re
import sys
from pathlib import Path
from zipfile import ZipFile

SOURCES = (".cpp", ".cc", ".c", ".h", ".hpp", ".o")
WINDOWS = re.compile(r"(?i)(kernel32|api-ms-win-crt-[\w-]+)\.dll")  # from version 10 on
NEEDED = (
    "slotmoe/py.typed",
    "slotmoe/model/geometries/v2.json",
    "slotmoe/model/gguf.json",
    "slotmoe/model/sample/tokenizer.json",
    "slotmoe/offload/plan/gpus.json",
    "slotmoe/quant/kernels/cpu/signatures.txt",
    "slotmoe/tools/profile/report.html",
    "slotmoe/tools/serve/page.html",
)


def problems(wheel: Path) -> list[str]:
    """What is wrong with the wheel, in words."""
    file, on_windows = ZipFile(wheel), wheel.name.endswith("win_amd64.whl")
    names, expected = file.namelist(), "_native.pyd" if on_windows else "_native.abi3.so"
    wrong = [f"holds {name}" for name in names if name.endswith(SOURCES)]
    wrong += [f"lacks {name}" for name in NEEDED if name not in names]
    binaries = [name for name in names if re.search(r"\.(so|pyd|dll|lib|exe)\b", name)]
    if [name.rpartition("/")[2] for name in binaries] != [expected]:
        wrong.append(f"has the binaries {binaries}, expected one {expected}")
    for name in binaries if on_windows else []:
        libraries = {word.decode() for word in re.findall(rb"(?i)[\w.+-]+\.dll", file.read(name))}
        wrong += [f"needs {word}" for word in sorted(libraries) if not WINDOWS.fullmatch(word)]
    if not any(name.endswith("/licenses/LICENSE") for name in names):
        wrong.append("lacks its licence")
    if not re.fullmatch(r"slotmoe-[\w.]+-cp310-abi3-(manylinux[\w.]+|win_amd64)\.whl", wheel.name):
        wrong.append(
            "is not named ...-cp310-abi3-manylinux... or -win_amd64: not every Python and system"
            " takes it"
        )
    return wrong


def main() -> None:
    """Exit with 1 and say why, if a wheel is wrong."""
    wrong = [f"{path}: {problem}" for path in sys.argv[1:] for problem in problems(Path(path))]
    if wrong:
        sys.exit("\n".join(wrong))
    for path in map(Path, sys.argv[1:]):
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, as it should be")


main()
