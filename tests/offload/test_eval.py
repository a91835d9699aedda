"""``slotmoe eval``: figures token by token, exact token and byte counts, windows, and bad input."""

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch

from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from tests.support.hostile import edit_json
from tests.support.tiny import write_checkpoint

TEXT = "One — two, naïve “three” 漢字 and 🙂🙂 four; " * 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model: checkpoint, export, and both with a tokenizer that puts nothing in front; and
    what is no text or no reference of it."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder / "checkpoint")
    quantize(folder / "checkpoint", folder / "export")
    shutil.copytree(folder / "checkpoint", folder / "plain")
    edit_json(folder / "plain/tokenizer_config.json", lambda it: it.update(add_bos_token=False))
    quantize(folder / "plain", folder / "plain-export")
    (folder / "text").write_text(TEXT, encoding="utf-8")
    write_checkpoint(folder / "rows", vocab_size=4224)
    shutil.copytree(folder / "checkpoint", folder / "other")
    fewer = lambda it: it["model"].update(merges=it["model"]["merges"][:100])  # noqa: E731
    edit_json(folder / "other" / "tokenizer.json", fewer)
    for name, data in {"empty": b"", "latin": b"caf\xe9 au lait", "two": b"Hello there"}.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def evaluate(slotmoe, model, monkeypatch):
    """The report of ``slotmoe eval --json`` of an export on the text."""
    monkeypatch.chdir(model)

    def run(name, *arguments):
        code, out, err = slotmoe("eval", name, "--text", "text", *arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.mark.parametrize(("name", "stride"), [("export", None), ("plain-export", 7)])
def test_every_token_is_scored_once_in_its_window(name, stride, evaluate, heavy):
    window, step = 20, stride or 19
    report = evaluate(name, "--window", window, *(["--stride", stride] if stride else []))
    with Runtime.open(name, context=32) as runtime:
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


def test_several_texts_and_an_export_as_reference(evaluate):
    report = evaluate("export", "--text", "two", "--reference", "export")
    assert [Path(file["file"]).name for file in report["files"]] == ["text", "two"]
    assert report["tokens"] == sum(file["tokens"] for file in report["files"])
    assert report["bytes"] == sum(file["bytes"] for file in report["files"])
    assert (report["kl_divergence"], report["top1_agreement"]) == (0, 1)
    assert report["bits_per_byte"] == report["reference_bits_per_byte"]


def test_divergence_of_models_that_have_little_in_common(evaluate, tmp_path):
    """So much that its direction shows."""
    write_checkpoint(tmp_path / "other", seed=1)
    report = evaluate("export", "--window", 50, "--reference", tmp_path / "other")
    with (
        Runtime.open("export", context=64) as runtime,
        Runtime.open(tmp_path / "other", quantize=False, context=64) as other,
    ):
        ids = runtime.tokenizer.encode(TEXT, add_bos=False)
        pieces = [[0, *ids[start : start + 49]] for start in range(0, len(ids), 49)]
        q, p = (
            torch.cat([it.logits(piece)[:-1] for piece in pieces]).double().softmax(-1)
            for it in (runtime, other)
        )
    kl = (p * (p / q).log()).sum(-1)
    assert report["kl_divergence"] == pytest.approx(kl.mean().item(), rel=1e-6)
    assert report["top1_agreement"] == (q.argmax(-1) == p.argmax(-1)).double().mean().item()


REFUSED = {
    "--text empty": "is empty",
    "--text latin": "byte 3 is not UTF-8",
    "--text text --window 257": "is beyond 256, the model's max_position",
    "--text text --reference rows": "has 4224 vocabulary rows",
    "--text text --reference other": "as other tokens",
    "--text text --reference checkpoint --ram 1MiB": "give that export as",
}


@pytest.mark.usefixtures("processes")
def test_bad_input_is_one_line_and_exit_code_2(slotmoe, model, monkeypatch):
    monkeypatch.chdir(model)
    monkeypatch.setenv("SLOTMOE_CACHE", str(model / "cache"))
    for line, wanted in REFUSED.items():
        code, out, err = slotmoe("eval", "export", *line.split())
        assert (code, out) == (2, ""), line
        assert wanted in err and "Traceback" not in err, err
        assert err.startswith("Usage: ") or (err.startswith("slotmoe: ") and err.count("\n") == 1)


def test_interrupted_evaluation_tells_what_it_has(model, slotmoe, monkeypatch):
    original, calls = Runtime.logits_from, []

    def logits_from(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Runtime, "logits_from", logits_from)
    given = model / "export", "--text", model / "text", "--window", 20
    code, out, err = slotmoe("eval", *given)
    assert (code, out) == (130, "")
    assert "interrupted" in err and "so far" in err and " 57 " in err  # three windows of 19
