"""Libraries that read what a stranger wrote run in a child process, with limits on time and memory:
a sandbox bounds neither, and a native library may abort the process that it is in."""

import atexit
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from threading import Lock

from slotmoe import system
from slotmoe.errors import ConfigError


class Child:
    """A process that stays, and answers one input after the other, whatever thread they are of.

    Its ``program`` in Python imports its libraries and defines ``answer(data)``, from bytes to
    bytes.  That calls ``limit()``, from where on it has ``seconds`` of CPU time and ``memory``
    bytes more.  A child that broke a limit or ended is replaced for the next input, and so is one
    that keeps ``memory`` bytes of earlier ones.  It ends with the process that started it."""

    _process: Popen[bytes] | None

    def __init__(self, program: str, seconds: float, memory: int):
        self._program, self._seconds, self._memory = program, seconds, memory
        self._forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)
        atexit.register(self._end)

    def run(self, data: bytes, what: str) -> bytes:
        """The answer to ``data``, which are of ``what``.  Raises ``ConfigError``."""
        with self._lock:
            state = _ENDS  # also if Ctrl-C comes between a question and its answer
            try:
                state, answer = self._ask(data)
            except TimeoutError:
                causes = "the machine is overloaded, or the file is hostile"
                raise ConfigError(f"{what}: did not finish; {causes}") from None
            except (EOFError, ConnectionError):  # it has ended
                code = self._end()
                cause = f"signal {-code}" if code < 0 else f"exit code {code}"
                problem = f"crashed the library that reads it ({cause})"
                if code == system.TOO_LONG:
                    problem = f"did not finish in {self._seconds} seconds"
                raise ConfigError(f"{what}: {problem}; it is broken or hostile") from None
            except OSError as problem:
                cause = f"the system starts no process for it ({problem.strerror})"
                raise ConfigError(f"{what}: can't be read; {cause}") from None
            finally:
                if state & _ENDS:
                    self._end()
        if state & _FAILED:
            raise ConfigError(f"{what}: failed ({answer.decode(errors='replace')[:160]})")
        return answer

    def close(self) -> None:
        """End the process; the next input starts another."""
        with self._lock:
            self._end()

    def _forget(self) -> None:
        """Have no process: after a fork it is the parent's."""
        self._lock, self._process = Lock(), None

    def _ask(self, data: bytes) -> tuple[int, bytes]:
        """Raises ``EOFError`` and ``ConnectionError`` where the process has ended."""
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None
        # For a machine that stands still, or a stopped child.
        limit = system.deadline(process, self._seconds, 60 * self._seconds)
        limit.daemon = True
        limit.start()
        try:
            process.stdin.write(len(data).to_bytes(_SIZE, "little") + data)
            process.stdin.flush()
            state, size = self._read(1)[0], int.from_bytes(self._read(_SIZE), "little")
            if state > _FAILED | _ENDS or size > _MAX_ANSWER:
                raise EOFError  # it is out of its mind
            return state, self._read(size)
        except (EOFError, OSError):
            if limit.is_alive():
                raise EOFError from None
            raise TimeoutError from None
        finally:
            limit.cancel()

    def _read(self, size: int) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def _start(self) -> None:
        # What Python would search, without the working directory, so it need not look for it (-S);
        # and where this package is: an editable install has it on no path.
        package = Path(system.__file__).parents[2]
        paths = json.dumps([*filter(None, sys.path), str(package)])
        limits = map(str, (self._seconds, self._memory))
        command = [sys.executable, "-I", "-S", "-c", _FIRST + self._program + _THEN, paths, *limits]
        # The environment may hold keys.  Ctrl-C on the terminal reaches only its own session.
        self._process = Popen(command, -1, None, PIPE, PIPE, DEVNULL, **system.apart())

    def _end(self) -> int:
        """The exit code of the process; 0 if there is none."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()  # which changes nothing of one that has ended
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what could not be written any more
                if pipe is not None:
                    pipe.close()
        return process.wait()


_FAILED, _ENDS = 1, 2  # bits of an answer's state
_SIZE, _MAX_ANSWER = 8, 32 << 20  # bytes of a length, and of an answer
_FIRST = """
import json, os, sys
sys.path[:], seconds, memory = json.loads(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
from psutil import Process
from slotmoe.system import bound
def used():
    return Process().memory_info().vms
def limit():
    bound(seconds, used() + memory)
"""
_THEN = """
source, sink, start = sys.stdin.buffer, sys.stdout.buffer, used()
while head := source.read(8):
    state = 0
    try:
        said = answer(source.read(int.from_bytes(head, "little")))
    except BaseException as caught:
        problem = caught
        state = 1 if isinstance(problem, Exception) and not isinstance(problem, MemoryError) else 3
    bound(0, None)
    if state:
        said = " ".join(f"{type(problem).__name__}: {problem}".split()).encode(errors="replace")
    if used() > start + memory:
        state |= 2
    sink.write(bytes([state]) + len(said).to_bytes(8, "little") + said)
    sink.flush()
    said = problem = None
"""


PARSER = Child(
    """
from tokenizers import Tokenizer
def answer(data):
    limit()
    tokenizer = Tokenizer.from_buffer(data)
    text = "Hello, w\\u00f6rld 12 \\u4f60\\u597d\\n"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.decode(ids), tokenizer.get_vocab(), tokenizer.to_str()
    return b""
""",
    seconds=20,
    memory=2 << 30,
)
# The environment of transformers' ``apply_chat_template``.  Nothing in it changes, so that one
# conversation leaves nothing to the next.
TEMPLATE = Child(
    """
import datetime, functools
from jinja2 import ext, nodes, sandbox, utils
class GenerationTag(ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
class Dict:  # the class itself has methods that change others
    def __call__(self, *given, **named):
        return dict(*given, **named)
    def fromkeys(self, *given):
        return dict.fromkeys(*given)
class Namespace(utils.Namespace):
    def __init__(*given, **named):
        utils.Namespace.__init__(given[0])
        for name, value in dict(*given[1:], **named).items():
            given[0][name] = value
    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise sandbox.SecurityError(f"a namespace can't have {name!r}")
        utils.Namespace.__setitem__(self, name, value)
def raise_exception(message):
    raise ValueError(message)
now = lambda form: datetime.datetime.now().strftime(form)
def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    how = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)
environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, ext.loopcontrols]
)
environment.globals.update(raise_exception=raise_exception, strftime_now=now)
environment.globals.update(dict=Dict(), namespace=Namespace)
environment.filters["tojson"] = tojson
compiled = functools.lru_cache(4)(environment.from_string)
def answer(data):
    request, most = json.loads(data), 4 << 20
    limit()
    parts, size = [], 0
    for part in compiled(request["template"]).generate(request["variables"]):
        size += len(part)
        if size > most:
            raise ValueError(f"more than {most} characters of output")
        parts.append(part)
    return "".join(parts).encode()
