"""The head that predicts one token more: kept in an export, planned, loaded, and drafting; the text
is bitwise that without, whatever it says."""

import shutil
from itertools import product

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from slotmoe.errors import ConfigError, ExportError
from slotmoe.model.names import expert_name
from slotmoe.model.network import MtpHead
from slotmoe.offload.engine.passes import HeadDrafts
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.policy.passes import Asking, Drafting
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.layout import RESIDENT, layer_file
from slotmoe.quant.export.reader import Export
from slotmoe.quant.kernels.cpu.bindings import load
from tests.support import plain
from tests.support.engine import IDS, decode, whole
from tests.support.exported import resign

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels are not built")
HEAD = layer_file(3)


def opened(folder, draft="mtp", **options):
    return Runtime.open(folder / "export", context=96, draft=draft, **options)


@pytest.fixture(scope="module")
def plainly(with_head):
    """Without drafts."""
    with opened(with_head, "off") as runtime:
        yield runtime


@pytest.fixture(scope="module")
def drafting(with_head):
    with opened(with_head) as runtime:
        yield runtime


def text_of(runtime, count=40, **options):
    """Ids and log-probabilities."""
    runtime.engine.empty()
    tokens = list(runtime.generate(IDS[:12], count, **options))
    return [(token.id, token.logprob) for token in tokens]


# The export


def test_the_head_is_one_more_layer_and_changes_no_other_byte(with_head):
    with Export.open(with_head / "without") as without, Export.open(with_head / "export") as kept:
        assert (without.layers, without.mtp_layer) == ((1, 2), None)
        assert (kept.layers, kept.mtp_layer) == ((1, 2, 3), 3)
        files = [export.manifest["files"] for export in (without, kept)]
    tensors = [each[RESIDENT]["tensors"] for each in files]
    assert files[1].keys() - files[0].keys() == {HEAD}
    assert all(files[0][layer_file(layer)] == files[1][layer_file(layer)] for layer in (1, 2))
    assert tensors[0].items() < tensors[1].items()
    more = {name.split("layers.3.")[1] for name in tensors[1].keys() - tensors[0].keys()}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} < more
    assert not any("embed_tokens" in name or "shared_head.head" in name for name in more)


def test_another_export_is_kept_and_a_layer_that_is_no_head_refused(with_head, tmp_path):
    made = shutil.copytree(with_head / "export", tmp_path / "export")
    with pytest.raises(ExportError, match="overwrite"):
        quantize(with_head / "source", made)
    for layer in (2, True, "3"):
        resign(made, lambda manifest, layer=layer: manifest["experts"].update(mtp_layer=layer))
        with pytest.raises(ExportError, match="mtp_layer"):
            Export.open(made)


# Opened


def test_refusals(with_head, slotmoe):
    for name, options, message in (
        ("without", {}, "quantize --keep-mtp"),
        ("export", {"kernels": "torch"}, r"draft mtp: .* leave it out"),
        ("source", {"quantize": False}, r"draft mtp: .* leave it out"),
    ):
        with pytest.raises(ConfigError, match=message):
            Runtime.open(with_head / name, draft="mtp", **options)
    for line in ("quantize sample none --keep-mtp", "plan moonlight --draft mtp"):
        code, _, err = slotmoe(*line.split())
        assert code == 2 and "num_nextn_predict_layers is 0, expected 1 or more" in err


# The head's arithmetic


def test_kernels_lose_of_the_head_what_they_lose_of_the_network(with_head, drafting, tmp_path):
    """Beside plain float64 on the export's own weights."""
    ids, weights = IDS[:14], {}
    with Export.open(with_head / "export") as export:
        for name in export.manifest["files"][RESIDENT]["tensors"]:
            if not name.endswith(".scale"):
                kept = export.resident(name)
                weights[name] = kept.float() if isinstance(kept, Tensor) else kept.dequantize()
        for layer, expert in product(export.layers, range(export.experts)):
            for projection, weight in export.expert(layer, expert).items():
                weights[expert_name(layer, expert, projection)] = weight.contiguous()
    save_file(weights, tmp_path / "weights.safetensors")
    shutil.copy(with_head / "export" / "config.json", tmp_path)
    (hidden_TD,) = drafting.hidden(ids)
    engine = drafting.engine

    def compute():
        read = drafts_of(drafting).read(ids, hidden_TD[:-1].clone())
        return engine.batch.passes.logits(hidden_TD), drafting.model.head.head(read)

    main, head = engine.call(compute)
    right = plain.logits(tmp_path, ids), plain.mtp_logits(tmp_path, ids)
    errors = []
    for found, wanted in zip((main, head), map(torch.from_numpy, right), strict=True):
        lost = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
        errors.append(lost.median().item())
    assert errors[1] <= 2 * errors[0], errors


