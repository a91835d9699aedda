"""Exports by codec: rebuilt with numpy alone, and the same bits for every budget."""

import json
import shutil
import struct
from itertools import product

import numpy as np
import pytest
import torch
from safetensors import safe_open

from slotmoe.errors import ConfigError, ExportError
from slotmoe.model.names import expert_name
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.codecs.codec import EXPERT_CODECS
from slotmoe.quant.codecs.weight import dequantize
from slotmoe.quant.export.layout import MANIFEST, PROJECTIONS, RESIDENT, checksum, layer_file
from slotmoe.quant.export.reader import Export
from tests.support.codes import SUFFIXES, values
from tests.support.exported import resign
from tests.support.oracle import relative
from tests.support.tiny import random_weights, write_checkpoint
from tests.support.twin import Twin, open_on

ODD = {"hidden_size": 72, "moe_intermediate_size": 37, "intermediate_size": 50}
IDS = [(7 * i) % 4096 for i in range(1, 41)]
# Relative RMS of Gaussian weights, with the few rows and columns of these.
ERRORS = {"nf4": 0.1, "lut4": 0.08, "lut3": 0.17, "lut2": 0.35, "int5": 0.05}
RESIDENT_OF = {("nf4", "4"): "nf4", ("lut", "2.5"): "int6", ("lut", "2"): "int5"}
RESIDENT_OF["lut", "4.5"] = (
    "int8 self_attn.o_proj@0-1=int6 self_attn.kv_a_proj_with_mqa@0-2=none "
    "mlp.shared_experts@2-2=lut4 lm_head@0-0=int5"
)
ROLES = {"down_proj": "down"}
by_choice = pytest.mark.parametrize("choice", EXPERT_CODECS, ids="-".join)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """An export by choice, made when it is first asked for, and the source's weights."""
    folder, made = tmp_path_factory.mktemp("codecs"), {}
    weights = random_weights(write_checkpoint(folder / "source", **ODD))

    def export(choice):
        path = folder / "-".join(choice)
        if path not in made:
            codecs = EXPERT_CODECS[choice]
            mode = RESIDENT_OF.get(choice, "mixed")
            made[path] = quantize(folder / "source", path, resident=mode, codecs=codecs)
        return path

    export.weights, export.source = weights, folder / "source"
    return export


@by_choice
def test_an_export_is_rebuilt_from_the_documented_bytes(heavy, exports, choice):
    """With json, safetensors and numpy; sizes that fill neither tiles nor blocks."""
    path = exports(choice)
    manifest = json.loads((path / MANIFEST).read_text())
    quantization, experts = manifest["quantization"], manifest["experts"]
    codecs, names = quantization["codecs"], quantization["experts"]
    assert manifest["format_version"] == 2 and quantization["layout"] == "tiles16"
    shapes = {"gate_proj": (37, 72), "up_proj": (37, 72), "down_proj": (72, 37)}
    with Export.open(path) as export:
        for layer, expert, part in product(experts["layers"], (0, 5), PROJECTIONS):
            name, kind = expert_name(layer, expert, part), names[ROLES.get(part, "gate_up")]
            tensors = name, f"{name}.{SUFFIXES[codecs[kind]['scales']]}"
            with safe_open(path / layer_file(layer), "np") as file:
                made = values(codecs[kind], *map(file.get_tensor, tensors), *shapes[part])
            assert np.array_equal(export.expert(layer, expert)[part].numpy(), made)
            assert relative(made, exports.weights[name].float()) < ERRORS[kind]
        with safe_open(path / RESIDENT, "np") as file:
            for name, coded in quantization["resident_codecs"].items():
                codec = codecs[coded["codec"]]
                tensors = name, f"{name}.{SUFFIXES[codec['scales']]}"
                made = values(codec, *map(file.get_tensor, tensors), *coded["shape"])
                assert np.array_equal(export.resident(name).dequantize().numpy(), made)
    record, kinds = experts["record"], {"weight": 0, "absmax": 1, "scales": 1, "pad": 2}
    order = [kinds[name.rpartition(".")[2]] for name in record]
    assert order == sorted(order)  # all codes, then all scales, then the padding
    ends = [part["offset"] + part["bytes"] for part in record.values()]
    assert [0, *ends] == [*[part["offset"] for part in record.values()], experts["record_bytes"]]
    assert experts["record_bytes"] % 4096 == 0
    for name in (RESIDENT, *map(layer_file, experts["layers"])):
        raw = (path / name).read_bytes()
        (length,) = struct.unpack_from("<Q", raw)
        assert (8 + length) % 4096 == 0, "the first record is aligned too"
        pads = [part for key, part in json.loads(raw[8 : 8 + length]).items() if "pad" in key]
        for start, end in (part["data_offsets"] for part in pads):
            assert not any(raw[8 + length + start : 8 + length + end])


