"""Every chat template of a few packages, beside transformers' own rendering.

The packages, which hold templates of some hundred models, come from the package index; or give
folders with ``.jinja`` files.  Templates are read, and run in the sandbox alone.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from campaigns.runner import Attack
from tests.support.templates import ASKED, CALL, CHATS, TOOLS, both, tokenizer_in

PACKAGES = ("trl==1.16.0", "axolotl==0.19.0", "llama-cpp-python==0.3.36")
SAID = {"role": "assistant", "content": "I look."}
RESULT = {"role": "tool", "content": "12", "name": "weather", "tool_call_id": "call00001"}
GIVEN = {"id": "call00001", "type": "function", **CALL}
WRITTEN = {**GIVEN, "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
MORE = {
    "system": {"messages": [{"role": "system", "content": "Be brief."}, ASKED]},
    "turns": {"messages": [ASKED, {**SAID, "reasoning_content": "Hm\n"}, ASKED]},
    "first": {"messages": [ASKED], "tools": TOOLS},
    "text": {"messages": [ASKED, {**SAID, "tool_calls": [WRITTEN]}, RESULT], "tools": TOOLS},
    "object": {"messages": [ASKED, {**SAID, "tool_calls": [GIVEN]}, RESULT], "tools": TOOLS},
    "two": {
        "messages": [ASKED, {**SAID, "tool_calls": [GIVEN, GIVEN]}, RESULT, RESULT, SAID, ASKED],
        "tools": TOOLS,
    },
    "thinks": {"messages": [ASKED], "extra": {"enable_thinking": True, "thinking": True}},
    "late": {"messages": [ASKED, {"role": "system", "content": "Now."}, ASKED]},
}


def packaged(folder):
    """The templates of ``PACKAGES``, as files below ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
    subprocess.run([*command, "--no-binary", "llama-cpp-python", *PACKAGES], check=True)
    for path in [*folder.iterdir()]:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith(".jinja"):
                        archive.extract(name, folder / path.stem)
        else:
            with tarfile.open(path) as archive:
                found = [one for one in archive if one.isfile() and one.name.endswith(".jinja")]
                archive.extractall(folder / path.stem, found, filter="data")
    return [folder]


def run(folder, part, aim):
    tokenizer, wrong, same, refused = tokenizer_in(folder), [], 0, 0
    (folder / "packages").mkdir()
    places = aim.given.folders or packaged(folder / "packages")
    paths = sorted(path for place in places for path in place.rglob("*.jinja"))
    for path in paths:
        for name, chat in (CHATS | MORE).items():
            theirs, ours = both(path.read_text(encoding="utf-8"), tokenizer, **chat)
            same, refused = same + (theirs == ours), refused + (theirs is ours is None)
            if theirs != ours:
                wrong.append(f"{path.name}, {name}: theirs {theirs!r}, ours {ours!r}")
    counts = {"templates": len(paths), "conversations": same + len(wrong), "refused": refused}
    return {**counts, "wrong": wrong + ["no templates"] * (not paths)}


FOLDERS = {"type": Path, "nargs": "+", "default": [], "help": "with .jinja files, and no packages"}
ATTACK = Attack(run, ["templates"], options={"folders": FOLDERS})
