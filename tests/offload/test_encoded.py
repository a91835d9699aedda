"""Exports of checkpoints with quantized weights or fused experts are those of the same weights in
plain tensors, from a folder and from the hub."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from slotmoe.errors import CheckpointError
from slotmoe.model.checkpoint import Checkpoint
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.layout import MANIFEST
from tests.support.disk import tree
from tests.support.encoded import FP8, encode, fuse, packed, write_files
from tests.support.hub import NAME, Repo, make
from tests.support.tiny import write_checkpoint

V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_size": 160,
    "moe_intermediate_size": 64,
}
SOURCES = {
    "fp8": lambda folder: encode(folder, FP8),
    "int4": lambda folder: encode(folder, packed()),
    "fused": fuse,
}


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny"
    write_checkpoint(folder, **V3)
    SOURCES[request.param](folder)
    return folder


def weights_of(export):
    """Every file but those that name the source."""
    return {n: data for n, data in tree(export).items() if n not in ("config.json", MANIFEST)}


@pytest.mark.parametrize("resident", ["bf16", "int8"])
def test_export_is_that_of_the_decoded_weights(source, resident, tmp_path, slotmoe):
    plain = tmp_path / "plain"
    shutil.copytree(source, plain)
    with Checkpoint.open(source) as checkpoint:
        tensors = {name: checkpoint.tensor(name) for name in checkpoint.infos}
    for path in [*plain.glob("*.safetensors"), plain / "model.safetensors.index.json"]:
        path.unlink()
    save_file(tensors, plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config.pop("quantization_config", None)
    (plain / "config.json").write_text(json.dumps(config))
    for folder in (source, plain):
        options = ("--resident", resident, "--json")
        code, _out, problem = slotmoe("quantize", folder, tmp_path / f"{folder.name}-e", *options)
        assert code == 0, problem
    assert weights_of(tmp_path / "tiny-e") == weights_of(tmp_path / "plain-e")
    code, _out, problem = slotmoe("run", tmp_path / "tiny-e", "A", "-n", 2, "--context", 16)
    assert code == 0, problem
    logits = []
    for folder in (source, plain):
        with Runtime.open(folder, context=64, quantize=False) as runtime:
            logits.append(runtime.logits(list(range(5, 15))))
    assert torch.equal(*logits)


@pytest.mark.parametrize("settings", [FP8, packed()], ids=["fp8", "int4"])
def test_scales_may_be_in_another_file_than_their_codes(hub, settings, tmp_path):
    """From the hub weight files come one after the other, and the first is gone by then."""
    folder = tmp_path / "tiny"
    write_checkpoint(folder, **V3)
    encode(folder, settings, scales_apart=True)
    quantize(folder, tmp_path / "local")
    hub.add(NAME, Repo(folder))
    make(tmp_path / "export")
    assert weights_of(tmp_path / "export") == weights_of(tmp_path / "local")


def test_bad_scales_leave_no_export(tmp_path):
    write_checkpoint(tmp_path / "tiny", **V3)
    tensors = encode(tmp_path / "tiny", FP8)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    tensors[name + "_scale_inv"][1, 0] = torch.inf
    write_files(tmp_path / "tiny", {"model-1.safetensors": tensors})
    with pytest.raises(CheckpointError, match=f"the scales of {name} are NaN or infinite"):
        quantize(tmp_path / "tiny", tmp_path / "export")
    assert not (tmp_path / "export").exists()
