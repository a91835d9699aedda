"""Codes made with the Hessians of a text: layer by layer, resumed, repaired, and where a text says
nothing."""

import json
import shutil

import pytest
import torch

from slotmoe.errors import ExportError
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.offload.ingest import calibration
from slotmoe.offload.ingest.output_dir import Resumption
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.codecs.codec import EXPERT_CODECS
from slotmoe.quant.export.layout import MANIFEST, layer_file
from slotmoe.system import cores
from tests.support.disk import Stop, stop_at, tree
from tests.support.families import PLAIN_ROPE
from tests.support.hub import NAME, Repo, make
from tests.support.native import reference_of
from tests.support.oracle import relative
from tests.support.tiny import write_checkpoint
from tests.support.v4 import write_case

MIXED = {"codecs": EXPERT_CODECS["lut", "4"], "resident": "mixed"}


def windows(count=8, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4096, (count, width), generator=generator).tolist()


TEXT = MIXED | {"calibration": windows()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repo") / "tiny"
    write_checkpoint(folder, shards=3, num_hidden_layers=4)
    return folder


@pytest.fixture(scope="module")
def exports(source, heavy, tmp_path_factory):
    """Exports of the source with and without a text, not to be changed."""
    folder = tmp_path_factory.mktemp("exports")
    quantize(source, folder / "calibrated", **TEXT)
    quantize(source, folder / "plain", **MIXED)
    return folder


def families(destination):
    report = json.loads((destination / MANIFEST).read_text())["quantization"]["report"]
    return {row["family"]: row for row in report["families"]}


def test_calibrated_codes_cost_less_where_it_counts(exports):
    """The report has the error in the Hessians' measure; the whole error is larger for that."""
    calibrated, plain = families(exports / "calibrated"), families(exports / "plain")
    names = "mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.shared_experts.up_proj"
    for name in (*names, "self_attn.o_proj", "self_attn.q_b_proj"):
        output = calibrated[name]["relative_output_error"]
        assert 0 < output < plain[name]["relative_rms_error"], name
        assert calibrated[name]["relative_rms_error"] > plain[name]["relative_rms_error"], name
    assert "relative_output_error" not in plain[names[0]]
    assert "relative_output_error" not in calibrated["embed_tokens"]
    with Runtime.open(exports / "calibrated", context=32) as runtime:
        assert torch.isfinite(runtime.logits([0, 7, 300])).all()


SOURCES = {
    "v4": lambda folder: write_case(folder, "v4"),
    "gpt-oss": lambda folder: write_case(folder, "gpt-oss", **PLAIN_ROPE),
    "delta": lambda folder: write_case(folder, "next"),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_a_text_goes_through_the_network_that_the_reference_path_has(
    dtype, bound, source, tmp_path, monkeypatch
):
    """Clamped activations, in shared experts too, and biases; also where bfloat16 is fast."""
    monkeypatch.setattr(calibration, "fast_products", lambda device: dtype)
    SOURCES[source](tmp_path)
    window = windows(1, 40)[0]
    with open_checkpoint(tmp_path) as checkpoint:
        layers = range(checkpoint.config.num_hidden_layers)
        given = checkpoint, [window], set(), layers, tmp_path, Resumption({}), lambda count: None
        text = calibration.Calibration(*given)
        text.begin()
        for layer in text.remaining:
            text.layer(layer)
    found = reference_of(tmp_path).head(text.hidden_TD.cpu())
    with Runtime.open(tmp_path, context=64, quantize=False) as runtime:
        assert relative(found, runtime.logits(window)) < bound
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture
def other_threads(monkeypatch):
    """As many as sums of a text have other bits with."""
    monkeypatch.setattr("slotmoe.offload.ingest.quantize.cores", lambda: 1 + (cores() == 1))


def test_stopped_it_resumes_to_the_same_bytes(source, exports, tmp_path, request, monkeypatch):
    """And not with another text, nor with other threads than it began with, nor what a version
    that codes in another way has begun."""
    with pytest.raises(Stop):
        quantize(source, tmp_path / "export", workers=1, progress=stop_at(0.5), **TEXT)
    assert (tmp_path / "export.partial" / "state.json").is_file()
    with pytest.raises(ExportError, match="--overwrite"):
        quantize(source, tmp_path / "export", **MIXED, calibration=windows(seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "_WAY", 1)
        with pytest.raises(ExportError, match="--overwrite"):
            quantize(source, tmp_path / "export", **TEXT)
    request.getfixturevalue("other_threads")
    quantize(source, tmp_path / "export", **TEXT)
    assert tree(tmp_path / "export") == tree(exports / "calibrated")
    quantize(source, tmp_path / "export", **TEXT, overwrite=True)
    assert tree(tmp_path / "export") != tree(exports / "calibrated"), "else this tells nothing"


def test_a_download_is_calibrated_to_the_same_bytes(hub, source, exports, tmp_path):
    """Also after it was stopped."""
    hub.add(NAME, Repo(source))
    options = MIXED | {"ready": lambda folder: {"calibration": windows()}}
    with pytest.raises(Stop):
        make(tmp_path / "export", progress=stop_at(0.6), **options)
    make(tmp_path / "export", **options)
    made, local = tree(tmp_path / "export"), tree(exports / "calibrated")
    assert made | {MANIFEST: b""} == local | {MANIFEST: b""}
    assert not (tmp_path / "export.download").exists()


def test_repairing_takes_the_same_text(source, exports, tmp_path, other_threads):
    """Where there was one, on its threads; else an export is repaired without the new one."""
    for kind in ("calibrated", "plain"):
        export, layer = shutil.copytree(exports / kind, tmp_path / kind), layer_file(2)
        (export / layer).write_bytes((export / layer).read_bytes()[:-1] + b"?")
        for options in ({}, {"calibration": windows(seed=1)}) if kind == "calibrated" else ():
            with pytest.raises(ExportError, match=r"layer-00002.*pass the same --calibrate"):
                quantize(source, export, **MIXED, **options)
        quantize(source, export, **TEXT)
        repaired = tree(export)
        assert repaired[layer] == (exports / kind / layer).read_bytes()
        said = []
        quantize(source, export, **MIXED, calibration=windows(seed=1), notify=said.append)
        assert tree(export) == repaired and "not coded with this calibration text" in said[-1]


LONG = pytest.param(b"It is " * 2800, "", marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("content", "message"), [(b"caf\xe9 " * 9000, "byte 3 is not"), (b"It is", "needs 5000"), LONG]
)
def test_the_command_reads_text_or_refuses_it_before_any_work(
    content, message, source, slotmoe, tmp_path
):
    (tmp_path / "text").write_bytes(content)
    arguments = source, tmp_path / "export", "--calibrate", tmp_path / "text"
    code, out, err = slotmoe("quantize", *arguments)
    if message:
        assert (code, out, err.count("\n"), message in err) == (2, "", 1, True)
        assert [path.name for path in tmp_path.iterdir()] == ["text"]
    else:
        manifest = json.loads((tmp_path / "export" / MANIFEST).read_text())
        assert code == 0 and manifest["quantization"]["calibration"]