@by_choice
def test_the_same_bits_for_every_budget_and_number_of_tokens(exports, choice):
    path = exports(choice)
    with Runtime.open(path, context=64) as runtime:
        whole = runtime.logits(IDS)
        greedy = [token.id for token in runtime.generate("a b c", 12)]
    with Runtime.open(path, context=64, slots=6) as runtime:
        assert torch.equal(runtime.logits(IDS), whole)
        assert [token.id for token in runtime.generate("a b c", 12)] == greedy
        assert runtime.stats()["cache"]["misses"] > 0
    with Runtime.open(path, context=64, kernels="torch") as runtime:
        assert relative(runtime.logits(IDS), whole) < 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_impossible_scales_are_refused_by_name(value, exports, tmp_path, slotmoe):
    """With a right checksum: only an encoder's fault, or bad intentions, make them."""
    shutil.copytree(exports(("lut", "4")), tmp_path / "bad")
    with Export.open(tmp_path / "bad") as export:
        layout, layer = export.layout, export.layers[1]
        size, entry = layout.record_bytes, export.manifest["files"][layer_file(layer)]
    path, start = tmp_path / "bad" / layer_file(layer), entry["header_bytes"] + 4 * size
    data = bytearray(path.read_bytes())
    record = torch.frombuffer(data, dtype=torch.uint8)[start : start + size]
    scales = layout.part(record, "up_proj.weight.scales")
    scales[1, :2].view(torch.float32)[0, 3] = value
    path.write_bytes(data)

    def bless(manifest):
        entry = manifest["files"][layer_file(layer)]
        entry["records"][4] = checksum(bytes(data[start : start + size]))
        entry["checksum"] = checksum(bytes(data))

    resign(tmp_path / "bad", bless)
    with Export.open(tmp_path / "bad") as export:
        export.expert(layer, 3)
        with pytest.raises(ExportError, match=rf"layer {layer} expert 4 up_proj has scales"):
            export.expert(layer, 4)
    code, out, err = slotmoe("verify", tmp_path / "bad")
    assert (code, "up_proj of expert 4" in out + err) == (1, True)


@pytest.mark.usefixtures("twin")
def test_a_gpu_multiplies_by_torch_what_its_kernels_lack(exports, monkeypatch):
    path, twin, asked = exports(("lut", "2")), Twin(1), []
    made = twin.backend
    monkeypatch.setattr(twin, "backend", lambda how, *rest: asked.append(how) or made(how, *rest))
    with open_on(path, twin, 6) as runtime:
        found = runtime.logits(IDS)
    with Runtime.open(path, context=64, kernels="torch") as runtime:
        assert relative(found, runtime.logits(IDS)) < 1e-3
    assert asked == ["torch"]
    with pytest.raises(ConfigError, match="kernels triton: multiply no int5 and lut2"):
        Runtime.open(path, kernels="triton")


def test_random_weights_have_their_size_in_two_to_six_bits(exports, slotmoe, tmp_path):
    made = tmp_path / "made"
    options = "--bits", "2.5", "--resident", "int6"
    assert slotmoe("synth", exports.source / "config.json", made, *options)[0] == 0
    with Export.open(made) as export:
        weights = [*export.expert(2, 3).values()]
        weights += map(
            dequantize, map(export.resident, export.manifest["quantization"]["resident_codecs"])
        )
    for weight in weights:
        assert 0.4 < weight.std() * weight.shape[1] ** 0.5 < 0.65
