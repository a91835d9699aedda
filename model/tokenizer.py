"""Text to token ids and back, the chat template, and the marks of reasoning before an answer.
Tokenizer and template come from strangers.

The template runs in jinja2's immutable sandbox inside a child process.  A tokenizer that is new
here is parsed by a child first, because the library aborts the process on some.
"""

import hashlib
import json
import re
from codecs import getincrementaldecoder
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TypedDict

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import Json, ReadFile, files_in, parse_json
from slotmoe.model.child import PARSER, TEMPLATE

MAX_TOKENIZER_BYTES = 32 << 20  # that of GLM-4.7 has 20 MB
# gpt-oss has 200,000 tokens and 446,000 merges, which may be written as pairs.
MAX_TOKENIZER_VALUES = 1_500_000
_SPARE_IDS = 1024  # beyond the model's rows: special tokens of a fine-tuning that it never learned
MAX_TEMPLATE_BYTES = 1 << 20
MAX_SETTINGS_BYTES = 1 << 22
_WITHOUT_BOS = ("TikTokenTokenizer",)  # of Moonlight and Kimi: their text begins with no token
REPLACEMENT = "\ufffd"
_REASONING = ("reasoning_content", "thinking", "reasoning")
_GIVEN = {"messages", "tools"}  # which no other variables replace
_HERE = "\ue000 "  # ends a text that goes on; a template that keeps whitespace keeps the space
# Byte-level BPE spells a byte as itself where that is a visible character of Latin-1, and the
# others in order as the characters from 256 on.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_LEVEL = {chr(byte): byte for byte in _VISIBLE}
_BYTE_LEVEL |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*_VISIBLE}))}
BYTE_CHARACTERS = {byte: character for character, byte in _BYTE_LEVEL.items()}
# As the Coder models spell them.
FIM_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")  # noqa: RUF001
_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"))
# gpt-oss writes messages with headers that name a channel (https://github.com/openai/harmony).
CHANNEL, MESSAGE, CONSTRAIN = "<|channel|>", "<|message|>", "<|constrain|>"
_START, _END = "<|start|>", "<|end|>"
_ENDS = (_START, _END, "<|call|>", "<|return|>")  # of a message
_HARMONY = (CHANNEL, MESSAGE, CONSTRAIN, *_ENDS)
CALLED, TAKES = f"{CHANNEL}commentary to=functions.", f" {CONSTRAIN}json{MESSAGE}"
_Named = TypedDict("_Named", {"name": str, "template": str})


class _Settings(TypedDict, total=False):
    """Of ``tokenizer_config.json``, beside the special tokens."""

    chat_template: str | list[_Named] | None
    tokenizer_class: str | None
    add_bos_token: bool | None


@dataclass(frozen=True)
class ReasoningMarks:
    """The marks of one model's reasoning; ``shown`` are those that are tokens, by id.  ``header``
    begins the message behind it, and ``text`` is the rest of that header if the message is text,
    where answers are several messages."""

    begin: str
    end: str
    shown: Mapping[int, str]
    header: str = ""
    text: str = ""

    def is_begun(self, prompt: str) -> bool | None:
        """Whether a prompt has the first mark already, so that the answer begins behind it; None
        where it has the last one, so that the answer has no reasoning."""
        end = prompt.rstrip()
        if self.header:
            last = end.rpartition(_START)[2]
            return last.endswith(self.begin) or (None if MESSAGE in last else False)
        return None if end.endswith(self.end) else end.endswith(self.begin)


def reasoning_of(
    template: str | None, token_id: Callable[[str], int | None]
) -> ReasoningMarks | None:
    """The marks that ``template`` has; None for a model that answers at once."""
    for begin, end in _MARKS:
        if template is not None and end in template:
            ids = {token_id(mark): mark for mark in (begin, end)}
            return ReasoningMarks(begin, end, {id_: m for id_, m in ids.items() if id_ is not None})
    ids = {token_id(mark): mark for mark in _HARMONY}
    if template is not None and CHANNEL in template and None not in ids:
        shown = {id_: mark for id_, mark in ids.items() if id_ is not None}
        begin, text = (f"{CHANNEL}{channel}{MESSAGE}" for channel in ("analysis", "final"))
        return ReasoningMarks(begin, _END, shown, f"{_START}assistant", text)
    return None


