"""Files on both systems: exports and sessions have the same bytes, whatever ends a process that
writes them, and what is wrong with a stranger's is said in the same words."""

import json
import shutil
import time
from collections import Counter
from functools import partial

from campaigns.models import sample_export
from campaigns.wine.commands import COMPUTED, PROMPT
from slotmoe.offload.sessions.names import NamedSession
from slotmoe.quant.export.layout import layer_file
from tests.hostile.test_checkpoints import BAD_CHECKPOINTS, BAD_VALUES
from tests.hostile.test_exports import BAD_EXPORTS
from tests.hostile.test_tokenizers import TEMPLATES, TOKENIZERS
from tests.support.disk import digests
from tests.support.hostile import edit_json, flip
from tests.support.tiny import CONFIG, REMOVE, SAMPLE, write_checkpoint

HANGS = 60  # seconds
WAYS = {
    "usual": (),
    "nf4": ("--codec", "nf4", "--resident", "nf4"),
    "three bits": ("--bits", 3, "--resident", "mixed"),
}


class Making:
    """An export.  ``wanted`` are the bytes that Linux makes."""

    def __init__(self, pair):
        self.pair, self.source, self.made = pair, pair.folder / "source", pair.folder / "made"
        write_checkpoint(self.source, shards=2)
        self.words = "quantize", self.source, self.made
        assert pair.worker(pair.linux).command(*self.words)[0] == 0
        self.wanted = digests(self.made)
        shutil.rmtree(self.made)

    def begin(self):
        """What is there before."""

    def check(self):
        assert not self.made.exists() or digests(self.made) == self.wanted, "wrong bytes in place"

    def finish(self):
        """The same command in another process, and all that is wrong then."""
        code, _, error = self.pair.worker(self.pair.windows).command(*self.words)
        assert code == 0, f"does not resume: {error}"
        left = [path.name for path in self.pair.folder.glob("made*")]
        assert left == ["made"], f"leaves {left}"
        self.check()
        shutil.rmtree(self.made)


