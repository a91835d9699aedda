"""``slotmoe eval``: figures token by token, exact token and byte counts, windows, and bad input."""

import json
import math
import shutil
import signal
from itertools import product
from pathlib import Path

import pytest
import torch

from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from tests.support.params import nth
from tests.support.tiny import write_checkpoint

TEXT = "One — two, naïve “three” 漢字 and 🙂🙂 four; " * 5


@pytest.fixture
def evaluate(slotmoe):
    """Run ``slotmoe eval`` in this process: exit code, the JSON object or stdout, stderr."""

    def run(*arguments):
        code, out, err = slotmoe("eval", *arguments)
        return code, json.loads(out) if "--json" in arguments and out else out, err

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model: checkpoint, export, and both with a tokenizer that puts nothing in front."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder / "checkpoint")
    quantize(folder / "checkpoint", folder / "export")
    shutil.copytree(folder / "checkpoint", folder / "plain")
    path = folder / "plain" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": False}))
    quantize(folder / "plain", folder / "plain-export")
    (folder / "text").write_text(TEXT, encoding="utf-8")
    return folder


CASES = list(product(["export", "plain-export"], [None, 7, 1]))


@pytest.mark.parametrize(("name", "stride"), nth(4, CASES))
def test_every_token_is_scored_once_in_its_window(name, stride, model, evaluate, heavy):
    window, step = 20, stride or 19
    arguments = ["--window", window, *(["--stride", stride] if stride else [])]
    report = evaluate(model / name, "--text", model / "text", *arguments, "--json")[1]
    with Runtime.open(model / name, context=32) as runtime:
        ids, begin = runtime.tokenizer.encode(TEXT, add_bos=False), [0] if name == "export" else []
        room, first = window - len(begin), 1 - len(begin)
        # The first window that reaches a token scores it.
        scored = [(t, max(0, -(-(t + 1 - room) // step)) * step) for t in range(first, len(ids))]
        nll = 0.0
        for token, start in scored:
            logits = runtime.logits(begin + ids[start:token])[-1]
            nll -= logits.double().log_softmax(-1)[ids[token]].item()
        unscored = len(runtime.tokenizer.decode(ids[:first]).encode())
    assert report["tokens"] == len(ids) - first
    assert report["bytes"] == len(TEXT.encode()) - unscored
    assert report["bits_per_byte"] * report["bytes"] * math.log(2) == pytest.approx(nll, rel=1e-6)


@pytest.mark.parametrize("window", [3, 16, 33])
@pytest.mark.parametrize("name", ["export", "plain-export"])
def test_method_of_llama_cpp(name, window, model, evaluate):
    """Written down from its perplexity tool: pieces of all tokens, the second half of each
    scored."""
    method = "--method", "llama.cpp", "--window", window, "--json"
    report = evaluate(model / name, "--text", model / "text", *method)[1]
    nll = count = 0
    with Runtime.open(model / name, context=64) as runtime:
        tokens = runtime.tokenizer.encode(TEXT)
        for chunk in range(len(tokens) // window):
            piece = tokens[chunk * window : (chunk + 1) * window]
            if name == "export":
                piece[0] = 0
            logs = runtime.logits(piece).double().log_softmax(-1)
            for j in range(window // 2, window - 1):
                nll -= logs[j, piece[j + 1]].item()
                count += 1
    assert report["tokens"] == count
    assert report["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-6)


@pytest.mark.parametrize("first", nth(3, [0, 1, 127, 512, 128, 511, 699]))
def test_logits_from_are_the_rows_of_logits(first, sample_export):
    ids = [(7 * i) % 4096 for i in range(700)]
    with Runtime.open(sample_export, context=700) as runtime:
        wanted = runtime.logits(ids)[first:]
        pieces = list(runtime.logits_from(ids, first))
        assert max(map(len, pieces)) <= 128
        assert torch.equal(torch.cat(pieces), wanted)


def test_several_texts_and_an_export_as_reference(model, evaluate, tmp_path):
    (tmp_path / "other").write_text("Something else.\n" * 5)
    arguments = ["--text", model / "text", "--text", tmp_path / "other", "--json"]
    report = evaluate(model / "export", *arguments, "--reference", model / "export")[1]
    assert [Path(one["file"]).name for one in report["files"]] == ["text", "other"]
    assert report["tokens"] == sum(one["tokens"] for one in report["files"])
    assert report["bytes"] == sum(one["bytes"] for one in report["files"])
    assert (report["kl_divergence"], report["top1_agreement"]) == (0, 1)
    assert report["bits_per_byte"] == report["reference_bits_per_byte"]
    alone = evaluate(model / "export", *arguments)[1]
    assert alone["bits_per_byte"] == report["bits_per_byte"]
    assert not {"kl_divergence", "worst_tokens"} & set(alone)


def test_divergence_of_models_that_have_little_in_common(model, evaluate, tmp_path):
    """So much that its direction shows, token by token."""
    write_checkpoint(tmp_path / "other", seed=1)
    arguments = ["--text", model / "text", "--window", 50, "--worst", 7, "--json"]
    report = evaluate(model / "export", *arguments, "--reference", tmp_path / "other")[1]
    with (
        Runtime.open(model / "export", context=64) as runtime,
        Runtime.open(tmp_path / "other", quantize=False, context=64) as other,
    ):
        ids, decode = runtime.tokenizer.encode(TEXT, add_bos=False), runtime.tokenizer.decode
        pieces = [[0, *ids[start : start + 49]] for start in range(0, len(ids), 49)]
        q, p = (
            torch.cat([one.logits(piece)[:-1] for piece in pieces]).double().softmax(-1)
            for one in (runtime, other)
        )
    kl = (p * (p / q).log()).sum(-1)
    assert report["kl_divergence"] == pytest.approx(kl.mean().item(), rel=1e-6)
    other_way = (q * (q / p).log()).sum(-1).mean().item()
    assert report["kl_divergence"] != pytest.approx(other_way, rel=1e-3)
    assert report["top1_agreement"] == (q.argmax(-1) == p.argmax(-1)).double().mean().item()
    assert [one["position"] for one in report["worst_tokens"]] == kl.topk(7).indices.tolist()
    for one in report["worst_tokens"]:
        at = one["position"]
        assert one["kl_divergence"] == pytest.approx(kl[at].item(), rel=1e-6)
        assert one["token"] == decode([ids[at]])
        assert one["context"] == decode(ids[max(0, at - 16) : at])
        assert one["reference_probability"] == pytest.approx(p[at, ids[at]].item(), rel=1e-4)
        assert one["reference_top"] == decode([int(p[at].argmax())])


BAD = {
    "no-text": ("", "--text"),
    "missing": ("--text nowhere", "'nowhere' does not exist"),
    "empty": ("--text EMPTY", "is empty"),
    "no-utf8": ("--text LATIN", "byte 3 is not UTF-8"),
    "window-beyond-model": ("--text TEXT --window 257", "is beyond 256, the model's max_position"),
    "window-tiny": ("--text TEXT --window 1", "--window is 1"),
    "stride-zero": ("--text TEXT --stride 0", "--stride is 0"),
    "llama-stride": ("--text TEXT --method llama.cpp --stride 8", "--method strided"),
    "llama-short": ("--text TWO --method llama.cpp --window 64", "less than one window of 64"),
    "reference-rows": ("--text TEXT --reference ROWS", "has 4224 vocabulary rows"),
    "reference-tokenizer": ("--text TEXT --reference OTHER", "as other tokens"),
    "reference-too-large": ("--text TEXT --reference CHECKPOINT --ram 1MiB", "give that export as"),
    "worst-negative": ("--text TEXT --worst -1", "-1"),
}


@pytest.fixture(scope="module")
def places(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    write_checkpoint(folder / "rows", vocab_size=4224)
    shutil.copytree(model / "checkpoint", folder / "other")
    tokenizer = json.loads((folder / "other" / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (folder / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    contents = {"empty": b"", "latin": b"caf\xe9 au lait", "two": b"Hello there"}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    own = {name.upper(): folder / name for name in ("rows", "other", *contents)}
    return own | {name.upper(): model / name for name in ("text", "checkpoint")}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name, model, places, evaluate, processes):
    arguments, wanted = BAD[name]
    arguments = [places.get(one, one) for one in arguments.split()]
    code, out, err = evaluate(model / "export", *arguments)
    assert (code, out) == (2, "")
    assert wanted in err
    assert "Traceback" not in err
    assert err.startswith("Usage: ") or (err.startswith("slotmoe: ") and err.count("\n") == 1)


@pytest.mark.parametrize("as_json", [False, True])
def test_interrupted_evaluation_tells_what_it_has(as_json, model, evaluate, monkeypatch):
    original, calls = Runtime.logits_from, []

    def logits_from(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Runtime, "logits_from", logits_from)
    options = ["--window", 20, *(["--json"] if as_json else [])]
    code, out, err = evaluate(model / "export", "--text", model / "text", *options)
    assert (code, out) == (130, "")
    assert "interrupted" in err
    assert ("so far" in err and " 57 " in err) != as_json  # three windows of 19
