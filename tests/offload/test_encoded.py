"""Exports of checkpoints with quantized weights or fused experts are those of the same weights in
plain tensors, from a folder and from the hub."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from slotmoe.errors import CheckpointError
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.names import expert_name
from slotmoe.offload.ingest import synth
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.codecs.codec import EXPERT_CODECS
from slotmoe.quant.export.layout import MANIFEST, PROJECTIONS
from slotmoe.quant.export.reader import Export
from tests.support.disk import tree
from tests.support.encoded import (
    FP4,
    FP8,
    WHOLE_BLOCKS,
    as_v4_spells,
    bitsandbytes,
    decoded_int4,
    decoded_mxfp4,
    encode,
    fuse,
    packed,
    same_bits,
    write_files,
)
from tests.support.hub import NAME, Repo, make
from tests.support.kernels import relative
from tests.support.tiny import write_checkpoint

V3 = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
V3 |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
V3 |= {"hidden_size": 160, "moe_intermediate_size": 64}
IDS = list(range(5, 15))
SOURCES = {
    "fp8": lambda folder: encode(folder, FP8),
    "int4": lambda folder: encode(folder, packed()),
    "fp4": lambda folder: encode(folder, FP4),
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
def test_export_is_that_of_the_decoded_weights(source, resident, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(source, plain)
    with open_checkpoint(source) as checkpoint:
        tensors = {name: checkpoint.tensor(name) for name in checkpoint.infos}
    for path in [*plain.glob("*.safetensors"), plain / "model.safetensors.index.json"]:
        path.unlink()
    save_file(tensors, plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config.pop("quantization_config", None)
    (plain / "config.json").write_text(json.dumps(config))
    for folder in (source, plain):
        options = {"resident": resident, "codecs": EXPERT_CODECS["nf4", "4"]}
        quantize(folder, tmp_path / f"{folder.name}-e", **options)
    assert weights_of(tmp_path / "tiny-e") == weights_of(tmp_path / "plain-e")
    logits = []
    for folder in (source, plain):
        with Runtime.open(folder, context=64, quantize=False) as runtime:
            logits.append(runtime.logits(IDS))
    assert torch.equal(*logits)


@pytest.mark.parametrize("settings", [FP8, packed(), FP4], ids=["fp8", "int4", "fp4"])
def test_scales_may_be_in_another_file_than_their_codes(hub, settings, tmp_path):
    """From the hub weight files come one after the other, and the first is gone by then."""
    folder = tmp_path / "tiny"
    write_checkpoint(folder, **V3)
    encode(folder, settings, scales_apart=True)
    quantize(folder, tmp_path / "local")
    hub.add(NAME, Repo(folder))
    make(tmp_path / "export")
    assert weights_of(tmp_path / "export") == weights_of(tmp_path / "local")


def values_of(stored, name):
    return decoded_int4(stored[name + "_packed"], stored[name + "_scale"])


def test_weights_that_were_trained_in_4_bits_are_kept(tmp_path):
    """Exactly, unless other codes are asked for; not where an expert is in 16 bits."""
    folder = tmp_path / "tiny"
    write_checkpoint(folder, **V3)
    stored = encode(folder, packed())
    quantize(folder, tmp_path / "export")
    with Export.open(tmp_path / "export") as export, open_checkpoint(folder) as checkpoint:
        for layer in export.layers:
            for projection, found in export.expert(layer, 5).items():
                name = expert_name(layer, 5, projection)
                assert torch.equal(found, values_of(stored, name))
                assert torch.equal(found.bfloat16(), checkpoint.tensor(name))
        families = export.manifest["quantization"]["report"]["families"]
    routed = [family for family in families if ".experts." in family["family"]]
    assert [(f["stored"], f["relative_rms_error"]) for f in routed] == [("int4", 0.0)] * 3
    with Runtime.open(tmp_path / "export", context=64, slots=6) as runtime:
        logits = runtime.logits(IDS)
    with Runtime.open(folder, context=64, quantize=False) as runtime:
        assert relative(logits, runtime.logits(IDS)) < 0.1
    name = expert_name(export.layers[0], 0, "up_proj")
    values = values_of(stored, name).bfloat16().contiguous()
    stored = {key: tensor for key, tensor in stored.items() if not key.startswith(name)}
    write_files(folder, {"model-1.safetensors": {**stored, name: values}})
    assert quantize(folder, tmp_path / "mixed")["quantization"]["experts"]["down"] == "lut4"


def test_fp4_experts_are_kept_to_the_bit(tmp_path, slotmoe):
    """Signs of zeros and denormal scales too; other codes are made of them where asked for."""
    folder = tmp_path / "tiny"
    write_checkpoint(folder, **V3)
    stored = encode(folder, FP4)
    write_files(folder, {"model-1.safetensors": as_v4_spells(stored)})
    quantize(folder, tmp_path / "export")
    with Export.open(tmp_path / "export") as export:
        for layer in export.layers:
            for projection, found in export.expert(layer, 5).items():
                name = expert_name(layer, 5, projection)
                assert same_bits(found, decoded_mxfp4(stored[name], stored[name + "_scale_inv"]))
        families = export.manifest["quantization"]["report"]["families"]
        codec = export.layout.codecs.down
        assert codec.nbytes(64, 160) * 8 / (64 * 192) == 4.25
    routed = [family for family in families if ".experts." in family["family"]]
    assert [(f["stored"], f["relative_rms_error"]) for f in routed] == [("mxfp4", 0.0)] * 3
    with Runtime.open(tmp_path / "export", context=64, slots=6) as runtime:
        logits = runtime.logits(IDS)
    with Runtime.open(folder, context=64, quantize=False) as runtime:
        assert relative(logits, runtime.logits(IDS)) < 0.1
    assert slotmoe("verify", tmp_path / "export")[0] == 0
    code, out, _ = slotmoe("plan", folder, "--ram", "1GiB", "--json")
    assert (code, json.loads(out)["expert_codecs"]["down"]) == (0, "mxfp4")
    made = quantize(folder, tmp_path / "lut", codecs=EXPERT_CODECS["lut", "3"])
    assert made["quantization"]["experts"]["down"] == "lut3"


def test_random_experts_in_fp4(tmp_path, slotmoe, monkeypatch):
    monkeypatch.setattr(synth, "POOL_BYTES", 1 << 20)
    write_checkpoint(tmp_path, **V3, quantization_config=FP4)
    code, _, err = slotmoe("synth", tmp_path / "config.json", tmp_path / "random")
    assert code == 0, err
    assert slotmoe("verify", tmp_path / "random")[0] == 0
    with Runtime.open(tmp_path / "random", context=64, slots=6) as runtime:
        assert runtime.model.export.layout.codecs.down.name == "mxfp4"
        deviation = runtime.model.export.expert(1, 0)["up_proj"].std().item()
        assert 0.4 < deviation / (0.5 * 160**-0.5) < 2
        assert runtime.logits(IDS).isfinite().all()


@pytest.mark.parametrize("byte", [255, 240])
def test_fp4_scales_that_no_weights_have_leave_no_export(tmp_path, byte):
    write_checkpoint(tmp_path / "tiny", **V3)
    tensors = encode(tmp_path / "tiny", FP4)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    tensors[name + "_scale_inv"].view(torch.uint8)[1, 0] = byte
    write_files(tmp_path / "tiny", {"model-1.safetensors": tensors})
    with pytest.raises(CheckpointError, match=f"{name}.*(NaN|infinite)"):
        quantize(tmp_path / "tiny", tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_codes_of_bitsandbytes_are_kept_by_nf4(tmp_path, nested, heavy):
    folder = tmp_path / "tiny"
    write_checkpoint(folder, **{**V3, **WHOLE_BLOCKS})
    _, wanted = bitsandbytes(folder, nested=nested)
    manifest = quantize(folder, tmp_path / "export", resident="nf4")
    assert manifest["quantization"]["experts"]["down"] == "nf4"
    with Export.open(tmp_path / "export") as export, open_checkpoint(folder) as checkpoint:
        for projection in PROJECTIONS:
            name = expert_name(1, 2, projection)
            found, rows = export.expert(1, 2)[projection], len(wanted[name])
            codes = checkpoint.codes(name, 0, rows)
            scales = codes.scales.half().float().repeat_interleave(64, 1)
            assert torch.equal(found, codes.levels[codes.codes.int()] * scales)
            assert relative(found, wanted[name].float()) < 0.003


def test_bad_scales_leave_no_export(tmp_path):
    write_checkpoint(tmp_path / "tiny", **V3)
    tensors = encode(tmp_path / "tiny", FP8)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    tensors[name + "_scale_inv"][1, 0] = torch.inf
    write_files(tmp_path / "tiny", {"model-1.safetensors": tensors})
    with pytest.raises(CheckpointError, match=f"the scales of {name} are NaN or infinite"):
        quantize(tmp_path / "tiny", tmp_path / "export")
    assert not (tmp_path / "export").exists()