""",
    seconds=0.5,
    memory=64 << 20,
)
# Of schemas and grammars that an answer is to follow: what llguidance says of each and of all.  Of
# the tokenizer it has the tokens that a grammar can name.
COMPILER = Child(
    """
import functools
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper, grammar_from
class Names:
    bos_token_id, __call__ = None, lambda self, text: []
    def __init__(self, size, ids, eos):
        self.tokens, self.eos_token_id = [b""] * size, eos
        self.special_token_ids = [*ids.values()]
        for name, id in ids.items():
            self.tokens[id] = name.encode()
@functools.lru_cache(1)
def tokenizer(names):
    return LLTokenizer(TokenizerWrapper(Names(*json.loads(names))))
def answer(data):
    names, schemas, kind, text, rules = json.loads(data)
    known = tokenizer(names)
    limit()
    problem, told = "", [(False, [])] * len(schemas)
    if kind:
        try:
            text = grammar_from(kind, text)
            problem = LLMatcher(known, text, log_level=0).get_error()
        except ValueError as error:
            problem = str(error)
        if kind == "regex" and not problem:
            text = json.loads(text)["grammars"][0]["lark_grammar"]
        rules.append({"name": "wanted", "lark_grammar": text})
    rules = json.dumps({"grammars": rules})
    whole = LLMatcher(known, rules, log_level=0)
    if whole.is_error() or whole.get_grammar_warnings():  # of which?  Each takes a millisecond
        told = [LLMatcher.validate_grammar_with_warnings(f"start: {it}", known) for it in schemas]
    return json.dumps([told, problem, whole.get_error(), rules]).encode()
""",
    seconds=1,
    memory=128 << 20,
)