class Saving:
    """A text that goes on in a session.  ``said`` is what each run adds, and ``contents`` what the
    session has then."""

    def __init__(self, pair, model):
        self.pair, self.folder, self.before = pair, pair.folder / "kept", pair.folder / "before"
        self.words = text_in(self.folder, model)
        self._said, self._contents = [], []
        for _ in range(3):
            self._said.append(self._text())
            self._contents.append(self._content())
            if not self.before.exists():
                shutil.copytree(self.folder, self.before)

    def _text(self):
        code, out, error = self.pair.worker(self.pair.windows).command(*self.words)
        assert code == 0 and "damaged" not in error, error
        return json.loads(out)["text"]

    def _content(self):
        with NamedSession(self.folder, "plans") as session:
            return session.saved.messages

    def begin(self):
        """What is there before."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.before, self.folder)

    def check(self):
        assert self._content() in self._contents[:2], "another text in the session"

    def finish(self):
        """The same command in another process, and all that is wrong then."""
        runs = self._contents.index(self._content()) + 1
        assert self._text() == self._said[runs], "another text"


def killed(pair, aim, work):
    """What is wrong after Windows processes have died at a change of the disk or at a random
    moment, killed by Windows or without its knowledge."""
    wrong, count, chance, windows = [], 0, aim.chance, pair.windows
    words, started = windows.words(work.words), time.perf_counter()
    work.begin()
    _, changes = pair.worker(windows).ask("dying", words=words)
    duration = time.perf_counter() - started
    pair.worker(windows).close()
    work.finish()
    while aim.goes_on(count):
        work.begin()
        worker, at = pair.worker(windows), chance.choice((0, chance.randint(1, changes)))
        if at:
            what = f"at change {at} of {changes}"
            worker.begin("dying", words=words, at=at)
            worker.process.wait(HANGS)
        else:
            what = at_a_moment(windows, worker, words, duration, chance)
        count += 1
        try:
            work.check()
            work.finish()
        except Exception as problem:
            wrong.append(f"killed {what}: {problem!r}")
    return {"killed": count, "changes": changes, "wrong": wrong}


def at_a_moment(windows, worker, words, duration, chance):
    """Kill a worker in the middle of a command; how that was done."""
    moment, is_windows = chance.random() * duration, chance.random() < 0.5
    program = f"import os; input(); os.kill({worker.ask('number')}, 9)"  # TerminateProcess
    with windows.start("-c", program, program=windows.python, stderr=None) as killer:
        worker.begin("command", words=words)
        time.sleep(moment)
        if is_windows:
            killer.communicate(b"\n", timeout=HANGS)
            worker.process.wait(HANGS)
        else:
            worker.close()
            killer.kill()
    return f"after {moment:.2f} s by {'Windows' if is_windows else 'Linux'}"


def text_in(folder, export):
    words = "run", export, PROMPT, "-n", 40, "--threads", 2, "--json"
    return *words, "--session", "plans", "--session-dir", folder


def export(pair, aim):
    """Equal bytes in each way of quantizing; kills; one process at a destination; damage is found
    and mended alike."""
    work, wrong = Making(pair), []
    for source, name in ((work.source, "tiny"), (SAMPLE, "sample")):
        for way, options in WAYS.items():
            made = [pair.folder / f"{name} {way} {system.name}" for system in pair.systems]
            for system, folder in zip(pair.systems, made, strict=True):
                code, _, error = pair.worker(system).command("quantize", source, folder, *options)
                if code:
                    wrong.append(f"{name} {way} on {system.name}: {error}")
            if not wrong and digests(made[0]) != digests(made[1]):
                names = [path.name for path in made[0].rglob("*") if path.is_file()]
                wrong.append(f"{name} {way}: other bytes {names}")
    wrong += one_at_a_destination(pair, work) + mended(pair, work)
    report = killed(pair, aim, work)
    return {**report, "wrong": wrong + report["wrong"]}


def one_at_a_destination(pair, work):
    """What is wrong where another process writes the same export."""
    said = []
    for system in pair.systems:
        partial = work.made.with_name("made.partial")
        partial.mkdir()
        holder = system.worker()
        try:
            holder.ask("hold", path=partial, folder=True)
            said.append(pair.worker(system).command(*work.words))
        finally:
            holder.close()
        partial.rmdir()
    others = [system.worker() for system in (pair.windows, pair.windows)]
    try:
        for other in others:  # and for real
            other.begin("command", words=pair.windows.words(work.words))
        codes = [other.answer()[0] for other in others]
    finally:
        for other in others:
            other.close()
    work.finish()
    wrong = [f"a second process: {said}"] * (said[0] != said[1] or said[0][0] != 2)
    return wrong + [f"two at once: {codes}"] * (sorted(codes) not in ([0, 0], [0, 2]))


def mended(pair, work):
    """What is wrong where an export is damaged."""
    wrong = []
    for name in (layer_file(1), "tokenizer.json", "resident.safetensors"):
        pair.worker(pair.windows).command(*work.words)
        flip(work.made / name, (work.made / name).stat().st_size // 2)
        said = pair.commands("verify", work.made)  # each says what is wrong
        if said[0] != said[1] or said[0][0] == 0:
            wrong.append(f"{name} is damaged: {said}")
        try:
            work.finish()
        except AssertionError as problem:
            wrong.append(f"{name} is damaged: {problem}")
    return wrong


def sessions(pair, aim):
    """Texts that go on in a session: the same on both, with the same latents, of which nothing is
    computed again, or begun on the other system; one process at a time; kills."""
    model, wrong, folders = sample_export(pair.folder), [], {}
    for system in pair.systems:
        folders[system.name] = folder = pair.folder / f"of {system.name}"
        pair.worker(system).command(*text_in(folder, model))
        shutil.copytree(folder, pair.folder / f"begun on {system.name}")
    texts = [texts_of(pair, system, folders[system.name], model) for system in pair.systems]
    if texts[0] != texts[1] or not texts[0]["restored_tokens"]:
        wrong.append(f"continued: {texts}")
    latents = [
        sorted(path.read_bytes()[-1040:-16] for path in folder.rglob("blocks/??/*"))
        for folder in folders.values()
    ]
    if latents[0] != latents[1]:
        wrong.append("other latents")
    for system, other in (pair.systems, pair.systems[::-1]):
        # The kernels' binary is another: the text is read again, and is the same.
        found = texts_of(pair, system, pair.folder / f"begun on {other.name}", model)
        if found["text"] != texts[0]["text"] or found["restored_tokens"]:
            wrong.append(f"begun on {other.name}, continued on {system.name}: {found}")
    said = []
    for system in pair.systems:
        holder = system.worker()
        try:
            holder.ask("hold", path=pair.folder / "of Linux" / "names" / "plans.lock")
            said.append(pair.worker(system).command(*text_in(pair.folder / "of Linux", model)))
        finally:
            holder.close()
    if said[0] != said[1] or said[0][0] != 2:
        wrong.append(f"a second process: {said}")
    report = killed(pair, aim, Saving(pair, model))
    return {**report, "wrong": wrong + report["wrong"]}


def texts_of(pair, system, folder, model):
    """What a session's next text is, and what of it the disk had."""
    code, out, error = pair.worker(system).command(*text_in(folder, model))
    assert code == 0, error
    text = json.loads(out)
    return {name: text[name] for name in COMPUTED} | {
        "restored_tokens": text["sessions"]["restored_tokens"]
    }


