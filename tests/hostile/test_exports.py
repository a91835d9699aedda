"""Exports made to break things, most of them with a manifest that is signed anew."""

import json
import shutil

import pytest

from slotmoe.errors import ConfigError, ExportError
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.layout import MANIFEST, RESIDENT, checksum, layer_file
from tests.support.exported import read_everything, resign, signed
from tests.support.hostile import NORM, append, edit_json, fifo, refused, truncate, write
from tests.support.params import nth
from tests.support.tiny import REMOVE, SMALL, write_checkpoint


def swapped_layers(folder):
    one, two = folder / layer_file(1), folder / layer_file(2)
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def export_link(name):
    def apply(folder):
        outside = folder.parent / "outside"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return apply


def half_written(folder):
    """What a killed quantize leaves under the name DST.partial."""
    (folder / MANIFEST).unlink()
    (folder / layer_file(2)).rename(folder / (layer_file(2) + ".tmp"))


def other_config(folder):
    edit_json(folder / "config.json", lambda config: config.update(routed_scaling_factor=1.0))


HEADER, Q = ("files", layer_file(1)), "model.layers.0.self_attn.q_a_proj.weight"


def codec_of(manifest):
    return manifest["quantization"]["codecs"]["nf4"]


def codec(**values):
    return lambda folder: resign(folder, lambda manifest: codec_of(manifest).update(values))


