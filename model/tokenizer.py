"""Text to token ids and back, and the chat template.  Tokenizer and template come from strangers.

The template runs in jinja2's immutable sandbox inside a child process, because the sandbox alone
bounds neither time nor memory; the child has limits on both and on its output.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import read_json

MAX_TOKENIZER_BYTES = 16 << 20  # DeepSeek-V2's has 4.6 MB
# DeepSeek-V2's 100,000 tokens and as many merges take 200,000 or, merges as pairs, 300,000
MAX_TOKENIZER_VALUES = 350_000
TEMPLATE_SECONDS, TEMPLATE_MEMORY, TEMPLATE_OUTPUT = (
    0.5,
    64 << 20,
    4 << 20,
)  # CPU time, memory and characters of one rendering
MAX_TEMPLATE_BYTES = 1 << 20
REPLACEMENT = "\ufffd"
FIM_TOKENS = (
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
)  # as the Coder models spell them


class Tokenizer:
    """``tokenizer.json`` of the model; ``size`` is the number of ids it can decode (the vocabulary
    may have more rows)."""

    def __init__(self, folder: Path, bos_token_id: int | None):
        from tokenizers import Tokenizer as Backend

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path}: is missing; copy the model's tokenizer.json there")
        with open(path, "rb") as file:
            data = file.read(MAX_TOKENIZER_BYTES + 1)
        if len(data) > MAX_TOKENIZER_BYTES or data.count(b",") > MAX_TOKENIZER_VALUES:
            raise ConfigError(
                f"{path}: more than {MAX_TOKENIZER_BYTES} bytes or {MAX_TOKENIZER_VALUES} values; not a real tokenizer"
            )
        try:
            self._backend = Backend.from_buffer(data)
        except KeyboardInterrupt:
            raise
        except (
            BaseException
        ) as problem:  # the library raises bare Exception, and its panics aren't even that
            raise ConfigError(
                f"{path}: not a tokenizer that the tokenizers library reads ({str(problem)[:120]})"
            ) from None
        settings_path = folder / "tokenizer_config.json"
        self.settings: dict[str, Any] = (
            read_json(settings_path, 1 << 22) if settings_path.exists() else {}
        )
        template_path = folder / "chat_template.jinja"
        self._template_file = _read_template(template_path) if template_path.exists() else None
        self.bos_token_id = (
            bos_token_id if self.settings.get("add_bos_token", bos_token_id is not None) else None
        )
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values(), default=-1) + 1

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of ``text``, after the beginning-of-sentence token if the model wants one and
        the text has none."""
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except (
            UnicodeError,
            TypeError,
        ):  # lone surrogates, which is how Python passes on bytes that are no text
            raise ConfigError("the prompt is not valid UTF-8 text") from None
        if add_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)
        return ids

    def encode_gap(self, before: str, after: str) -> list[int]:
        """Token ids that ask a Coder model for what belongs between two texts.  Raises
        ``ConfigError`` if the tokenizer has no fill-in-the-middle tokens."""
        begin, hole, end = (self.token_id(token) for token in FIM_TOKENS)
        if begin is None or hole is None or end is None:
            raise ConfigError(
                "this model can't fill in the middle: its tokenizer has no tokens for that; leave suffix out"
            )
        start = [] if self.bos_token_id is None else [self.bos_token_id]
        return [
            *start,
            begin,
            *self.encode(before, add_bos=False),
            hole,
            *self.encode(after, add_bos=False),
            end,
        ]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of ``text`` without a beginning, and how many characters of it end with each
        token.

        Of a character that several tokens make up, the first of them counts it.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, list(accumulate((end for _, end in encoding.offsets), max))

    def token_id(self, token: str) -> int | None:
        """The id of the token that is spelled like this, if there is one."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def to_json(self) -> str:
        """The whole tokenizer, as in ``tokenizer.json``."""
        text: str = self._backend.to_str()
        return text

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids`` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text

    @property
    def template(self) -> str | None:
        """The model's chat template; None if it has none."""
        template = self._template_file or self.settings.get("chat_template")
        if isinstance(template, list):  # several named templates
            named = {
                item.get("name"): item.get("template")
                for item in template
                if isinstance(item, dict)
            }
            template = named.get("default")
        return template if isinstance(template, str) else None

    def chat(
        self,
        messages: list[dict[str, str]],
        tools: list[dict[str, Any]] | None = None,
        begun: bool = False,
    ) -> str:
        """``messages`` through the model's chat template, ready for the assistant's answer, of
        which the last message is the beginning if it is ``begun``.  ``tools`` are for templates
        that use them.

        Raises ``ConfigError`` if there is no template, or if it fails or exceeds its limits.
        """
        if self.template is None:
            raise ConfigError(
                "tokenizer_config.json: has no chat_template, so this is not a chat model: take its Chat or Instruct version, or "
                "continue text with 'slotmoe run MODEL PROMPT', without --chat"
            )
        tokens = {"bos_token": self._spelling("bos_token"), "eos_token": self.eos_token}
        variables = {
            "messages": messages,
            "add_generation_prompt": not begun,
            **({"tools": tools} if tools else {}),
            **tokens,
        }
        text = _render(self.template, variables)
        return text.removesuffix(self.eos_token) if begun else text

    @property
    def eos_token(self) -> str:
        """How the end-of-sentence token is spelled; empty if the settings don't say."""
        return self._spelling("eos_token")

    def _spelling(self, name: str) -> str:
        token = self.settings.get(name)
        return str(token.get("content", "") if isinstance(token, dict) else token or "")


