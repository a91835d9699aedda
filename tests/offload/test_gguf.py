"""A GGUF file becomes the export that the checkpoint becomes which it was made of."""

import json

import pytest

from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.offload.ingest.quantize import quantize
from tests.support.disk import tree
from tests.support.gguf import write_gguf
from tests.support.tiny import write_checkpoint

PROMPT = "It is a truth universally acknowledged, that a"
# Each row has whole blocks of 32 weights.
SIZES = {"moe_intermediate_size": 64, "q_lora_rank": 32, "qk_nope_head_dim": 32}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder, **SIZES)
    quantize(folder, folder / "export")
    return folder


def test_parts_give_the_same_export(source, tmp_path, monkeypatch):
    """But for norms and gates, which are float32 in a GGUF file, it is the checkpoint's."""
    whole = write_gguf(source, tmp_path / "whole.gguf")
    parts = write_gguf(source, tmp_path / "parts.gguf", shards=3)
    for path in (whole, parts):
        quantize(path, tmp_path / path.name[:5])
    made, wanted, ours = (tree(tmp_path / name) for name in ("parts", "whole", source / "export"))
    manifests = [json.loads(files.pop("slotmoe.json")) for files in (made, wanted)]
    assert made == wanted
    assert all(made[name] == ours[name] for name in ours if name.startswith("experts"))
    assert manifests[0]["source"]["name"] == parts.name
    assert len([n for n in manifests[0]["source"]["files"] if n.endswith(".gguf")]) == 3
    monkeypatch.setattr("slotmoe.model.checkpoint.reader._PIECE", 3000)
    with open_checkpoint(parts) as checkpoint:
        assert checkpoint.weights(print) == manifests[0]["source"]["weights"]


def test_commands(source, tmp_path, slotmoe, monkeypatch, processes):
    """Commands take the file as MODEL; it is quantized once."""
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path / "cache"))
    model, options = write_gguf(source, tmp_path / "x.gguf"), ["-n", "8", "--ram", "4GiB"]
    code, text, _ = slotmoe("run", model, PROMPT, *options)
    assert (code, text) == slotmoe("run", source / "export", PROMPT, *options)[:2]
    monkeypatch.setattr("slotmoe.offload.ingest.cached.quantize", None)
    assert slotmoe("run", model, "--chat", "hi", *options)[0] == 0
    code, text, _ = slotmoe("plan", model, "--json")
    assert (code, json.loads(text)["fits"]) == (0, True)
