"""Quantizing streams: peak memory at real expert sizes, and that it does not grow with the number
of layers."""

import json
import subprocess
import sys
from itertools import product

import pytest
import torch
from safetensors.torch import save_file

from slotmoe.model.config import parse_config
from slotmoe.model.names import expert_name, expert_shapes, resident_shapes
from tests.support.tiny import SAMPLE

_PEAK = """
import pathlib, sys
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.machine import peak_rss
quantize(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), workers=2)
print(peak_rss() / 2**20)
"""


def write_lite(folder, layers):
    """A bf16 checkpoint of V2-Lite's geometry with fewer layers, one shard a layer, written without
    holding more."""
    config = json.loads((SAMPLE.parent / "geometries" / "v2-lite.json").read_text())
    config["num_hidden_layers"] = layers
    parsed, folder_map = parse_config(config), {}
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(1 << 22, generator=generator) * 0.02).bfloat16()

    def weight(shape):
        count = torch.Size(shape).numel()
        return noise.repeat(-(-count // len(noise)))[:count].view(shape)

    folder.mkdir()
    shards, experts = [dict(resident_shapes(parsed))], range(parsed.n_routed_experts)
    for layer in parsed.moe_layers:
        items = product(experts, expert_shapes(parsed).items())
        shards.append({expert_name(layer, e, name): shape for e, (name, shape) in items})
    for number, shapes in enumerate(shards):
        file = f"model-{number:05d}.safetensors"
        save_file({name: weight(shape) for name, shape in shapes.items()}, folder / file)
        folder_map |= dict.fromkeys(shapes, file)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": folder_map}))
    (folder / "tokenizer.json").write_bytes((SAMPLE / "tokenizer.json").read_bytes())


@pytest.mark.usefixtures("nightly", "processes")
def test_quantize_streams_v2_lite_experts(tmp_path):
    peaks = []
    for layers in (2, 5):
        source, export = tmp_path / f"source-{layers}", tmp_path / f"export-{layers}"
        write_lite(source, layers)
        command = [sys.executable, "-c", _PEAK, source, export]
        peaks.append(float(subprocess.check_output(command)))
    print(f"peak RSS in MiB for 2 and 5 layers: {peaks}")
    assert max(peaks) <= 1024
    assert peaks[1] <= peaks[0] * 1.1
