"""The tokenizer in the metadata of a GGUF file, as the tokenizers library reads it.

GGUF names the pre-tokenizer, which splits text before merges are applied, and does not hold it.  So
the patterns of the DeepSeek-V2 family stand here, as DeepSeek's own ``tokenizer.json`` has them.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from slotmoe.jsonfile import Json, typed

_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_MARKS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_SPLITS = {
    "deepseek-llm": ("[\r\n]", f"\\s?[{_LETTERS}]+", f"\\s?[{_MARKS}]+", "\\s+$", _EAST_ASIAN),
    "deepseek-coder": ("[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", _EAST_ASIAN),
    "gpt-2": (),  # the pattern is the byte-level step's own
}
"""Patterns that split text one after the other, by the pre-tokenizer's name.  DeepSeek-V2 and its
Coder models have the first; both of DeepSeek's split single digits after them."""
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_PREFIX = "tokenizer.ggml."
_OfEach = Meta(min_length=1, max_length=400_000)


class Tokenizer(Struct):
    model: Literal["gpt2"]  # byte-level BPE
    pre: Literal["deepseek-llm", "deepseek-coder", "gpt-2"]
    tokens: Annotated[list[str], _OfEach]
    token_type: Annotated[list[Annotated[int, Meta(ge=0, le=6)]], _OfEach]
    merges: Annotated[list[str], _OfEach]
    bos_token_id: int
    eos_token_id: int
    eot_token_id: int | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    chat_template: str | None = None

    @property
    def ends(self) -> list[int]:
        """The tokens at which a text ends, and a turn, if that differs."""
        turn = self.eos_token_id if self.eot_token_id is None else self.eot_token_id
        return list(dict.fromkeys((self.eos_token_id, turn)))


def read_tokenizer(metadata: Json) -> Tokenizer:
    """The tokenizer, checked.  Raises ``ValueError``, naming the key."""
    behind = {name: value for name, value in metadata.items() if name.startswith(_PREFIX)}
    given = {name.removeprefix(_PREFIX): value for name, value in behind.items()}
    given["chat_template"] = metadata.get("tokenizer.chat_template")
    found = typed(given, Tokenizer, _PREFIX[:-1])
    count, types = len(found.tokens), len(found.token_type)
    if types != count:
        raise ValueError(f"{_PREFIX}token_type has {types} values for {count} tokens")
    for name in ("bos_token_id", "eos_token_id", "eot_token_id"):
        index: int | None = getattr(found, name)
        if index is not None and not 0 <= index < count:
            raise ValueError(f"{_PREFIX}{name} is {index}, expected 0 to {count - 1}")
    return found


def tokenizer_files(found: Tokenizer) -> dict[str, Json]:
    """``tokenizer.json`` and ``tokenizer_config.json``.  Raises ``ValueError``, naming the key."""
    names, types = found.tokens, found.token_type
    # Rows beyond the tokenizer, which some converters declare as tokens of the user's.
    tokens = {
        name: index
        for index, (name, kind) in enumerate(zip(names, types, strict=True))
        if kind != _UNUSED and name != f"[PAD{index}]"
    }
    added = [
        {"id": index, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": types[index] == _CONTROL}
        for name, index in tokens.items()
        if types[index] in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    split = _SPLITS[found.pre]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps: list[Json] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in split
    ]
    steps += [{"type": "Digits", "individual_digits": True}] if split else []
    steps += [{**byte_level, "use_regex": not split}]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {**byte_level, "use_regex": True},
        "model": {"type": "BPE", "vocab": tokens, "merges": _merges(found.merges, tokens)},
    }
    settings: Json = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"bos_token": names[found.bos_token_id], "eos_token": names[found.eos_token_id]}
    for key in ("add_bos_token", "add_eos_token", "chat_template"):
        if (value := getattr(found, key)) is not None:
            settings[key] = value
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def _merges(merges: list[str], tokens: dict[str, int]) -> list[str]:
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= tokens.keys():
            raise ValueError(f"{_PREFIX}merges[{number}] is {merge!r:.80}, not two tokens of it")
    return merges