class Splitter:
    """Takes an answer's text as it comes apart, without the whitespace around the marks.
    ``is_begun`` where the prompt has the first mark, None where all is text."""

    def __init__(self, reasoning: ReasoningMarks | None, is_begun: bool | None):
        self._marks, self._held = reasoning, ""
        has_none = reasoning is None or is_begun is None
        self._place = "text" if has_none else "thought" if is_begun else "start"
        self._trims = self.is_thinking  # until the next character that is no whitespace

    @property
    def is_thinking(self) -> bool:
        return self._place == "thought"

    def feed(self, text: str, is_last: bool = False) -> tuple[str, str]:
        """What of the reasoning and what of the answer itself ``text`` makes certain."""
        self._held += text
        thought, marks = "", self._marks
        if self._place == "start" and marks is not None:
            bare = self._held.lstrip()
            if not is_last and marks.begin.startswith(bare):
                return "", ""
            self._place = "text"
            if bare.startswith(marks.begin):
                self._place, self._trims = "thought", True
                self._held = bare[len(marks.begin) :]
        if self._place == "thought" and marks is not None:
            thought, mark, rest = self._held.partition(marks.end)
            if not mark:
                reached = 0 if is_last else overlap(thought, marks.end)
                thought = thought[: len(thought) - reached]
            thought = thought.rstrip()
            self._held = rest if mark else self._held[len(thought) :]
            thought = self._trimmed(thought)
            if mark:
                self._place, self._trims = "text", True
        if self._place != "text":
            return thought, ""
        text, self._held = self._held, ""
        return thought, self._trimmed(text)

    def _trimmed(self, text: str) -> str:
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        return text


class Messages(Splitter):
    """The same of an answer in gpt-oss's format, several messages with headers.  What they write to
    the channel ``analysis`` or to tools of their own is reasoning.  A call of a function is passed
    on as ``CALLED``, its name, ``TAKES`` and its arguments.  The rest is text.  ``is_begun`` is
    None where the prompt has the header of a text."""

    def __init__(self, is_begun: bool | None):
        super().__init__(None, None)
        self._place = "text" if is_begun is None else "thought" if is_begun else "header"
        self._begun = {self._place}

    def feed(self, text: str, is_last: bool = False) -> tuple[str, str]:
        self._held += text
        found = dict.fromkeys(("thought", "text", "call"), "")
        while self._place != "header" or MESSAGE in self._held:
            if self._place == "header":
                header, _, self._held = self._held.partition(MESSAGE)
                name = re.search(r"\bto=functions\.([^\s<]+)", header)
                is_thought = " to=" in header or f"{CHANNEL}analysis" in header
                self._place = "call" if name else "thought" if is_thought else "text"
                again = self._place in self._begun
                found[self._place] += f"{CALLED}{name[1]}{TAKES}" if name else "\n\n" * again
                self._begun.add(self._place)
            begins = [at for mark in _ENDS if (at := self._held.find(mark)) >= 0]
            reached = 0 if is_last else max(overlap(self._held, mark) for mark in _ENDS)
            end = min(begins, default=len(self._held) - reached)
            found[self._place] += self._held[:end]
            self._held = self._held[end:]
            if not begins and not is_last:
                break
            self._place, self._held = "header", self._held.partition("|>")[2]
        return found["thought"], found["text"] + found["call"]


def splitter_of(reasoning: ReasoningMarks | None, is_begun: bool | None) -> Splitter:
    """What takes the reasoning off an answer's text."""
    if reasoning is not None and reasoning.header:
        return Messages(is_begun)
    return Splitter(reasoning, is_begun)


