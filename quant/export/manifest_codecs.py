"""The codecs that a manifest describes, without torch."""

from dataclasses import replace

from slotmoe.jsonfile import Json
from slotmoe.quant.codecs.codec import NF4, Codec, ExpertCodecs


def to_version_2(manifest: Json) -> None:
    """Say what a manifest of version 1 says in the words of version 2: all its codes were NF4."""
    old = manifest["quantization"]
    codec = replace(NF4, levels=tuple(old.pop("levels")))
    shapes = old.pop("resident_shapes")
    del old["block"]
    manifest["format_version"] = 2
    manifest["quantization"] = old | {
        "codecs": {codec.name: codec.describe()},
        "experts": ExpertCodecs(codec, codec).names(),
        "resident_codecs": {
            name: {"codec": codec.name, "shape": shape} for name, shape in shapes.items()
        },
    }


def manifest_codecs(manifest: Json) -> dict[str, Codec]:
    """All codecs of a manifest, by name."""
    table = manifest["quantization"]["codecs"]
    return {
        name: Codec(name, item["bits"], item["scales"], tuple(item["levels"]))
        for name, item in table.items()
    }


def expert_codecs(manifest: Json) -> ExpertCodecs:
    """The codecs of the experts of a manifest."""
    codecs, names = manifest_codecs(manifest), manifest["quantization"]["experts"]
    return ExpertCodecs(codecs[names["gate_up"]], codecs[names["down"]])
