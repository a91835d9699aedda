"""Drafts, by what repeats and by a head that predicts one token more: the text is bitwise that
without, whatever they say.  (How an export keeps the head, and who refuses to draft.)"""

import pytest
import torch

from slotmoe.errors import ConfigError
from slotmoe.model.network import Network
from slotmoe.offload.engine.passes import HeadDrafts
from slotmoe.offload.policy.passes import Drafting
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.layout import RESIDENT, layer_file
from slotmoe.quant.export.reader import Export
from slotmoe.quant.kernels.cpu.bindings import load
from tests.support.engine import IDS, decode, whole

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels are not built")


def opened(folder, draft="mtp", **options):
    return Runtime.open(folder / "export", context=96, draft=draft, **options)


def text_of(runtime, **options):
    """Ids and log-probabilities."""
    runtime.engine.empty()
    tokens = list(runtime.generate(IDS[:12], 40, **options))
    return [(token.id, token.logprob) for token in tokens]


def test_the_head_is_one_more_layer_and_changes_no_other_byte(with_head):
    with Export.open(with_head / "without") as without, Export.open(with_head / "export") as kept:
        assert (without.layers, without.mtp_layer) == ((1, 2), None)
        assert (kept.layers, kept.mtp_layer) == ((1, 2, 3), 3)
        files = [export.manifest["files"] for export in (without, kept)]
    tensors = [each[RESIDENT]["tensors"] for each in files]
    assert files[1].keys() - files[0].keys() == {layer_file(3)}
    assert all(files[0][layer_file(layer)] == files[1][layer_file(layer)] for layer in (1, 2))
    assert tensors[0].items() < tensors[1].items()
    more = {name.split("layers.3.")[1] for name in tensors[1].keys() - tensors[0].keys()}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} < more
    assert not any("embed_tokens" in name or "shared_head.head" in name for name in more)


def test_refusals(with_head):
    for name, draft, options, message in (
        ("without", "mtp", {}, "quantize --keep-mtp"),
        ("export", "mtp", {"kernels": "torch"}, r"draft mtp: .* leave it out"),
        ("source", "mtp", {"quantize": False}, r"draft mtp: .* leave it out"),
        ("export", "ngram", {"kernels": "torch"}, r"draft ngram: torch .* leave it out"),
        ("export", "tree", {}, r"draft 'tree' .* auto, off, ngram, mtp"),
    ):
        with pytest.raises(ConfigError, match=message):
            Runtime.open(with_head / name, draft=draft, **options)
    with Runtime.open(with_head / "export", kernels="torch", context=64, draft="auto") as runtime:
        assert "not bitwise" in runtime.stats()["drafts"]["why"]


def test_what_a_row_costs_is_counted_from_a_pass_of_as_many_texts():
    likely, unlikely = [[0.9, 0.8]] * 4, [[0.3]] * 4
    drafting = Drafting()
    assert drafting.lengths(likely, 9) == [0] * 4  # no such pass was measured
    for _ in range(20):
        drafting.measured(4, 0, 2.0)
    assert drafting.lengths(unlikely, 9) == [0] * 4 and sum(drafting.lengths(likely, 9)) == 1
    assert drafting.lengths(likely[:1], 9) == [0]
    for _ in range(20):
        drafting.measured(8, 4, 2.04)
    assert drafting.lengths(unlikely, 9) == [1] * 4  # rows cost little


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
    with_head, eager, monkeypatch, always_guessing, slots, options
):
    with opened(with_head, "off") as runtime:
        want = text_of(runtime, **options)
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
        monkeypatch.setattr(Drafting, "pays", lambda self, chance, cost: False)
        assert text_of(runtime, **options) == want  # it is asked once: what pays may change
        assert [*map(len, runtime.model.head.head.texts[-2:])] == [12, 45]
        whole(runtime)


def test_what_is_drafted_does_not_outlast_a_change(sample_export, eager, monkeypatch):
    """A text that goes on elsewhere, another token, or a pass that fails when it is computed."""
    both, drafts, left, forward = [], [], [], Network.forward

    def failing(*arguments):
        hidden_TD = forward(*arguments)
        if left and left.pop() == "last":
            raise MemoryError
        return hidden_TD

    monkeypatch.setattr(Network, "forward", failing)
    for draft in "off", "ngram":
        with Runtime.open(sample_export, context=200, sequences=4, draft=draft) as runtime:
            ids = runtime.encode("The people of the United States have a government. " * 6)
            rows = [decode(runtime, ids[:40], ids[40:42])]
            for new in ids[12], 7:
                rows.append(decode(runtime, ids[:30], [ids[30], new, ids[41]]))
                rows.append(decode(runtime, [*ids[:5], *ids[20:30]], ids[30:36]))
            left += ["last", "decoded", "prompt"]
            with pytest.raises(MemoryError):
                decode(runtime, ids[:40], [ids[40], 7])
            assert max(sequence.length for sequence in runtime.engine.batch.sequences) == 41
            rows.append(decode(runtime, ids[:41], ids[41:60]))
            both.append(torch.cat(rows))
            drafts.append(runtime.stats()["drafts"].get("drafted", 0))
    assert torch.equal(*both) and drafts[1] > drafts[0] == 0
