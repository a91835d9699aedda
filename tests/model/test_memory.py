"""Quantizing streams: peak memory at real expert sizes, and that it does not grow with the number
of layers."""

import json
import subprocess
import sys

import pytest

from tests.support.tiny import SAMPLE, write_checkpoint

_PEAK = """
import pathlib, sys
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.system import peak_rss
quantize(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), workers=2)
print(peak_rss() / 2**20)
"""


@pytest.mark.usefixtures("nightly", "processes")
def test_quantize_streams_experts_of_v2_lites_size(tmp_path):
    config = json.loads((SAMPLE.parent / "geometries" / "v2-lite.json").read_text())
    peaks = []
    for layers in (2, 5):
        source, export = tmp_path / f"source-{layers}", tmp_path / f"export-{layers}"
        changes = {"num_hidden_layers": layers, "n_routed_experts": 16}
        write_checkpoint(source, shards=layers, **{**config, **changes})
        command = [sys.executable, "-c", _PEAK, source, export]
        peaks.append(float(subprocess.check_output(command)))
    assert max(peaks) <= 1024
    assert peaks[1] <= peaks[0] * 1.1, peaks
