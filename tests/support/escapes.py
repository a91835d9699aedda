"""Text that would command a terminal, planted in what strangers write, and who reads that.

Each function of ``PARTS`` yields command lines, and has written before each what that one reads:
``most`` variants of a file at most, chosen by ``chance``.  ``place`` holds ``source`` (a
checkpoint), ``export`` and ``cache``.  Clients' requests are apart: ``ask``.
"""

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import sys
from urllib.parse import quote

from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.sessions import names as sessions
from slotmoe.tools.cli import main
from tests.support.apis import ASKED, CHAT, MESSAGES, RESPONSES
from tests.support.exported import resign
from tests.support.gguf import write_gguf
from tests.support.hub import HUB, NAME, Repo
from tests.support.served import TOOLS
from tests.support.tiny import SMALL, write_checkpoint

# A title, the clipboard, colours, a cleared screen, the other direction, and what DEL does in JSON.
CODES = "\x1b]0;title\x07\x1b]52;c;aGk=\x07\x9b31m\x1b[35;7m\x1b[2J\u202e\x7f\r"
FILE = f"x{CODES}\nFORGED [bold]y[!"  # of a file: without what no name may hold
PLANT = f"{FILE}[/]</script><img src=x onerror=alert(1)>"
_OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]|^ *FORGED", re.M)
_OWN = re.compile(r"\x1b\[(?!35;7m|2J)[\d;?]*[A-Za-z]|[\r\t]")  # rich's and ours
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def obeyed(text, on_terminal=False):
    """What of ``text`` a terminal obeys, or is a line that nobody of ours wrote; beside what we
    draw with, if that is ``on_terminal``."""
    found = _OBEYED.search(_OWN.sub("", text) if on_terminal else text)
    return found and text[max(0, found.start() - 60) : found.end() + 20]


def planted(value):
    """Copies of a JSON value, each with the plant in another of its strings, or in a new one."""
    if isinstance(value, str):
        yield PLANT
        yield value + PLANT
    elif isinstance(value, dict):
        yield {**value, PLANT: PLANT}
        for key, inner in [*value.items()][:60]:
            rest = {name: other for name, other in value.items() if name != key}
            yield {key + PLANT: inner, **rest}
            yield from ({**value, key: other} for other in (PLANT, *planted(inner)))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:20]):
            yield from ([*value[:index], other, *value[index + 1 :]] for other in planted(inner))