class TextStream:
    """Turns a stream of ids into text that never ends inside a UTF-8 character.  Special tokens
    have no text, unless ``shown`` says what."""

    def __init__(self, tokenizer: Tokenizer, shown: Mapping[int, str] | None = None):
        self._tokenizer, self._shown = tokenizer, shown or {}
        self._ids: list[
            int
        ] = []  # the last finished token, for context, and those whose text is not out yet
        self._printed = ""  # what of their text is already out

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; empty while a character is incomplete."""
        if token_id in self._shown:
            return self.flush() + self._shown[token_id]
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        # A trailing replacement mark may be the start of a character that the next tokens complete.
        certain = text[:-1] if text.endswith(REPLACEMENT) else text
        fresh = certain[len(self._printed) :]
        self._printed = certain
        if certain == text:
            self._ids = self._ids[-1:]
            self._printed = self._tokenizer.decode(self._ids)
        return fresh

    def flush(self) -> str:
        """What remains at the end: an incomplete character, as U+FFFD."""
        text = self._tokenizer.decode(self._ids)
        fresh, self._ids, self._printed = text[len(self._printed) :], [], ""
        return fresh

    @property
    def complete(self) -> bool:
        """True if no character is waiting for its last bytes."""
        return len(self._ids) <= 1


def _read_template(path: Path) -> str:
    if not path.is_file() or path.stat().st_size > MAX_TEMPLATE_BYTES:
        raise ConfigError(f"{path}: is not a regular file of at most {MAX_TEMPLATE_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None


def _render(template: str, variables: dict[str, Any]) -> str:
    request = json.dumps({"template": template, "variables": variables})
    try:
        child = subprocess.run(
            [
                sys.executable,
                "-c",
                _CHILD,
                str(TEMPLATE_SECONDS),
                str(TEMPLATE_MEMORY),
                str(TEMPLATE_OUTPUT),
            ],
            input=request.encode(),
            capture_output=True,
            timeout=60
            # the child bounds its own CPU time; this is for a machine that stands still
            * TEMPLATE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            "chat_template: did not finish; the machine is overloaded, or the template is hostile"
        ) from None
    if child.returncode < 0:
        raise ConfigError(
            f"chat_template: did not finish in {TEMPLATE_SECONDS} seconds; the template is broken or hostile"
        )
    if child.returncode:
        lines = child.stderr.decode(errors="replace").strip().splitlines() or ["out of memory"]
        raise ConfigError(f"chat_template: failed ({lines[-1][:160]})")
    return child.stdout.decode()


_CHILD = """
import sys
sys.path[:] = [path for path in sys.path if path]  # never import from the working directory
import datetime, json, resource, signal
from jinja2.sandbox import ImmutableSandboxedEnvironment
def raise_exception(message):
    raise ValueError(message)
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.datetime.now().strftime(form))
environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
request = json.load(sys.stdin)
seconds, memory, limit = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal kills
memory += int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
parts, size = [], 0
for part in environment.from_string(request["template"]).generate(**request["variables"]):
    size += len(part)
    if size > limit:
        raise ValueError(f"more than {limit} characters of output")
    parts.append(part)
sys.stdout.buffer.write("".join(parts).encode())
"""