BAD_EXPORTS = {
    "newer-version": (signed("format_version", value=3), "newer"),
    "newer-version-unsigned": (
        lambda folder: edit_json(folder / MANIFEST, lambda m: m.update(format_version=7)),
        "newer",
    ),
    "version-zero": (signed("format_version", value=0), "format_version"),
    "version-true": (signed("format_version", value=True), "format_version"),
    "version-text": (signed("format_version", value="1"), "format_version"),
    "unsigned-level": (
        lambda folder: edit_json(folder / MANIFEST, lambda m: codec_of(m)["levels"].reverse()),
        "checksum",
    ),
    "unsigned-size": (
        lambda folder: edit_json(folder / MANIFEST, lambda m: m["files"][RESIDENT].update(bytes=1)),
        "checksum",
    ),
    "no-checksum": (
        lambda folder: edit_json(folder / MANIFEST, lambda m: m.pop("checksum")),
        "checksum",
    ),
    "sixteen-levels-are-seventeen": (codec(levels=[*range(17)]), "levels"),
    "sixteen-levels-are-eight": (codec(levels=[*range(8)]), "8 levels for 4 bits"),
    "levels-of-text": (codec(levels=["0"] * 16), "levels"),
    "levels-unordered": (codec(levels=[1, 0, *range(2, 16)]), "ascending"),
    "levels-equal": (codec(levels=[0, *range(15)]), "ascending"),
    # what JSON tells apart and float32 does not
    "levels-equal-as-floats": (codec(levels=[*range(15), 14 + 1e-9]), "ascending"),
    "codec-bits": (codec(bits=2), "bits is 2"),
    "codec-bits-with-other-scales": (codec(bits=3, levels=[*range(8)]), "are unknown"),
    "codec-scales": (codec(scales="f8"), "scales"),
    "codec-block": (codec(block=32), "are unknown"),
    "codec-missing": (signed("quantization", "codecs", value={}), "'nf4' is not in codecs"),
    "codec-of-experts": (signed("quantization", "experts", "down", value="lut9"), "'lut9'"),
    "codec-of-resident": (signed("quantization", "resident_codecs", Q, "codec", value="x"), "'x'"),
    "levels-infinite": (lambda folder: infinite_level(folder), "levels"),
    "levels-an-object": (codec(levels={str(i): 0 for i in range(16)}), "levels"),
    "layout-unknown": (signed("quantization", "layout", value="tiles32"), "layout"),
    "block-unknown": (codec(block=128), "are unknown"),
    "record-of-other-size": (signed("experts", "record_bytes", value=4096), "record"),
    "record-with-other-offsets": (
        signed("experts", "record", "up_proj.weight", "offset", value=0),
        "record",
    ),
    "hidden-size-negative": (signed("experts", "hidden_size", value=-64), "integer"),
    "hidden-size-true": (signed("experts", "hidden_size", value=True), "integer"),
    "hidden-size-huge": (signed("experts", "hidden_size", value=1 << 20), "record"),
    "experts-none": (signed("experts", "n_routed_experts", value=0), "integer"),
    "experts-many": (signed("experts", "n_routed_experts", value=4096), "records"),
    "layers-empty": (signed("experts", "layers", value=[]), "layers"),
    "layers-twice": (signed("experts", "layers", value=[1, 1, 2]), "layers"),
    "layers-text": (signed("experts", "layers", value=["../../x", 1]), "layers"),
    "layers-many": (signed("experts", "layers", value=list(range(2000))), "layers"),
    "linked-layers-unknown": (signed("experts", "linked_layers", value={"1": 9}), "linked_layers"),
    "linked-layers-swapped": (signed("experts", "linked_layers", value={"1": 2}), "header"),
    "file-parent": (signed("files", "../x", value={"bytes": 1, "checksum": ""}), "files"),
    "file-absolute": (signed("files", "/etc/passwd", value={"bytes": 1, "checksum": ""}), "files"),
    "file-drive": (signed("files", "C:\\x", value={"bytes": 1, "checksum": ""}), "files"),
    "file-of-unknown-layer": (
        signed("files", layer_file(7), value={"bytes": 1, "checksum": ""}),
        "files",
    ),
    "file-without-config": (signed("files", "config.json", value=REMOVE), "files"),
    "file-without-resident": (signed("files", RESIDENT, value=REMOVE), RESIDENT),
    "file-without-layer": (signed("files", layer_file(1), value=REMOVE), "layer-00001"),
    "file-size-negative": (signed(*HEADER, "bytes", value=-1), "integer"),
    "header-size-wrong": (signed(*HEADER, "header_bytes", value=4096), "hold"),
    "records-too-few": (signed(*HEADER, "records", value=["0" * 32] * 7), "records"),
    "records-an-object": (
        signed(*HEADER, "records", value={str(i): "0" * 32 for i in range(8)}),
        "records",
    ),
    "records-of-null": (signed(*HEADER, "records", value=[None] * 8), "records"),
    "records-wrong": (signed(*HEADER, "records", value=["0" * 32] * 8), "layer-00001"),
    "tensor-without-checksum": (
        signed("files", RESIDENT, "tensors", NORM, "checksum", value=REMOVE),
        "checksum",
    ),
    "tensor-missing": (signed("files", RESIDENT, "tensors", NORM, value=REMOVE), MANIFEST),
    "tensor-added": (
        signed(
            "files", RESIDENT, "tensors", "x", value={"dtype": "U8", "shape": [1], "checksum": ""}
        ),
        "x has dtype",
    ),
    "tensor-dtype-unknown": (
        signed("files", RESIDENT, "tensors", NORM, "dtype", value="F64"),
        "F64",
    ),
    "tensor-dtype-of-same-size": (
        signed("files", RESIDENT, "tensors", NORM, "dtype", value="F16"),
        "header",
    ),
    "tensor-shape-negative": (
        signed("files", RESIDENT, "tensors", NORM, "shape", value=[-64]),
        "integer",
    ),
    "tensor-shape-empty": (signed("files", RESIDENT, "tensors", NORM, "shape", value=[]), NORM),
    "tensor-shape-huge": (
        signed("files", RESIDENT, "tensors", NORM, "shape", value=[1 << 31] * 3),
        "hold",
    ),
    "coded-shape-missing": (signed("quantization", "resident_codecs", value={}), Q),
    "coded-shape-of-other-tiles": (
        signed("quantization", "resident_codecs", Q, "shape", value=[4096, 4096]),
        Q,
    ),
    "manifest-missing": (lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
    "manifest-empty": (write(MANIFEST, b""), MANIFEST),
    "manifest-list": (write(MANIFEST, b"[]"), MANIFEST),
    "manifest-over-cap": (write(MANIFEST, b'{"a": "' + b"x" * (9 << 20) + b'"}'), "more than"),
    "manifest-many-values": (
        write(MANIFEST, b'{"a": [' + b"[]," * 2_000_000 + b"1]}"),
        "more than",
    ),
    "manifest-deep": (
        write(MANIFEST, b'{"format_version": 1, "a":' + b"[" * 900 + b"]" * 900 + b"}"),
        MANIFEST,
    ),
    "manifest-is-pipe": (fifo(MANIFEST), MANIFEST),
    "manifest-link-out": (export_link(MANIFEST), "link"),
    "layer-missing": (lambda folder: (folder / layer_file(2)).unlink(), "layer-00002"),
    "layer-a-byte-short": (truncate(layer_file(2), -1), "layer-00002"),
    "layer-empty": (truncate(layer_file(2), 0), "layer-00002"),
    "layer-a-byte-long": (append(layer_file(2)), "layer-00002"),
    "layers-swapped": (swapped_layers, "layer-00001"),
    "layer-link-out": (export_link(layer_file(1)), "link"),
    "layers-link-out": (export_link("experts"), "link"),
    "layer-is-pipe": (fifo(layer_file(1)), "layer-00001"),
    "layer-is-folder": (
        lambda folder: ((folder / layer_file(1)).unlink(), (folder / layer_file(1)).mkdir()),
        "layer-00001",
    ),
    "resident-missing": (lambda folder: (folder / RESIDENT).unlink(), RESIDENT),
    "resident-a-byte-short": (truncate(RESIDENT, -1), RESIDENT),
    "resident-link-out": (export_link(RESIDENT), "link"),
    "report-storage": (
        signed("quantization", "report", "families", 0, "stored", value="int2"),
        "unknown storage 'int2'",
    ),
    "report-error": (
        signed("quantization", "report", "families", 0, "relative_rms_error", value=1e9),
        "is not a number from 0 to 1000",
    ),
    "report-layer": (
        signed("quantization", "report", "families", 0, "worst_layer", value=77),
        "worst_layer",
    ),
    "report-keys": (signed("quantization", "report", "bits", value=4), "other keys"),
    "config-missing": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config-changed": (other_config, "config.json"),
    "tokenizer-link-out": (export_link("tokenizer.json"), "link"),
    "tokenizer-is-pipe": (fifo("tokenizer.json"), "tokenizer.json"),
    "half-written": (half_written, MANIFEST),
}


def infinite_level(folder):
    """1e999 is valid JSON and reads as infinity; NaN can't be signed because it can't be read."""
    resign(folder, lambda manifest: codec_of(manifest)["levels"].__setitem__(0, float("inf")))
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace("Infinity", "1e999"))