def overlap(text: str, mark: str) -> int:
    """Characters at the end of ``text`` that are the beginning of ``mark``."""
    lengths = range(min(len(text), len(mark) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(mark[:length])), 0)


class Tokenizer:
    """``tokenizer.json``; ``size`` is the number of ids it can decode, of which a few may be beyond
    the model's ``rows``.  ``read`` gives the model's files where they are not simply those of
    ``folder``, ``verdicts`` is where it is noted which tokenizers have been parsed before, and
    ``own_template`` is the chat template where the files have none."""

    def __init__(
        self,
        folder: Path,
        bos_token_id: int | None,
        read: ReadFile | None = None,
        verdicts: Path | None = None,
        own_template: str | None = None,
        rows: int = MAX_TOKENIZER_VALUES,
    ):
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders

        read, path = read or files_in(folder), folder / "tokenizer.json"
        if (data := read(path.name, MAX_TOKENIZER_BYTES)) is None:
            raise ConfigError(f"{path}: is missing; copy the model's tokenizer.json there")
        if data.count(b",") > MAX_TOKENIZER_VALUES:
            problem = f"more than {MAX_TOKENIZER_VALUES} values; not a real tokenizer"
            raise ConfigError(f"{path}: {problem}")
        _check_parses(data, path, verdicts)
        self._backend = Backend.from_buffer(data)
        self._backend.no_truncation()  # which a file may have kept from its training
        self._backend.no_padding()
        path = folder / "tokenizer_config.json"
        if (found := read(path.name, MAX_SETTINGS_BYTES)) is None:
            found = b"{}"
        tokens, settings = parse_json(found, path, Json), parse_json(found, path, _Settings)
        path = folder / "chat_template.jinja"
        template = _template_of(settings, read(path.name, MAX_TEMPLATE_BYTES) or b"", path)
        self.template = own_template if template is None else template
        adds_bos = settings.get("tokenizer_class") not in _WITHOUT_BOS
        wants_bos = settings.get("add_bos_token", adds_bos and bos_token_id is not None)
        # The token that a text begins with, if the model wants one.
        self.begin = [bos_token_id] if wants_bos and bos_token_id is not None else []
        self.reasoning = reasoning_of(self.template, self.token_id)
        self._spellings = {"bos_token": "", "eos_token": ""}  # of special tokens, for the template
        for name, token in tokens.items():
            content = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(content, str) and content:
                self._spellings[name] = content
        self.eos_token = self._spellings["eos_token"]
        added, vocabulary = self._backend.get_added_tokens_decoder(), self._backend.get_vocab()
        self.special = {id_ for id_, token in added.items() if token.special}
        self.is_byte_level = isinstance(self._backend.decoder, decoders.ByteLevel)
        spelled = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        ids = {vocabulary[name]: name for name in spelled.keys() & vocabulary.keys()}
        self._bytes = {id_: spelled[n] for id_, n in ids.items() if self.decode([id_]) != n}
        self.token_bytes = lru_cache(1 << 16)(self._token_bytes)
        self.size = max(vocabulary.values(), default=-1) + 1
        if self.size > (most := min(rows + _SPARE_IDS, MAX_TOKENIZER_VALUES)):
            problem = f"has the token id {self.size - 1}; the model's {rows} rows allow {most - 1}"
            raise ConfigError(f"{folder / 'tokenizer.json'}: {problem}; it is of another model")
        self.unused = self.size - len({*vocabulary.values()})  # ids
        lengths = [*map(len, vocabulary)]
        # Characters of all tokens, and of the longest: none of byte-level BPE has more of a text.
        self.characters, self.longest = sum(lengths), max(lengths, default=0)

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of ``text``, after one beginning-of-sentence token if the model wants it."""
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except (UnicodeError, TypeError):  # lone surrogates, Python's way to pass on other bytes
            raise ConfigError("the prompt is not valid UTF-8 text") from None
        return self.begin + ids if add_bos and ids[:1] != self.begin else ids

    def encode_gap(self, before: str, after: str) -> list[int]:
        """Token ids that ask a Coder model for what belongs between two texts.  Raises
        ``ConfigError`` if the tokenizer has no fill-in-the-middle tokens."""
        begin, hole, end = (self.token_id(token) for token in FIM_TOKENS)
        if begin is None or hole is None or end is None:
            problem = "this model can't fill in the middle: its tokenizer has no tokens for that"
            raise ConfigError(f"{problem}; leave suffix out")
        prefix, suffix = (self.encode(text, add_bos=False) for text in (before, after))
        return [*self.begin, begin, *prefix, hole, *suffix, end]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of ``text`` without a beginning, and how many characters of it end with each
        token.  Of a character that several tokens make up, the first of them counts it."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, list(accumulate((end for _, end in encoding.offsets), max))

    def splitter(self, prompt: Sequence[int]) -> Splitter:
        """What takes the reasoning off the text of an answer to ``prompt``."""
        if self.reasoning is None:
            return Splitter(None, None)
        stream = TextStream(self)
        end = "".join(stream.push(id_) for id_ in prompt[-16:])  # the mark may be several tokens
        return splitter_of(self.reasoning, self.reasoning.is_begun(end))

    def token_id(self, token: str) -> int | None:
        """The id of the token that is spelled like this, if there is one."""
        return self._backend.token_to_id(token)

    def spelling(self, token_id: int) -> str:
        """A token as the tokenizer has it."""
        return self._backend.id_to_token(token_id)  # type: ignore[return-value]

    def _token_bytes(self, token_id: int, before: int | None = None) -> bytes:
        """The bytes that a token adds to a text, as its first or behind the token ``before``; none
        for a special one.  Bytes of part of a character, which have no text, are those of
        byte-level BPE or of a byte token like ``<0xE2>``."""
        text, byte = self.decode([token_id]), self._bytes.get(token_id)
        if byte is not None and (before is not None or REPLACEMENT in text):
            return byte
        if REPLACEMENT in text:
            spelled = self.spelling(token_id)
            if all(character in _BYTE_LEVEL for character in spelled):
                return bytes(_BYTE_LEVEL[character] for character in spelled)
        if before is None or self.is_byte_level:
            return text.encode()
        # Others write what is between two words with the second one.
        return self.decode([before, token_id])[len(self.decode([before])) :].encode()

    def to_json(self) -> str:
        """The whole tokenizer, as in ``tokenizer.json``."""
        return self._backend.to_str()

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Text of ``ids``, with ``special`` tokens or without; U+FFFD for what is no UTF-8."""
        return self._backend.decode(ids, skip_special_tokens=not special)

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: list[Json] | None = None,
        begun: bool = False,
        effort: str | None = None,
        schema: Json | None = None,
        extra: Json | None = None,
    ) -> str:
        """``messages`` through the model's chat template, ready for the assistant's answer, which
        goes on with the text of the last message if that is ``begun``; ``tools`` as templates
        expect them; an ``effort`` of "none" switches reasoning off where the template can, and any
        other on; the answer follows the JSON ``schema``, if there is one.  ``extra`` are further
        variables of the template, and go before others (``chat_template_kwargs``).  Raises
        ``ConfigError`` if there is no template, if it fails or exceeds its limits."""
        if self.template is None:
            problem = "tokenizer_config.json: has no chat_template, so this is not a chat model"
            other = "or continue text with 'slotmoe run MODEL PROMPT', without --chat"
            raise ConfigError(f"{problem}: take its Chat or Instruct version, {other}")
        if taken := _GIVEN & {*(extra or ())}:
            problem = f"chat_template_kwargs: {min(taken)} is not the template's to choose"
            raise ConfigError(f"{problem}; give it as a field of the request")
        chat = [_message(message) for message in messages]
        if begun:
            chat[-1]["content"] = f"{chat[-1].get('content', '')}{_HERE}"
        variables = {"messages": chat, "add_generation_prompt": not begun, **self._spellings}
        variables |= {"tools": tools or None, "documents": None}
        if effort is not None:  # the words of DeepSeek and Kimi, GLM, Mistral, our own, gpt-oss
            thinking = effort != "none"
            variables |= {"thinking": thinking, "enable_thinking": thinking, "effort": effort}
            variables["reasoning_effort"] = "high" if thinking else "none"
            if self.reasoning is not None and self.reasoning.header:  # which always reasons
                low = {"none": "low", "minimal": "low", "low": "low", "medium": "medium"}
                variables["reasoning_effort"] = low.get(effort, "high")
        if schema is not None:
            variables["response_format"] = schema
        request = {"template": self.template, "variables": variables | (extra or {})}
        try:
            data = json.dumps(request).encode()
        except RecursionError:
            raise ConfigError("a schema is nested too deeply for the chat template") from None
        text = TEMPLATE.run(data, "chat_template").decode()
        if not begun:
            return text
        before, mark, rest = text.rpartition(_HERE[0])
        if not mark:
            problem = "chat_template: leaves the last message out, so no answer can go on with it"
            raise ConfigError(f"{problem}; end with a message of the user")
        return before if rest.startswith(_HERE[1]) else before.rstrip()