# What Wine does not do as Windows does, or what is another thing there, by a name's words.
NOT_COMPARED = {
    "pipe": "file systems of Windows have none",
    "link": "Wine shows the file that a Unix link leads to in its place",
    "memory": "Wine counts no memory of a job",
    "endless-loop": "Wine gives the asking process's CPU time for a child's; see limits",
    "time-by": "the same",
    "library": "the tokenizers library aborts on Linux, and ends with a code or raises on Windows",
}


def hostile(pair, aim):
    """Broken checkpoints, exports, tokenizers, templates and values of config.json: refused in one
    line, the same on both, and nothing is left."""
    good, wrong, count = pair.folder / "good", [], Counter()
    write_checkpoint(good / "checkpoint", shards=2)
    options = "--codec", "nf4", "--resident", "nf4"
    pair.worker(pair.linux).command("quantize", good / "checkpoint", good / "export", *options)
    for name, kind, breaking, words in cases():
        places = {"IT": pair.folder / kind, "MADE": pair.folder / "made"}
        shutil.copytree(good / kind, pair.folder / kind)
        breaking(pair.folder / kind)
        said = pair.commands(*(places.get(word, word) for word in words))
        # what is said beforehand counts free bytes
        lines = [error.rpartition("that are free\n")[2] for _, _, error in said]
        if [code for code, *_ in said] != [2, 2] or lines[0].count("\n") != 1:
            wrong.append(f"{kind}, {name}: {said}")
        elif lines[0] != lines[1]:
            wrong.append(f"{kind}, {name}: {lines}")
        if (pair.folder / "made").exists():
            wrong.append(f"{kind}, {name}: makes an export")
        shutil.rmtree(pair.folder / kind)
        count[words[0]] += 1
    return {**count, "wrong": wrong}


def cases():
    """Names, what is broken and how, and the words of a command for IT."""
    for case in every_case():
        if not any(word in case[0] for word in NOT_COMPARED):
            yield case


def every_case():
    for name, (breaking, _) in BAD_CHECKPOINTS.items():
        yield name, "checkpoint", breaking, ("quantize", "IT", "MADE")
    for name, (breaking, _) in BAD_EXPORTS.items():
        yield name, "export", breaking, ("run", "IT", PROMPT * 4, "-n", 1, "--context", 64)
    talking = "run", "IT", "Hi", "--chat", "-n", 1, "--context", 64
    for name, breaking in TOKENIZERS.items():
        yield name, "checkpoint", breaking, talking
    for name, template in TEMPLATES.items():
        settings = {"chat_template": template}
        yield name, "checkpoint", partial(edited, "tokenizer_config.json", settings), talking
    for key, values in BAD_VALUES.items():
        for value in values:
            yield f"{key} {value!r:.30}", "checkpoint", partial(other, key, value), ("plan", "IT")


def edited(file, values, folder):
    edit_json(folder / file, lambda config: config.update(values))


def other(key, value, folder):
    left_out = ["num_key_value_heads"] if key == "num_attention_heads" else []
    config = {**CONFIG, key: value}
    kept = {k: v for k, v in config.items() if v is not REMOVE and k not in left_out}
    (folder / "config.json").write_text(json.dumps(kept))


PARTS = {"export": export, "sessions": sessions, "hostile": hostile}
