"""Every kind of attention under the engine: one text has the same bits, however it is computed."""

import pytest
import torch

from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.kernels.cpu.bindings import load
from tests.support.engine import decode, whole
from tests.support.families import DELTA_CASES, IN_BLOCKS
from tests.support.v4 import write_case

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels are not built")
# Over a window, a compressed row of 128 and what an indexer chooses.
IDS = torch.randint(2, 4000, (290,), generator=torch.Generator().manual_seed(3)).tolist()
# Groups of rows of o_a_proj that fill tiles, so that decode is one native call; odd ones do not.
REPEATED = IDS[:50] * 4
CASES = {"v4": {"o_lora_rank": 32}, "v4-odd": {}, "v3.2-sparse": {}, "glm-5-shared": {}}
CASES |= {"v3-groups-yarn": {}, "glm4": {}, "gpt-oss": IN_BLOCKS, "dots-wide-window": {}}
CASES |= {"next": {}, "qwen3.5-odd": {}, "kimi": {}}


@pytest.fixture(scope="module", params=CASES)
def export(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    changes = CASES[request.param] | {"max_position_embeddings": 1024}
    if has_head := request.param not in (
        "glm-5-shared",
        "gpt-oss",
        "dots-wide-window",
        *DELTA_CASES,
    ):
        changes["num_nextn_predict_layers"] = 1
    given = folder / "source", request.param, torch.bfloat16
    write_case(*given, hub="v4" in request.param, **changes)
    quantize(folder / "source", folder / "export", keep_mtp=has_head)
    return folder / "export"


def opened(export, **options):
    return Runtime.open(export, context=400, **{"draft": "off", **options})


def texts(runtime):
    """Ids and log-probabilities behind three prompts at once, one longer than a window."""
    streams = runtime.generate_all([IDS[:200], IDS[:9], IDS[50:90]], max_new_tokens=10)
    return [[(token.id, token.logprob) for token in stream] for stream in streams]


@pytest.fixture(scope="module")
def wanted(export):
    """Logits of a pass, texts, and logits of what repeats."""
    with opened(export, sequences=3) as runtime:
        return runtime.logits(IDS), texts(runtime), runtime.logits(REPEATED)


WAYS = [
    {"slots": 7, "sequences": 3},
    {"slots": 9, "sequences": 3, "prefetch": False, "threads": 3},
    {},  # one text after the other, and decode beside prefill
    {"draft": "ngram", "sequences": 3},
    {"draft": "mtp", "sequences": 3},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_same_bits_in_every_way(export, wanted, always_guessing, eager, way):
    lacks = {"ngram": ("v4-odd",), "mtp": ("odd", "gpt-oss", "glm-5", "dots", "next", "kimi")}
    if any(name in str(export) for name in lacks.get(way.get("draft"), ())):
        pytest.skip("no decode in one call, or no head that predicts one token more")
    with opened(export, **way) as runtime:
        for start in () if way else (1, 126, 250):
            got = decode(runtime, IDS[:start], IDS[start : start + 12])
            assert torch.equal(got, wanted[0][start - 1 : start + 12])
        assert torch.equal(runtime.logits(IDS), wanted[0])
        assert texts(runtime) == wanted[1]
        if "slots" in way and way.get("prefetch", True):
            assert runtime.stats()["prefetch"]["layer"]["used"] > 0
        if "draft" in way:
            got = decode(runtime, REPEATED[:120], REPEATED[120:])
            assert torch.equal(got, wanted[2][119:])
            assert runtime.stats()["drafts"]["drafted"] > 0
        whole(runtime)
