"""A GGUF file becomes the export that the checkpoint becomes which it was made of."""

import json

import pytest
import torch

from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.names import resident_shapes
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.model_source import read_model
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.layout import layer_file
from slotmoe.quant.export.reader import Export
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


@pytest.fixture(scope="module")
def files(source, tmp_path_factory, processes):
    """The checkpoint as GGUF files, by ggml's type."""
    folder = tmp_path_factory.mktemp("files")
    return {kind: write_gguf(source, folder / f"{kind}.gguf", kind) for kind in ("BF16", "F32")}


@pytest.fixture(scope="module")
def exports(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    for kind in ("BF16", "F32"):
        quantize(files[kind], folder / kind)
    return folder


def dense(weight):
    return weight.float() if isinstance(weight, torch.Tensor) else weight.dequantize()


@pytest.mark.parametrize("kind", ["BF16", "F32"])
def test_exact_encodings_give_the_same_weights_and_logits(kind, exports, source, processes):
    """Norms and gates are float32 in a GGUF file, so their bytes differ and their values do not."""
    for name in map(layer_file, (1, 2)):
        assert (exports / kind / name).read_bytes() == (source / "export" / name).read_bytes()
    with Export.open(exports / kind) as made, Export.open(source / "export") as ours:
        config, _ = read_model(source / "export")
        for name in resident_shapes(config):
            assert torch.equal(dense(made.resident(name)), dense(ours.resident(name))), name
    with Runtime.open(exports / kind) as made, Runtime.open(source / "export") as ours:
        ids = ours.tokenizer.encode(PROMPT)
        assert made.tokenizer.encode(PROMPT) == ids
        assert torch.equal(made.logits(ids), ours.logits(ids))
        texts = ["".join(t.text for t in r.generate(PROMPT, 8)) for r in (made, ours)]
        assert texts[0] == texts[1]
        assert made.eos_token_ids == ours.eos_token_ids


def test_parts_give_the_same_export(exports, source, tmp_path, monkeypatch):
    parts = write_gguf(source, tmp_path / "parts.gguf", shards=3)
    quantize(parts, tmp_path / "made")
    made, wanted = tree(tmp_path / "made"), tree(exports / "BF16")
    manifests = [json.loads(files.pop("slotmoe.json")) for files in (made, wanted)]
    assert made == wanted
    assert manifests[0]["source"]["name"] == parts.name
    assert len([n for n in manifests[0]["source"]["files"] if n.endswith(".gguf")]) == 3
    monkeypatch.setattr("slotmoe.model.checkpoint.reader._PIECE", 3000)
    with open_checkpoint(parts) as checkpoint:
        assert checkpoint.weights(print) == manifests[0]["source"]["weights"]


def test_commands(files, source, tmp_path, slotmoe, monkeypatch, processes):
    """Commands take the file as MODEL; it is quantized once."""
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path / "cache"))
    model, options = files["BF16"], ["-n", "8", "--ram", "4GiB"]
    code, text, _ = slotmoe("run", model, PROMPT, *options)
    assert (code, text) == slotmoe("run", source / "export", PROMPT, *options)[:2]
    monkeypatch.setattr("slotmoe.offload.ingest.cached.quantize", None)
    assert slotmoe("run", model, "--chat", "hi", *options)[0] == 0
    code, text, _ = slotmoe("plan", model, "--json")
    assert (code, json.loads(text)["fits"]) == (0, True)
