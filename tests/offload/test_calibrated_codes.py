"""Codes made with the Hessians of a text: layer by layer, resumed, repaired, and where a text says
nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slotmoe.errors import ExportError
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.names import expert_name, split_name
from slotmoe.offload.ingest import calibration as ingest
from slotmoe.offload.ingest.calibration import Calibration
from slotmoe.offload.ingest.output_dir import Resumption
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.model_source import read_model
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.codecs.codec import EXPERT_CODECS
from slotmoe.quant.export.layout import MANIFEST, layer_file
from tests.support.disk import Stop, stop_at, tree
from tests.support.encoded import write_files
from tests.support.hub import NAME, Repo, make
from tests.support.params import nth
from tests.support.tiny import write_checkpoint

LUT = EXPERT_CODECS["lut", "4"]


def windows(count=12, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4096, (count, width), generator=generator).tolist()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "source"
    write_checkpoint(folder, num_hidden_layers=4)
    return folder


@pytest.fixture(scope="module")
def exports(source, heavy, tmp_path_factory):
    """Exports of the source with and without a text, not to be changed."""
    folder = tmp_path_factory.mktemp("exports")
    made(source, folder / "calibrated", resident="mixed")
    quantize(source, folder / "plain", codecs=LUT, resident="mixed")
    return folder


def made(source, destination, **options):
    quantize(source, destination, codecs=LUT, calibration=windows(), **options)
    return contents(destination)


def contents(export):
    return {path.name: path.read_bytes() for path in export.rglob("*") if path.is_file()}


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


@pytest.mark.parametrize("share", nth(3, [0.5, 0.2, 0.95]))
def test_stopped_it_resumes_to_the_same_bytes(share, source, exports, tmp_path):
    """And not with another text."""
    options = {"resident": "mixed"}
    with pytest.raises(Stop):
        made(source, tmp_path / "export", workers=1, progress=stop_at(share), **options)
    assert (tmp_path / "export.partial" / "state.json").is_file()
    other = {**options, "codecs": LUT, "calibration": windows(seed=1)}
    with pytest.raises(ExportError, match="--overwrite"):
        quantize(source, tmp_path / "export", **other)
    assert made(source, tmp_path / "export", **options) == contents(exports / "calibrated")


@pytest.mark.parametrize("stop", nth(2, [0.6, None]))
def test_a_download_is_calibrated_to_the_same_bytes(hub, source, exports, tmp_path, stop):
    """In files by layer, of which the second one has what levels are learned from, and again after
    it was stopped."""
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    files = {f"model-{number}.safetensors": {} for number in range(4)}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer = split_name(name)[0]
        number = layer or (0 if layer == 0 or "embed" in name else 3)
        files[f"model-{number}.safetensors"][name] = tensor
    write_files(tmp_path / "source", files)
    wanted = made(tmp_path / "source", tmp_path / "local", resident="mixed")
    del wanted[MANIFEST]  # which has the folder's name
    hub.add(NAME, Repo(tmp_path / "source"))
    options = {"codecs": LUT, "ready": lambda folder: windows()}
    options |= {"resident": "mixed"}
    if stop is not None:
        with pytest.raises(Stop):
            make(tmp_path / "export", progress=stop_at(stop), **options)
    make(tmp_path / "export", **options)
    found = {Path(name).name: data for name, data in tree(tmp_path / "export").items()}
    assert {name: found[name] for name in wanted} == wanted
    assert not (tmp_path / "export.download").exists()


def test_repairing_takes_the_same_text(source, exports, tmp_path):
    """Where there was one; an export without a text is repaired without its new one."""
    for kind in ("calibrated", "plain"):
        export = shutil.copytree(exports / kind, tmp_path / kind)
        damaged = export / layer_file(2)
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
        for options in ({}, {"calibration": windows(seed=1)}) if kind == "calibrated" else ():
            with pytest.raises(ExportError, match=r"layer-00002.*pass the same --calibrate"):
                quantize(source, export, codecs=LUT, resident="mixed", **options)
        repaired = made(source, export, resident="mixed")
        for seed in range(2):  # nothing is damaged any more
            said, text = [], windows(seed=seed)
            options = {"resident": "mixed", "calibration": text, "notify": said.append}
            quantize(source, export, codecs=LUT, **options)
            assert contents(export) == repaired
            assert "every checksum is right" in said[0]
            is_other = ["not coded with this calibration text" in line for line in said[1:]]
            assert is_other == [True] * (kind == "plain" or seed == 1)
        assert repaired[Path(layer_file(2)).name] == (exports / kind / layer_file(2)).read_bytes()


def test_nf4_codes_are_what_they_are(source, tmp_path):
    given, said = {"codecs": EXPERT_CODECS["nf4", "4"]}, []
    quantize(source, tmp_path / "plain", **given)
    quantize(source, tmp_path / "export", **given, calibration=windows(), notify=said.append)
    assert "no codes here have learned levels" in said[0]
    name = layer_file(1)
    assert (tmp_path / "export" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert "calibration" not in json.loads((tmp_path / "export" / MANIFEST).read_text())


def test_experts_that_no_token_reached_take_the_layers_hessian(source, tmp_path):
    text, said = windows(1, 3), []
    quantize(source, tmp_path / "export", codecs=LUT, calibration=text, notify=said.append)
    (none,) = [line for line in said if "got none" in line]
    assert int(none.split()[0]) > 0
    assert families(tmp_path / "export")["mlp.experts.down_proj"]["relative_output_error"] > 0


def test_hessians_that_are_not_finite_are_named(source, tmp_path, monkeypatch):
    def broken(sums, counts):
        return (total * float("nan") for total in sums)

    monkeypatch.setattr(ingest, "_shrunk", broken)
    said = []
    quantize(source, tmp_path / "export", codecs=LUT, calibration=windows(), notify=said.append)
    (line,) = [line for line in said if "no finite Hessian" in line]
    assert "down_proj" in line
    assert families(tmp_path / "export")["mlp.experts.down_proj"]["relative_rms_error"] < 0.1


def test_the_stream_is_the_networks(source, tmp_path):
    """After all layers it is what the reference path has."""
    text = windows(2, 40)
    with open_checkpoint(source) as checkpoint:
        layers = range(checkpoint.config.num_hidden_layers)
        given = text, set(), layers, tmp_path, Resumption({}), lambda count: None
        calibration = Calibration(checkpoint, *given)
        calibration.begin()
        found = [calibration.layer(layer) for layer in calibration.remaining]
    assert len(found) == 4
    with Runtime.open(source, quantize=False, context=64) as runtime:
        (wanted,) = runtime.hidden(text[0])
    assert torch.allclose(calibration.hidden_TD[:40], wanted, rtol=1e-3, atol=1e-4)
    H = found[1][expert_name(1, 2, "down_proj")].mean_KK
    assert torch.allclose(H, H.t(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("content", "message"), [(b"caf\xe9 " * 9000, "byte 3 is not"), (b"It is", "needs 5000")]
)
def test_bad_text_is_refused_before_any_work(content, message, source, slotmoe, tmp_path):
    (tmp_path / "text").write_bytes(content)
    arguments = source, tmp_path / "export", "--calibrate", tmp_path / "text"
    code, out, err = slotmoe("quantize", *arguments)
    assert (code, out, err.count("\n"), message in err) == (2, "", 1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_the_command_reads_text_in_windows(source, slotmoe, tmp_path):
    """Of at most the model's positions, each with the tokenizer's beginning."""
    (tmp_path / "text").write_text("It is a truth. " * 1500)
    arguments = "quantize", source, tmp_path / "export", "--calibrate", tmp_path / "text"
    assert slotmoe(*arguments)[0] == 0
    before = contents(tmp_path / "export")
    assert json.loads(before[MANIFEST])["quantization"]["calibration"]
    assert slotmoe(*arguments)[0] == 0 and contents(tmp_path / "export") == before
    _, tokenizer = read_model(source)
    read = ingest.read_windows([tmp_path / "text"] * 2, tokenizer, 64)
    assert {len(window) for window in read[:-1]} <= {64, len(read[-1])}
    assert {tuple(window[: len(tokenizer.begin)]) for window in read} == {tuple(tokenizer.begin)}
