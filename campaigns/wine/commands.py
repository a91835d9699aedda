"""Commands on both systems: their texts, their numbers, their memory."""

import json
import re
import shutil

from campaigns.models import sample_export
from campaigns.wine.environment import ROOT

SETS = ("portable", "avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx")
COMPUTED = ("text", "ids", "logprobs", "finish_reason", "kernels")
README = (ROOT / "README.md").read_text()
PROMPT = re.findall(r'slotmoe run sample "(.*)" --temperature 0.7', README)[0]
STRANGE = "Bücher von früher, 本 $(x) %PATH%"


def run(pair, aim):
    """The README's first command, greedy and with a seed; every instruction set of this machine; a
    folder with a strange name."""
    wrong, export = [], sample_export(pair.folder)
    for how in (("--seed", 1, "--temperature", 0.7), ("--verbose",)):
        words = "run", "sample", PROMPT, "--threads", 2, *how
        wanted, found = (system.run(*words) for system in pair.systems)
        if found[:2] != wanted[:2] or found[0]:
            wrong.append(f"{' '.join(map(str, how))}: {found}, and on Linux {wanted}")
    sets = []
    for name in SETS:
        found = [_computed(system, name, export) for system in pair.systems]
        if found[0] != found[1]:
            wrong.append(f"{name}: {found}")
        elif found[0] is not None:
            sets.append(name)
    shutil.copytree(export, pair.folder / STRANGE / export.name)
    words = "run", pair.folder / STRANGE / export.name, STRANGE, "-n", 9, "--json"
    texts = [json.loads(out) for _, out, _ in pair.commands(*words)]
    if len({json.dumps([text[name] for name in COMPUTED]) for text in texts}) > 1:
        wrong.append(f"in a strange folder: {texts}")
    return {"sets": sets, "wrong": wrong}


def _computed(system, instructions, export):
    """What the kernels of an instruction set compute, or None where this machine has them not."""
    worker = system.worker(SLOTMOE_INSTRUCTIONS=instructions)
    try:
        words = "run", export, PROMPT, "-n", 40, "--json", "--threads", 2, "--temperature", 0.7
        code, out, _ = worker.command(*words, "--seed", 3)
        if code:
            return None
        text = json.loads(out)
        digest = worker.ask("logits", model=export, count=100, context=256)
        return [digest, *(text[name] for name in COMPUTED)]
    finally:
        worker.close()


PARTS = {"run": run}
