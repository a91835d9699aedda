"""``tiktoken.model``: the same ids as a plain reference gives, and hostile files."""

import base64
import json
from collections import Counter
from itertools import pairwise

import pytest
import regex

from slotmoe.errors import ConfigError
from slotmoe.model import tiktoken
from slotmoe.model.checkpoint.reader import open_checkpoint, small_files
from slotmoe.model.child import Child
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload.ingest.quantize import quantize
from tests.support.tiny import SAMPLE, write_checkpoint

TEXT = (
    "It's a truth universally acknowledged: 12345 THEY'LL know; don't they?\n\n\r\n  \t x\n"
    "naïve ÉCOLE Straße mañana 中文字符和mixed中英文 ２０２６年 éé aaaaaaa bananananas "
    "\u200d👩\u200d💻 "
    "def f(x):\n    return x ** 2  # tail   \n <|im_end|>kimi <|reserved"
) * 2  # fmt: skip
# The pattern as Kimi's own code spells it, in the syntax of the regex package.
HAN = "[\\p{Han}]+"
UPPER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]"
LOWER = "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]"
END = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
START = "[^\\r\\n\\p{L}\\p{N}]?"
REST = "\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
PATTERN = f"(?V1){HAN}|{START}{UPPER}*{LOWER}+{END}|{START}{UPPER}+{LOWER}*{END}|{REST}"
SPECIAL = {"[BOS]": 0, "[EOS]": 1, "<|im_end|>": 2, "<think>": 40}


def vocabulary():
    """Every byte, and frequent pieces of the text: short ones first."""
    data = TEXT.encode()
    counts = Counter(
        data[start : start + size] for size in range(2, 7) for start in range(len(data) - size)
    )
    pieces = [piece for piece, count in counts.items() if count > 3]
    pieces.sort(key=lambda piece: (len(piece), -counts[piece], piece))
    return [bytes([byte]) for byte in range(256)] + pieces


def model_file(tokens):
    lines = (base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens))
    return b"\n".join(lines) + b"\n"


def settings(count):
    added = {str(count + id_): {"content": token} for token, id_ in SPECIAL.items()}
    added[str(count + SPECIAL["<think>"])]["special"] = False
    about = {"tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return {**about, "added_tokens_decoder": added}


def merged(piece, ranks):
    """Ids of one word: neighbours are joined, those of least rank first, the leftmost of equals."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        pairs = [(ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, index = min(pairs, default=(1 << 30, 0))
        if rank == 1 << 30:
            return [ranks[part] for part in parts]
        parts[index : index + 2] = [parts[index] + parts[index + 1]]


def reference(text, tokens):
    ranks = {token: rank for rank, token in enumerate(tokens)}
    ids = []
    for part in regex.split("(" + "|".join(map(regex.escape, SPECIAL)) + ")", text):
        if part in SPECIAL:
            ids.append(len(tokens) + SPECIAL[part])
            continue
        for word in regex.findall(PATTERN, part):
            ids += merged(word.encode(), ranks)
    return ids


@pytest.fixture(scope="module")
def tokens():
    return vocabulary()


@pytest.mark.usefixtures("processes")
def test_ids_are_those_of_a_plain_reference(tokens, tmp_path):
    source = tmp_path / "source"
    write_checkpoint(source)
    (source / "tokenizer.json").unlink()
    (source / "tiktoken.model").write_bytes(model_file(tokens))
    (source / "tokenizer_config.json").write_text(json.dumps(settings(len(tokens))))
    with open_checkpoint(source) as checkpoint:
        tokenizer = Tokenizer(source, 0, checkpoint.small_file)
    assert tokenizer.size == len(tokens) + 256
    heldout = SAMPLE.parents[1] / "tests" / "data" / "heldout"
    texts = [TEXT, *(path.read_text()[:4000] for path in sorted(heldout.glob("*.txt")))]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == reference(text, tokens)
        if "<|im_end|>" not in text:
            assert tokenizer.decode(ids) == text
    assert tokenizer.decode([len(tokens) + 2, len(tokens) + 40]) == "<think>"
    quantize(source, tmp_path / "export")
    assert not (tmp_path / "export" / "tiktoken.model").exists()
    exported = Tokenizer(tmp_path / "export", 0)
    assert exported.encode("bananas") == reference("bananas", tokens)


LONG = base64.b64encode(b"x" * 600) + b" 300"
BAD = {
    "no base64": (lambda lines: [*lines[:5], b"?? 5", *lines[6:]], "line 6"),
    "a rank is missing": (lambda lines: lines[:300] + lines[301:], "rank 300"),
    "a token twice": (lambda lines: [*lines[:300], b"QQ== 300"], "line 301"),
    "long token": (lambda lines: [*lines[:300], LONG], "600 bytes"),
}
SETTINGS = {
    "'3'": {"added_tokens_decoder": {"3": {"content": "x"}}},
    "added_tokens_decoder": {"added_tokens_decoder": []},
    "'QwenTokenizer'.*put it beside": {"tokenizer_class": "QwenTokenizer"},
}


@pytest.mark.usefixtures("processes")
def test_bad_files_and_settings_are_refused_by_name(tokens, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings(len(tokens))))
    for change, words in BAD.values():
        lines = change(model_file(tokens).splitlines())
        (tmp_path / "tiktoken.model").write_bytes(b"\n".join(lines))
        with pytest.raises(ConfigError, match=rf"tiktoken\.model.*{words}"):
            small_files(tmp_path)("tokenizer.json", 1 << 20)
    for words, changes in SETTINGS.items():
        with pytest.raises(ValueError, match=words):
            tiktoken.tokenizer_json(model_file(tokens), {**settings(len(tokens)), **changes})


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("limit", [{"seconds": 0.01}, {"memory": 1 << 20}])
def test_a_child_makes_it_within_limits(tmp_path, monkeypatch, limit):
    """Of tokens of equal bytes, which can be cut anywhere."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"x" * size for size in range(2, 500)]
    (tmp_path / "tiktoken.model").write_bytes(model_file(tokens))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings(len(tokens))))
    limits = {"seconds": 20, "memory": 512 << 20, **limit}
    monkeypatch.setattr(tiktoken, "_MAKER", Child(tiktoken._MAKER._program, **limits))
    with pytest.raises(ConfigError, match=r"tiktoken\.model: (did not finish|failed \(Memory)"):
        small_files(tmp_path)("tokenizer.json", 1 << 20)