def drafts_of(runtime):
    """An empty cache of the head."""
    return HeadDrafts(runtime.model, runtime.engine.batch.passes.compute, Drafting())


# Drafts


class Prompter:
    """In the head's place: what it says is right but for every third token."""

    def __init__(self, monkeypatch, answer):
        self.texts, self._answer = [], answer
        read = HeadDrafts.read

        def noted(drafts, tokens, hidden_RD):
            self.texts.append(tokens)
            return read(drafts, tokens, hidden_RD)

        monkeypatch.setattr(HeadDrafts, "read", noted)

    def __call__(self, stream_RD):
        place = len(self.texts[-1]) - 12
        wrong = place % 3 == 0 or place >= len(self._answer)
        logits_1V = torch.zeros(1, 4096)
        logits_1V[0, 7 if wrong else self._answer[place]] = 1.0
        return logits_1V


@pytest.mark.parametrize(("slots", "options"), [(None, {}), (9, {"temperature": 0.8, "seed": 3})])
def test_text_is_bitwise_that_without_drafts(
    with_head, plainly, eager, monkeypatch, always_guessing, slots, options
):
    want = text_of(plainly, **options)
    with opened(with_head, slots=slots) as runtime:
        assert text_of(runtime, **options) == want  # as random weights draft
        before = runtime.stats()["drafts"]
        assert before["kind"] == "mtp" and before["drafted"] == before["passes"] > 20
        runtime.model.head.head = Prompter(monkeypatch, [id for id, _ in want])
        assert text_of(runtime, **options) == want
        now = runtime.stats()["drafts"]
        passes, accepted = (now[key] - before[key] for key in ("passes", "accepted"))
        assert passes + accepted == 39 and accepted >= 13
        assert slots is None or runtime.stats()["prefetch"]["layer"]["guessed"] > 0
        whole(runtime)


def test_rows_of_the_head_are_those_of_one_pass_over_the_text(
    plainly, drafting, eager, monkeypatch
):
    """However the text came: a prompt in pieces, tokens one by one, right drafts and wrong ones."""
    answer = [id for id, _ in text_of(plainly, 30)]
    ids, runtime = [*IDS[:12], *answer], drafting
    before, sequence = runtime.stats()["drafts"]["accepted"], runtime.engine.batch.sequences[0]
    monkeypatch.setattr(runtime.model.head, "head", Prompter(monkeypatch, answer))
    runtime.engine.empty()
    decode(runtime, ids[:5], [])
    decode(runtime, ids[:12], ids[12:])
    came, drafts = sequence._head._state, drafts_of(runtime)

    def read(*given):
        runtime.engine.call(lambda: drafts.read(*given))

    assert runtime.stats()["drafts"]["accepted"] - before >= 10
    assert came.length >= len(ids) - 3
    runtime.engine.empty()
    (hidden_TD,) = runtime.hidden(ids)
    read(ids, hidden_TD[:-1].clone())
    rows_SX = drafts._state.layers[0]
    assert torch.equal(rows_SX[: came.length], came.layers[0, : came.length])
    with monkeypatch.context() as patch:
        patch.setattr(MtpHead, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            read(ids[:5], hidden_TD[3:4].clone())
    read(ids[:7], hidden_TD[5:6].clone())  # rows 3 and 4 are not sure any more
    assert drafts._state.length == 1


def test_the_head_is_asked_as_long_as_that_pays():
    asking, drafting = Asking(), Drafting()
    assert asking.pays(drafting)  # before anything was measured
    drafting.measured(1, 0, 1.0)
    drafting.measured(2, 1, 1.3)
    for token in (1, 0, 1):  # it is right, then wrong, then right again
        for place in range(200):
            asking.answered(place, token, seconds=0.06)
            asking.came([1] * (place + 1))
        assert asking.pays(drafting) == (token == 1)
    asking.answered(0, 0, seconds=0.06)
    for place in range(200):
        asking.answered(place, 1, seconds=1.0)
    assert not asking.pays(drafting)  # right, but it takes too long
    assert any(asking.pays(drafting) for _ in range(200))  # tried again now and then
