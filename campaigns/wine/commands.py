"""Commands on both systems: their texts, their numbers, their memory."""

import json
import re
import shutil
import subprocess
from pathlib import Path

from campaigns.models import sample_export
from campaigns.wine.environment import ROOT, call
from tests.support.tiny import write_checkpoint

HERE = Path(__file__).parent
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
    shutil.copytree(export, pair.folder / STRANGE / export.name)
    words = "run", pair.folder / STRANGE / export.name, STRANGE, "-n", 9, "--json"
    texts = [json.loads(out) for _, out, _ in pair.commands(*words)]
    if len({json.dumps([text[name] for name in COMPUTED]) for text in texts}) > 1:
        wrong.append(f"in a strange folder: {texts}")
    sets = []
    for name in SETS:
        found = [_computed(pair.worker(system), name, export) for system in pair.systems]
        if found[0] != found[1]:
            wrong.append(f"{name}: {found}")
        elif found[0] is not None:
            sets.append(name)
    if not sets:
        wrong.append("no instruction set")
    return {"sets": sets, "wrong": wrong}


def _computed(worker, instructions, export):
    """What the kernels of an instruction set compute, or None where this machine has them not."""
    if not worker.ask("choose", instructions=instructions):
        return None
    words = "run", export, PROMPT, "-n", 40, "--json", "--threads", 2, "--temperature", 0.7
    code, out, error = worker.command(*words, "--seed", 3)
    assert code == 0, error
    digest = worker.ask("logits", model=export, count=100, context=256)
    return [digest, *(json.loads(out)[name] for name in COMPUTED)]


# Paths of numbers in reports that hang on speed, on chance, or on what a process takes.
VARYING = re.compile(
    r"second|peak|budget|total|bandwidth|free|runtime|version|/cache$|/began$|/(used|latest)\b|runs|"
    r"(decode|prefill)_fraction|decode_milliseconds|scratch and rest|/exports/0/bytes|^/bytes$|"
    r"/memory/ram/|/verdict|/time/|/components/"
)


def reports(pair, aim):
    """``plan``, ``profile``, ``bench``, ``list``, ``verify``, ``eval``, ``doctor`` and ``rm``: all
    go well, and their numbers are Linux's but for the speed and for what the system takes."""
    export, wrong, numbers = sample_export(pair.folder), [], 0
    write_checkpoint(pair.folder / "tiny")
    text, words = pair.folder / "text.txt", ("--threads", 2, "--context", 512, "--json")
    text.write_text(PROMPT * 20, encoding="utf-8")
    bench = "--prompt-tokens", 8, "--decode-tokens", 4, "--repetitions", 1
    for command in (
        ("quantize", pair.folder / "tiny", "--json"),
        ("plan", "v2-lite", "--ram", "6GiB", "--threads", 2, "--json"),
        ("plan", "v2", *"--gpu rtx-4090 --ram 64GiB --disk-bandwidth 5GB --json".split()),
        ("plan", export, "--ram", "2GiB", *words),
        ("bench", export, *bench, "--ram", "2GiB", *words),
        ("profile", export, "-n", 4, "--ram", "2GiB", *words, "-o", "FOLDER"),
        ("eval", export, "--text", text, "--ram", "2GiB", *words),
        ("list", "--json"),
        ("doctor", "--json"),
        ("rm", "tiny", "--yes", "--json"),
        ("list", "--json"),
    ):
        found = []
        for system in pair.systems:
            place = {"FOLDER": pair.folder / system.name}
            given = [place.get(word, word) for word in command]
            code, out, error = pair.worker(system).command(*given)
            if code:
                wrong.append(f"{command[0]} on {system.name}: {code}, {out}{error}")
            elif command[0] not in ("doctor", "rm"):  # of the machine, and bytes as a disk counts
                found.append(dict(facts(json.loads(out.replace(f"of {system.name}", "of")))))
        if len(found) == 2:
            numbers += len(found[0])
            wrong += [
                f"{command[0]}: {it}" for it in sorted({*found[0].items()} ^ {*found[1].items()})
            ]
    return {"numbers": numbers, "wrong": wrong}


def facts(values, path=""):
    """Every number and string of a report, by its path, without what varies."""
    if VARYING.search(path):
        return
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            yield from facts(value, f"{path}/{key}")
    else:
        yield path, values


def budgets(pair, aim):
    """With the least --ram that is let, the text is that of a machine with much, within the budget;
    below it the sentence is Linux's."""
    export, wrong, said, peaks = sample_export(pair.folder), [], [], {}
    words = "run", export, PROMPT, "-n", 40, "--threads", 2, "--json", "--ram"
    texts = [json.loads(pair.worker(pair.linux).command(*words, "2GiB")[1])]
    for system in pair.systems:
        code, _, refusal = system.run(*words, "64MiB")
        said.append((code, re.sub(r"[\d.]+ [KMG]iB", "N", refusal)))
        least = float(re.search(r"needs at least ([\d.]+) MiB", refusal)[1])
        if system.run(*words, f"{least - 8}MiB")[0] != 2:
            wrong.append(f"{system.name}: {least - 8} MiB are not refused")
        budget = f"{least + 2}MiB"  # a process takes somewhat more or less than the one before
        code, out, error = system.run(*words, budget)
        if code:
            wrong.append(f"{system.name}: {budget}: {error}")
            continue
        texts.append(json.loads(out))
        memory, slots = texts[-1]["memory"], texts[-1]["cache"]["slots"]
        peaks[system.name] = memory["peak_rss"] / memory["budget"], slots
        if memory["peak_rss"] > memory["budget"]:
            wrong.append(f"{system.name}: {memory}")
    if said[0] != said[1] or said[0][0] != 2:
        wrong.append(f"too little: {said}")
    if len({json.dumps([text[name] for name in COMPUTED]) for text in texts}) > 1:
        wrong.append(f"texts {[text['text'] for text in texts]}")
    return {"peaks": peaks, "wrong": wrong}


def kernels(pair, aim):
    """tests/quant/kernels_driver.cpp, which scripts/wheels has run on Windows, gives Linux's bits
    with each instruction set that this machine has."""
    driver = pair.folder / "driver"
    library = next((ROOT / "quant" / "kernels" / "cpu").glob("_native*.so"))
    options = "-std=c++17", "-O2", "-pthread", f"-I{library.parent}", "-o", driver
    call("c++", *options, ROOT / "tests" / "quant" / "kernels_driver.cpp", library)
    said = [pair.kernels, subprocess.run([driver, "own"], stdout=subprocess.PIPE, text=True).stdout]
    found = [dict(re.findall(r"(\w+) ok (\w+)$", text, re.MULTILINE)) for text in said]
    return {"sets": [*found[1]], "wrong": [f"{found}"] * (found[0] != found[1] or not found[0])}


def own(pair, aim):
    """What ``slotmoe.system`` promises on Windows alone."""
    code, out, error = pair.windows.run(HERE / "own.py", program=pair.windows.python)
    return json.loads(out) if out else {"wrong": [f"exit code {code}: {error}"]}


PARTS = {"kernels": kernels, "own": own, "run": run, "reports": reports, "budgets": budgets}
