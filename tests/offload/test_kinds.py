"""Every kind of attention under the engine: one text has the same bits, however it is computed."""

import pytest
import torch

from slotmoe.offload.engine.passes import HeadDrafts
from slotmoe.offload.engine.requests import Forced, Request
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.kernels.cpu.bindings import load
from tests.support import v4
from tests.support.engine import decode, passes_of, together, until, whole

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels are not built")
# Over a window, a compressed row of 128 and what an indexer chooses.
IDS = torch.randint(2, 4000, (290,), generator=torch.Generator().manual_seed(3)).tolist()
# Groups of rows of o_a_proj that fill tiles, so that decode is one native call; odd ones do not.
CASES = {"v4": {"o_lora_rank": 32}, "v4-odd": {}, "v3.2-sparse": {}, "glm-5-shared": {}}


@pytest.fixture(scope="module", params=CASES)
def export(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    changes = CASES[request.param] | {"max_position_embeddings": 1024}
    if has_head := request.param != "glm-5-shared":
        changes["num_nextn_predict_layers"] = 1
    given = request.param, torch.bfloat16
    v4.write_v4(folder / "source", *given, hub="v4" in request.param, **changes)
    quantize(folder / "source", folder / "export", keep_mtp=has_head)
    return folder / "export"


def opened(export, **options):
    return Runtime.open(export, context=400, **{"draft": "off", **options})


def texts(runtime):
    """Ids and log-probabilities behind three prompts at once, one longer than a window."""
    streams = runtime.generate_all([IDS[:200], IDS[:9], IDS[50:90]], max_new_tokens=24)
    return [[(token.id, token.logprob) for token in stream] for stream in streams]


@pytest.fixture(scope="module")
def wanted(export):
    """Logits of a pass, and texts."""
    with opened(export, sequences=3) as runtime:
        return runtime.logits(IDS), texts(runtime)


def test_decode_equals_prefill(export, wanted):
    with opened(export) as runtime:
        for start in (1, 126, 250):
            got = decode(runtime, IDS[:start], IDS[start : start + 12])
            assert torch.equal(got, wanted[0][start - 1 : start + 12])


def check(export, draft):
    if (draft != "off" and "odd" in str(export)) or (draft == "mtp" and "glm" in str(export)):
        pytest.skip("no decode in one call, or no head that predicts one token more")


WAYS = [
    {"slots": 7, "sequences": 3},
    {"slots": 9, "sequences": 3, "prefetch": False, "threads": 1},
    {},  # one text after the other
    {"draft": "ngram", "sequences": 3},
    {"draft": "mtp", "sequences": 3},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_same_bits_in_every_way(export, wanted, always_guessing, eager, way):
    check(export, way.get("draft", "off"))
    repeated = IDS[:50] * 5
    with opened(export, **way) as runtime:
        assert torch.equal(runtime.logits(IDS), wanted[0])
        assert texts(runtime) == wanted[1]
        if "draft" in way:
            got = decode(runtime, repeated[:120], repeated[120:])
            with opened(export) as plainly:
                assert torch.equal(got, plainly.logits(repeated)[119:])
            assert runtime.stats()["drafts"]["drafted"] > 0
        whole(runtime)


PROMPTS = [IDS[:200], IDS[60:69], IDS[70:290], IDS[5:46]]


@pytest.mark.parametrize("draft", ["off", "ngram", "mtp"])
def test_prompts_in_the_same_passes(export, draft, eager, monkeypatch):
    """Which take 170 tokens of all, in steps of 100; the ends of some are decoded meanwhile."""
    check(export, draft)
    monkeypatch.setattr("slotmoe.offload.engine.loading.PREFILL_CHUNK", 100)
    following = [*IDS[20:40], *IDS[20:40]]
    with opened(export) as runtime:
        alone = [decode(runtime, prompt, following) for prompt in PROMPTS]
    with opened(export, sequences=4, draft=draft) as runtime:
        runtime.plan.__dict__["prefill_chunk"] = 170
        passes = passes_of(runtime, monkeypatch)
        assert all(map(torch.equal, together(runtime, PROMPTS, following), alone))
        assert any(len(rows) > 2 and max(rows) < 0 for rows in passes)
        assert any(min(rows) < 0 < max(rows) for rows in passes)
        whole(runtime)


def test_a_head_that_fails_ends_the_texts_of_its_pass(export, monkeypatch):
    """Each is as long as its state then, so that both can be cut: in the second pass, over all of a
    text and 200 tokens or more of another."""
    check(export, "mtp")
    ids = torch.randint(2, 4000, (1100,), generator=torch.Generator().manual_seed(4)).tolist()
    prompts, calls, read = [ids[:900], ids[900:]], [], HeadDrafts.read
    requests = [Request(prompt, Forced(())) for prompt in prompts]
    with Runtime.open(export, context=1000, sequences=2, draft="mtp") as runtime:
        runtime.plan.__dict__["prefill_chunk"] = 420
        alone = together(runtime, prompts)
        runtime.engine.empty()

        def fail(*given):
            calls.append(given)
            if len(calls) == 1:
                runtime.engine.submit(requests[1])
            if len(calls) == 2:
                raise OSError(5, "Input/output error")
            return read(*given)

        monkeypatch.setattr(HeadDrafts, "read", fail)
        passes = passes_of(runtime, monkeypatch)
        runtime.engine.submit(requests[0])
        until(lambda: runtime.engine.batch.totals.finished.get("error") == 2)
        assert passes[0] == [-420] and passes[1][0] == -200 >= passes[1][1]
        assert all(map(torch.equal, together(runtime, prompts), alone))


def test_what_gates_choose_by_the_token_is_read_first(export, always_guessing):
    if "v4" not in str(export):
        pytest.skip("its gates choose by what they see")
    with opened(export, slots=7) as runtime:
        list(runtime.generate(IDS[:20], max_new_tokens=16))
        counts = runtime.stats()["prefetch"]["table"]
        assert counts["right"] == counts["guessed"] == counts["asked"] > 0
        assert counts["used"] > 0 and counts["wasted"] == 0


def test_plain_torch_is_near(export, wanted):
    with opened(export, kernels="torch") as runtime:
        error = (runtime.logits(IDS) - wanted[0]).norm(dim=1) / wanted[0].norm(dim=1)
        assert error[:4].max() < 0.1  # later ones may have chosen other experts or positions
