"""Text to token ids and back.

A tokenizer comes from a stranger: one that is new here is parsed by a child process first, because
the library aborts the process on some.
"""

import hashlib
from codecs import getincrementaldecoder
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TypedDict

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import Json, ReadFile, files_in, parse_json
from slotmoe.model.child import PARSER
from slotmoe.model.reasoning import Splitter, reasoning_of, splitter_of

MAX_TOKENIZER_BYTES = 32 << 20  # that of GLM-4.7 has 20 MB
# gpt-oss has 200,000 tokens and 446,000 merges, which may be written as pairs.
MAX_TOKENIZER_VALUES = 1_500_000
_SPARE_IDS = 1024  # beyond the model's rows: special tokens of a fine-tuning that it never learned
MAX_TEMPLATE_BYTES = 1 << 20
MAX_SETTINGS_BYTES = 1 << 22
_WITHOUT_BOS = ("TikTokenTokenizer",)  # of Moonlight and Kimi: their text begins with no token
REPLACEMENT = "\ufffd"
# Byte-level BPE spells a byte as itself where that is a visible character of Latin-1, and the
# others in order as the characters from 256 on.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_LEVEL = {chr(byte): byte for byte in _VISIBLE}
_BYTE_LEVEL |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*_VISIBLE}))}
BYTE_CHARACTERS = {byte: character for character, byte in _BYTE_LEVEL.items()}
# As the Coder models spell them.
FIM_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")  # noqa: RUF001
_Named = TypedDict("_Named", {"name": str, "template": str})


class _Settings(TypedDict, total=False):
    """Of ``tokenizer_config.json``, beside the special tokens."""

    chat_template: str | list[_Named] | None
    tokenizer_class: str | None
    add_bos_token: bool | None


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
        self.spellings = {"bos_token": "", "eos_token": ""}  # of special tokens, for the template
        for name, token in tokens.items():
            content = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(content, str) and content:
                self.spellings[name] = content
        self.eos_token = self.spellings["eos_token"]
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
