"""Exports of every family: beside transformers on the same weights, and the same bits for every
budget, with guesses of what the next gate will choose."""

import pytest
import torch

from slotmoe.model.checkpoint import tensor_shapes
from slotmoe.model.config import read_config
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from tests.support.engine import IDS, whole
from tests.support.families import CASES, oracle_network, quietly, write_family
from tests.support.oracle import rebuild

FAMILIES = ("v3-groups-yarn", "glm-two-dense", "mistral-groups", "v3.2", "glm-5")


@pytest.fixture(scope="module")
def export_of(tmp_path_factory):
    """The export of a case, made once."""
    made = {}

    def export(name):
        if name not in made:
            made[name] = folder = tmp_path_factory.mktemp("family")
            family, overrides = CASES[name]
            write_family(folder / "source", family, torch.bfloat16, **overrides)
            quantize(folder / "source", folder / "export")
        return made[name] / "export"

    return export


@pytest.mark.parametrize("name", FAMILIES)
def test_kernels_lose_less_than_bf16_does(name, export_of):
    """transformers in float32 on the export's own weights is what is right, and in bfloat16 the
    measure.  A token whose experts change by rounding is far off in both, so the median counts."""
    export, errors = export_of(name), []
    rows, shapes = rebuild(export), dict(tensor_shapes(read_config(export / "config.json")))
    weights = {name: rows[name][tuple(map(slice, shape))] for name, shape in shapes.items()}
    with quietly():
        right = oracle_network(export, weights)(torch.tensor([IDS])).logits[0]
        low = oracle_network(export, weights).bfloat16()(torch.tensor([IDS])).logits[0].float()
    with Runtime.open(export, context=64) as runtime:
        for logits in (runtime.logits(IDS), low):
            errors.append(((logits - right).norm(dim=1) / right.norm(dim=1)).median().item())
    assert errors[0] <= 2 * errors[1], errors


@pytest.mark.parametrize("name", FAMILIES)
def test_same_bits_for_every_budget_and_with_guesses(name, export_of, always_guessing):
    with Runtime.open(export_of(name), context=64) as runtime:
        wanted = runtime.logits(IDS)
        ids = [token.id for token in runtime.generate(IDS[:8], 8)]
    for options in ({"slots": 6}, {"slots": 6, "prefetch": False}, {"slots": 9}):
        with Runtime.open(export_of(name), context=64, **options) as runtime:
            assert torch.equal(runtime.logits(IDS), wanted)
            assert [token.id for token in runtime.generate(IDS[:8], 8)] == ids
            guesses = runtime.stats().get("prefetch")
            assert (guesses is not None) == options.get("prefetch", True)
            assert guesses is None or guesses["layer"]["used"] > 0, guesses
            whole(runtime)
