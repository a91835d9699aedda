"""``tiktoken.model``, the vocabulary file of Moonlight and Kimi, as a ``tokenizer.json``.

The file has a token and its rank a line.  How text is cut into words, and which ids are special,
stands in code that comes with those models; it is not run.  The pattern is one of ours, and the
special tokens are those of ``tokenizer_config.json``.  Other tokenizers are refused by name.
"""

import base64
import binascii
import json
from collections.abc import Iterator
from pathlib import Path

from slotmoe import errors
from slotmoe.jsonfile import Json
from slotmoe.model.child import Child
from slotmoe.model.tokenizer import BYTE_CHARACTERS

FILE_NAME, MAX_BYTES = "tiktoken.model", 16 << 20  # Kimi K2's has 2.8 MB
_MAX_TOKENS, _MAX_TOKEN_BYTES = 300_000, 512
_CLASS = "TikTokenTokenizer"
_RESERVED = 256  # ids behind the vocabulary; those without a name of their own are reserved
PATTERNS: dict[str, list[str]] = json.loads(
    Path(__file__).with_name("pretokenizers.json").read_bytes()
)
"""Patterns that split text one after the other, as the ``tokenizer.json`` of their publishers has
them, by the pre-tokenizer's name in GGUF files: DeepSeek-V2 and its Coder models have the first."""


def splitting(pattern: str) -> Json:
    """A step of a ``tokenizer.json`` that cuts text where a ``pattern`` matches."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def made_by_child(model: bytes, settings: Json, path: Path) -> bytes:
    """``tokenizer_json`` of the file ``path``, within limits.  Raises ``ConfigError``."""
    made = _MAKER.run(json.dumps(settings).encode() + b"\n" + model, str(path))
    _MAKER.close()  # few have a second one
    return made


_MAKER = Child(
    f"""
sys.path.append({str(Path(errors.__file__).parents[1])!r})
from slotmoe.model.tiktoken import tokenizer_json
def answer(data):
    limit()
    settings, _, model = data.partition(b"\\n")
    return tokenizer_json(model, json.loads(settings))
""",
    seconds=20,
    memory=512 << 20,
)


def tokenizer_json(model: bytes, settings: Json) -> bytes:
    """The ``tokenizer.json`` of a ``tiktoken.model`` with these ``settings``, the content of
    ``tokenizer_config.json``.  Raises ``ValueError`` for others than Moonlight's and Kimi's."""
    if settings.get("tokenizer_class") != _CLASS:
        problem = f"tokenizer_class is {settings.get('tokenizer_class')!r:.60}, expected {_CLASS!r}"
        raise ValueError(f"{problem}; make a tokenizer.json of it and put it beside the checkpoint")
    ranks = _ranks(model)
    spelled = {token: "".join(BYTE_CHARACTERS[byte] for byte in token) for token in ranks}
    (pattern,) = PATTERNS["kimi-k2"]
    byte_level: Json = {"type": "ByteLevel"}
    byte_level |= dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), False)
    off = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    tokenizer = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding")),
        "added_tokens": _added_tokens(settings, len(ranks)),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [splitting(pattern), byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            **dict.fromkeys(off),
            **{"fuse_unk": False, "byte_fallback": False, "ignore_merges": True},
            "vocab": {spelled[token]: rank for token, rank in ranks.items()},
            "merges": [f"{spelled[left]} {spelled[right]}" for left, right in _merges(ranks)],
        },
    }
    return json.dumps(tokenizer, ensure_ascii=False).encode()


def _ranks(model: bytes) -> dict[bytes, int]:
    """Tokens and their ranks, in order.  Raises ``ValueError``."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(model.splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        try:
            token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        except (binascii.Error, ValueError, IndexError):
            raise ValueError(f"line {number} is not a token in base64 and its rank") from None
        if rank != len(ranks) or token in ranks or not 0 < len(token) <= _MAX_TOKEN_BYTES:
            expected = f"expected a new token of rank {len(ranks)}"
            raise ValueError(f"line {number} has {len(token)} bytes and rank {rank}, {expected}")
        ranks[token] = rank
        if len(ranks) > _MAX_TOKENS:
            raise ValueError(f"more than {_MAX_TOKENS} tokens; not a real vocabulary")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"has no token for the byte {missing[0]}, so it can't spell every text")
    return ranks


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The two tokens that become a third one: what merges inside of it leave, in the order of their
    ranks.  No text has others side by side.  Where they leave more, only a whole word is it."""
    none = len(ranks)
    for token in ranks:
        cuts = [*range(len(token) + 1)]
        order = [ranks.get(token[cut : cut + 2], none) for cut in cuts[:-2]]  # of parts joined
        while len(order) > 1 and (least := min(order)) < none:
            index = order.index(least)
            del order[index], cuts[index + 1]
            for other in range(max(0, index - 1), min(index + 1, len(order))):
                order[other] = ranks.get(token[cuts[other] : cuts[other + 2]], none)
        if len(order) == 1:
            yield token[: cuts[1]], token[cuts[1] :]


def _added_tokens(settings: Json, first: int) -> list[Json]:
    """The special tokens from id ``first`` on.  Raises ``ValueError``."""
    given = settings.get("added_tokens_decoder", {})
    if not isinstance(given, dict):
        raise ValueError(f"added_tokens_decoder is {given!r:.60}, expected an object")
    named, ids = dict[int, Json](), range(first, first + _RESERVED)
    for key, about in given.items():
        content = about.get("content") if isinstance(about, dict) else None
        fits = key.isascii() and key.isdigit() and len(key) < 10 and int(key) in ids
        if not fits or not isinstance(content, str) or not content:
            expected = f"expected a text under an id from {first} to {ids[-1]}"
            raise ValueError(f"added_tokens_decoder has {key!r:.40}: {about!r:.60}, {expected}")
        named[int(key)] = {"content": content, "special": about.get("special", True) is True}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    reserved = {id_: {"content": f"<|reserved_token_{id_}|>", "special": True} for id_ in ids}
    return [{"id": id_, **plain, **about} for id_, about in (reserved | named).items()]