class TextStream:
    """Turns a stream of ids into text that never ends inside a UTF-8 character; of bytes that are
    none, each is U+FFFD as soon as that is certain.  Special tokens have no text, unless they are
    marks of reasoning or ``shown`` says what."""

    def __init__(self, tokenizer: Tokenizer, shown: Mapping[int, str] | None = None):
        marks = {} if tokenizer.reasoning is None else tokenizer.reasoning.shown
        self._tokenizer, self._shown = tokenizer, {**marks, **(shown or {})}
        self._before: int | None = None
        self._characters = getincrementaldecoder("utf-8")("replace")
        self.complete = True  # no character is waiting for its last bytes

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; empty while a character is incomplete."""
        if token_id in self._shown:
            return self.flush() + self._shown[token_id]
        if token_id in self._tokenizer.special:
            return ""
        added = self._tokenizer.token_bytes(token_id, self._before)
        if not self._tokenizer.is_byte_level:
            self._before = token_id
        if self.complete and added.isascii():  # as most often
            return added.decode()
        text = self._characters.decode(added)
        self.complete = not self._characters.getstate()[0]
        return text

    def flush(self) -> str:
        """What remains at the end: an incomplete character, as U+FFFD."""
        self.complete = True
        return self._characters.decode(b"", final=True)


def _template_of(settings: _Settings, own: bytes, path: Path) -> str | None:
    """The chat template in its ``own`` file at ``path``, or else in ``tokenizer_config.json``: one,
    or the default of several named ones."""
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {item["name"]: item["template"] for item in template}.get("default")
    try:
        return own.decode() or template
    except UnicodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None


def _message(given: Mapping[str, object]) -> Json:
    """What of a message has a value, with its reasoning under the names that templates have."""
    message = {name: value for name, value in given.items() if value is not None}
    thoughts = [message[name] for name in _REASONING if name in message]
    if thoughts:
        message = {"thinking": thoughts[0], **message, "reasoning_content": thoughts[0]}
    return message


def _check_parses(data: bytes, path: Path, verdicts: Path | None) -> None:
    """Raise ``ConfigError`` unless a child process lives through parsing the tokenizer ``data``;
    the library may abort.  One that did is noted in the folder ``verdicts``."""
    from tokenizers import __version__

    key = hashlib.sha256(__version__.encode() + b" " + data).hexdigest()
    if verdicts is not None and (verdicts / key).is_file():
        return
    with closing(PARSER):  # few have a second one
        PARSER.run(data, f"{path}: the tokenizers library")
    if verdicts is not None:
        with suppress(OSError):  # only a child's time is lost
            verdicts.mkdir(parents=True, exist_ok=True)
            (verdicts / key).touch()