def said(words):
    """Exit code, stdout and stderr of a command line in this process."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def wrong(words):
    """What is wrong with what a command says, or nothing."""
    code, out, err = said(words)
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if "Traceback" in err or "internal error" in err:
        return err[-300:]
    if "--json" in words and code != 2:
        json.loads(out)
    if words[0] in ("run", "chat") and "--json" not in words:  # a pipe gets the text as it is
        out = ""
    return obeyed(out) or obeyed(err)


def prepare(place):
    """Make what ``PARTS`` change; the variables of the environment that it needs."""
    write_checkpoint(place / "source", 2, **SMALL)
    _edit(place / "source/tokenizer_config.json", chat_template=TEMPLATE)
    quantize(place / "source", place / "export")
    (place / "cache").mkdir(exist_ok=True)
    environment = {"SLOTMOE_CACHE": place / "cache", "XDG_CONFIG_HOME": place / "settings"}
    environment |= {"COLUMNS": "9999"}  # no line is broken
    return {name: str(value) for name, value in environment.items()}


def _some(chance, found, most):
    found = [*found]
    return chance.sample(found, min(most, len(found)))


def _edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _variants(path, most, chance):
    """Change the file ``path`` so many times."""
    good = json.loads(path.read_text())
    for variant in _some(chance, planted(good), most):
        path.write_text(json.dumps(variant))
        yield
    path.write_text(json.dumps(good))


def checkpoint(place, most, chance):
    source, made = place / "source", place / "made"
    for name in ("config.json", "model.safetensors.index.json"):
        for _ in _variants(source / name, most, chance):
            yield "plan", source
            yield "quantize", source, made, "--overwrite"
    _edit(source / "config.json", **{PLANT: PLANT})
    yield "quantize", source, made, "--overwrite", "--verbose"
    yield "quantize", source, made, "--overwrite", "--json"
    yield "plan", source, "--json"

    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        for _ in _variants(source / name, most, chance):
            yield "run", source, "Hi", "-n", "2", "--context", "64", "--chat", "--json"
    for path in (place / "cache").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def edit(writer):
        writer.kv_data[0].pop("tokenizer.chat_template", None)
        writer.add_chat_template(PLANT)
        writer.add_string(f"deepseek2.{PLANT}", PLANT)
        writer.add_string("general.name", PLANT)

    for changes in ({"edit": edit}, {"pre": PLANT}):
        path = write_gguf(source, place / "x.gguf", **changes)
        yield "plan", path
        yield "quantize", path, made, "--overwrite"


def manifest(place, most, chance):
    export = place / "cache" / "kept"
    shutil.copytree(place / "export", export)
    good = json.loads((export / "slotmoe.json").read_text())
    named = {**good, "source": {**good["source"], "name": PLANT}}
    for variant in [named, *_some(chance, planted(good), most)]:

        def replace(manifest, variant=variant):
            manifest.clear()
            manifest.update(variant)

        resign(export, replace)
        (export / "tokenizer.json").write_text("{}")  # whose repair names the source
        yield "verify", export
        yield "verify", export, "--json"
        yield "list"
        yield "plan", "kept"
        yield "run", "kept", "Hi", "-n", "1"
    yield "rm", "kept"


def names(place, most, chance):
    """Files and folders."""
    cache, named = place / "cache", place / FILE
    shutil.copytree(place / "source", named)
    shutil.copytree(place / "export", cache / FILE)
    (cache / f"{FILE}2.partial").mkdir()
    (cache / "note.source.json").write_text(json.dumps({"export": FILE, "source": PLANT}))
    (place / f"{FILE}.txt").write_text("Hello " * 99)
    yield "list"
    yield "list", "--json"
    yield "verify", cache / FILE
    yield "quantize", named, place / f"{FILE}3"
    yield "run", "forge", "Hi", "-n", "2"
    yield "eval", cache / FILE, "--text", place / f"{FILE}.txt", "--context", 64
    yield "rm", f"{FILE}2.partial"
    yield "rm", FILE


def kept(place, most, chance):
    """Sessions."""
    options = "--session-dir", place / "kept"
    said = {"system": CODES, "user": "Hi", "assistant": PLANT}
    messages = [{"role": role, "content": text} for role, text in said.items()]
    for name in ("plans", "older"):
        with sessions.NamedSession(place / "kept", name) as session:
            session.save(sessions.Saved(bytes(16), [1, 2], "chat", messages))
    os.rename(place / "kept/names/older.json", place / f"kept/names/{FILE}.json")
    chat = "chat", place / "export", "--session", "plans", "-n", 3, "--context", 256, *options
    yield _typing(*chat, stdin=["/system", "Hello", "/stats", "/help"])
    yield "list", "--sessions", *options
    yield "list", "--sessions", "--json", *options
    for _ in _variants(place / "kept/names/plans.json", most, chance):
        yield _typing("chat", place / "export", "--resume", *options, stdin=["Hi"])
    yield "rm", "--sessions", FILE, *options
    yield "rm", "--sessions", "--all", *options


def _typing(*words, stdin):
    sys.stdin = io.TextIOWrapper(io.BytesIO("\n".join([*stdin, ""]).encode()))
    return words


def hub(place, most, chance):
    HUB.reset()
    repo = Repo(place / "source")
    HUB.add(NAME, repo)
    repo.files |= {
        FILE: place / "source/config.json",
        f"{FILE}.safetensors": place / "source/config.json",
    }
    yield "quantize", NAME, place / "made", "--overwrite"
    message = CODES.replace("\r", "").encode("latin-1", "replace").decode("latin-1")
    listing = json.dumps({"sha": PLANT, "siblings": [{"rfilename": PLANT}]}).encode()
    answers = (403, PLANT.encode()), (404, PLANT.encode()), (200, listing)
    for status, body in answers:

        def answer(kind, name, handler, status=status, body=body):
            return handler.answer(status, body, X_Error_Message=message)

        HUB.faults[:] = [answer]
        yield "plan", NAME
        yield "quantize", NAME, place / "made2"
    HUB.reset()


PARTS = {one.__name__: one for one in (checkpoint, manifest, names, kept, hub)}
BODIES = {
    **ASKED,
    CHAT: {**ASKED[CHAT], "stop": ["x"], "tools": TOOLS},
    RESPONSES: {**ASKED[RESPONSES], "instructions": "x", "metadata": {"a": "b"}},
    MESSAGES: {**ASKED[MESSAGES], "system": "x", "metadata": {"user_id": "a"}},
    "/v1/completions": {"model": "sample", "prompt": "Hi", "max_tokens": 2, "echo": True},
    "/api/show": {"model": "sample"},
}


def ask(port, most, chance):
    """What is wrong with the server's answers to ``most`` requests of each kind, and its log."""
    header = CODES.replace("\r", "").encode()
    with contextlib.redirect_stderr(io.StringIO()) as log:
        for path, body in BODIES.items():
            for variant in _some(chance, planted(body), most):
                yield _answered(port, "POST", path, {}, json.dumps(variant).encode())
            yield _answered(port, "POST", f"{path}/{quote(PLANT)}?a={quote(PLANT)}", {}, b"{}")
        for name in ("x-request-id", "host", "authorization", "x-api-key", "origin", "accept"):
            yield _answered(port, "GET", "/v1/models", {name: header})
        yield _answered(port, "POST", "/v1/completions", {"content-type": header}, PLANT.encode())
    yield obeyed(log.getvalue())


def _answered(port, method, path, headers, body=None):
    """What is wrong with an answer, or nothing."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"content-type": "application/json", **headers})
        response = connection.getresponse()
        data = response.read().decode()
    if "json" in response.headers.get("content-type", ""):  # for a program
        for line in data.splitlines():
            json.loads(line)
        data = ""
    said = [f"{name}: {value}" for name, value in response.headers.items()]
    return obeyed("\n".join([response.reason, *said, data]))