@pytest.mark.parametrize("name", BAD_EXPORTS)
def test_bad_export(name, export):
    breaking, wanted = BAD_EXPORTS[name]
    breaking(export)
    refused(lambda: read_everything(export), wanted, kind=ExportError)


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("name", BAD_EXPORTS)
def test_bad_export_as_a_model(name, export):
    """The same through the runtime, which reads config.json first; experts are read at first
    use."""
    BAD_EXPORTS[name][0](export)

    def run():
        with Runtime.open(export, context=64) as runtime:
            runtime.logits(list(range(60)))

    if name != "records-wrong":
        refused(run)
        return
    with pytest.raises(ExportError, match="layer 1 expert"):
        run()


def test_export_without_a_report_opens(export):
    """As those of ``slotmoe synth`` and of older versions are."""
    wanted = read_everything(export)
    signed("quantization", "report", value=REMOVE)(export)
    assert read_everything(export) == wanted


def test_export_of_another_geometry(good, export, tmp_path):
    """A config.json that is signed but describes another model."""
    for key, value in (
        ("n_shared_experts", 1),
        ("num_hidden_layers", 2),
        ("n_routed_experts", 4),
        ("vocab_size", 4095),
    ):
        edit_json(
            export / "config.json", lambda config, key=key, value=value: config.update({key: value})
        )
        data = (export / "config.json").read_bytes()
        entry = {"bytes": len(data), "checksum": checksum(data)}
        resign(
            export, lambda manifest, entry=entry: manifest["files"].update({"config.json": entry})
        )
        refused(lambda: Runtime.open(export, context=16), kind=(ConfigError, ExportError))
        shutil.copyfile(good / "export" / "config.json", export / "config.json")


def leaves(value, path=()):
    """Paths of every value in a JSON tree, containers included."""
    if path:
        yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from leaves(item, (*path, key))


@pytest.fixture(scope="module")
def least(tmp_path_factory):
    """The least export: each value of its manifest is tried."""
    folder = tmp_path_factory.mktemp("least")
    write_checkpoint(folder / "checkpoint", **SMALL)
    quantize(folder / "checkpoint", folder / "export", resident="nf4")
    return folder / "export"


@pytest.mark.parametrize("value", nth(3, [None, [], -1, 1 << 70, "../x", {}, True, 0.5]), ids=repr)
def test_every_manifest_value_may_be_hostile(value, least, tmp_path):
    """Signed nonsense at any place is refused by name, or changes nothing that a reader gets."""
    export = shutil.copytree(least, tmp_path / "export")
    text, wanted = (export / MANIFEST).read_text(), read_everything(export)
    opened = 0
    for path in leaves(json.loads(text)):
        if (
            len(path) > 4 and path[:2] == ("files", RESIDENT) and hash_of(path) % 4
        ):  # many alike: a quarter of them
            continue
        signed(*path, value=value)(export)
        try:
            found = read_everything(export)
        except ExportError as problem:
            assert str(export) in str(problem)  # noqa: PT017
        else:
            opened += path[:2] != ("quantization", "report")  # whose figures are for people
            if "levels" not in path:
                assert found == wanted, path
        (export / MANIFEST).unlink()
        (export / MANIFEST).write_text(text)
    assert opened < 60, "most of the manifest must matter"


def hash_of(path):
    return sum(map(ord, "".join(map(str, path))))
