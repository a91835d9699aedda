"""The head that predicts one token more: kept in an export, planned, loaded, and drafting; the text
is bitwise that without, whatever it says."""

import json
import random
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from slotmoe.errors import ConfigError, ExportError
from slotmoe.model.mtp import MtpHead
from slotmoe.model.names import expert_name
from slotmoe.offload.head import HeadDrafts
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.ingest.synth import synthesize
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.offload.policy.drafts import Asking, Drafting
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.scheduler import Scheduler
from slotmoe.quant.codec import DEFAULT_CODECS
from slotmoe.quant.export.layout import MANIFEST, RESIDENT, layer_file
from slotmoe.quant.export.reader import Export
from slotmoe.quant.export.verify import damaged_files
from slotmoe.quant.export.writer import write_predictor
from slotmoe.quant.kernels.cpu.bindings import load
from tests.offload.test_scheduler import Caller
from tests.support import plain
from tests.support.engine import IDS, RUN, whole
from tests.support.exported import resign
from tests.support.families import CASES, write_family
from tests.support.interrupts import interrupted_at, lines_of
from tests.support.predictor import random_tensors

needs_kernels = pytest.mark.skipif(load() is None, reason="the native kernels are not built")
MTP = {"num_nextn_predict_layers": 1}
HEAD = layer_file(3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a head, and exports of it without and with the head."""
    folder = tmp_path_factory.mktemp("mtp")
    family, overrides = CASES["v3-groups-yarn"]
    write_family(folder / "source", family, torch.bfloat16, **overrides, **MTP)
    quantize(folder / "source", folder / "without")
    quantize(folder / "source", folder / "export", keep_mtp=True)
    return folder


def opened(folder, draft="mtp", **options):
    return Runtime.open(folder / "export", context=96, draft=draft, **options)


@pytest.fixture
def eager(monkeypatch):
    """The head is always asked, and what it says is always computed."""

    def all_of(self, chances):
        return [len(each) for each in chances]

    monkeypatch.setattr(Drafting, "lengths", all_of)
    monkeypatch.setattr(Drafting, "pays", lambda self, chance, cost: True)


def text_of(runtime, count=40, prompt=12, **options):
    """Ids and log-probabilities."""
    tokens = list(runtime.generate(IDS[:prompt], count, **options))
    return [(token.id, token.logprob) for token in tokens]


# The export


def test_the_head_is_one_more_layer_and_changes_no_other_byte(folder):
    with Export.open(folder / "without") as without, Export.open(folder / "export") as kept:
        assert (without.layers, without.mtp_layer) == ((1, 2), None)
        assert (kept.layers, kept.mtp_layer) == ((1, 2, 3), 3)
        experts = [export.manifest["experts"] for export in (without, kept)]
        files = [export.manifest["files"] for export in (without, kept)]
        tensors = [each[RESIDENT]["tensors"] for each in files]
    assert experts[1] == experts[0] | {"layers": [1, 2, 3], "mtp_layer": 3}
    assert files[1].keys() - files[0].keys() == {HEAD}
    assert all(files[0][layer_file(layer)] == files[1][layer_file(layer)] for layer in (1, 2))
    assert tensors[0].items() < tensors[1].items()
    more = {name.split("layers.3.")[1] for name in tensors[1].keys() - tensors[0].keys()}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} < more
    assert not any("embed_tokens" in name or "shared_head.head" in name for name in more)


def test_an_export_is_repaired_or_refused_as_any_other(folder, tmp_path):
    made, notes = tmp_path / "export", []
    quantize(folder / "source", made, keep_mtp=True)
    with pytest.raises(ExportError, match="overwrite"):
        quantize(folder / "source", made)
    with pytest.raises(ExportError, match="overwrite"):
        quantize(folder / "source", folder / "without", keep_mtp=True)
    manifest = json.loads((made / MANIFEST).read_text())
    before = (made / HEAD).read_bytes()
    (made / HEAD).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert [*damaged_files(made, manifest, lambda *_: None)] == [HEAD]
    quantize(folder / "source", made, keep_mtp=True, notify=notes.append)
    assert (made / HEAD).read_bytes() == before and "made again" in notes[0]


@pytest.mark.parametrize("layer", [2, 4, True, "3", None])
def test_a_manifest_that_names_another_layer_is_refused(folder, tmp_path, layer):
    quantize(folder / "source", tmp_path / "export", keep_mtp=True)
    resign(tmp_path / "export", lambda manifest: manifest["experts"].update(mtp_layer=layer))
    with pytest.raises(ExportError, match="mtp_layer") as caught:
        Export.open(tmp_path / "export")
    assert "\n" not in str(caught.value)


# Opened


def test_what_is_not_asked_for_takes_nothing(folder):
    plans = []
    for name in ("without", "export"):
        with Runtime.open(folder / name, context=96, draft="off") as runtime:
            assert runtime.model.head is None and not runtime.config.mtp
            components = runtime.plan.components | {"runtime": 0}  # what the process has
            plans.append((components, runtime.plan.slots, text_of(runtime)))
    assert plans[0] == plans[1]


@needs_kernels
def test_the_plan_has_the_head(folder):
    with opened(folder, "ngram") as without, opened(folder) as runtime:
        assert runtime.plan.slots == without.plan.slots + 8
        parts = [each.plan.components for each in (without, runtime)]
        caches = [part["latent KV cache"] for part in parts]
        assert caches[1] * 3 == caches[0] * 4
        assert parts[1]["drafting head"] > 64 * 128 and "drafting head" not in parts[0]


@needs_kernels
def test_refusals(folder, slotmoe):
    with pytest.raises(ConfigError, match="quantize --keep-mtp"):
        Runtime.open(folder / "without", draft="mtp")
    with pytest.raises(ConfigError, match=r"draft mtp: .* leave it out"):
        Runtime.open(folder / "export", draft="mtp", kernels="torch")
    with pytest.raises(ConfigError, match=r"draft mtp: .* leave it out"):
        Runtime.open(folder / "source", draft="mtp", quantize=False)
    for arguments in (
        ("quantize", "sample", folder / "none", "--keep-mtp"),
        ("synth", "v2-lite", folder / "none", "--keep-mtp"),
        ("plan", "moonlight", "--draft", "mtp"),
    ):
        code, _, err = slotmoe(*map(str, arguments))
        assert code == 2 and "num_nextn_predict_layers is 0, expected 1 or more" in err
        assert f"leave {arguments[-1] if arguments[-1] != 'mtp' else '--draft mtp'} out" in err
        assert not (folder / "none").exists()
    code, _, err = slotmoe("plan", str(folder / "without"), "--draft", "mtp")
    assert code == 2 and "quantize --keep-mtp" in err


# The head's arithmetic


@needs_kernels
def test_kernels_lose_of_the_head_what_they_lose_of_the_network(folder, tmp_path):
    """Beside plain float64 on the export's own weights."""
    ids, weights = IDS[:14], {}
    with Export.open(folder / "export") as export:
        for name in export.manifest["files"][RESIDENT]["tensors"]:
            if not name.endswith(".scale"):
                weight = export.resident(name)
                weights[name] = (
                    weight.float() if isinstance(weight, Tensor) else weight.dequantize()
                )
        for layer in export.layers:
            for expert in range(export.experts):
                for projection, weight in export.expert(layer, expert).items():
                    weights[expert_name(layer, expert, projection)] = weight.contiguous()
    save_file(weights, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "export" / "config.json").read_bytes())
    with opened(folder) as runtime:
        (hidden_TD,) = runtime.sequences[0].run(ids)
        main = runtime.passes.logits(hidden_TD)
        drafts = drafts_of(runtime)
        head = runtime.model.head.head(drafts.read(ids, hidden_TD[:-1].clone()))
    errors = [
        ((found - right).norm(dim=1) / right.norm(dim=1)).median().item()
        for found, right in (
            (main, torch.from_numpy(plain.logits(tmp_path, ids)).float()),
            (head, torch.from_numpy(plain.mtp_logits(tmp_path, ids)).float()),
        )
    ]
    assert errors[1] <= 2 * errors[0], errors


def drafts_of(runtime):
    """An empty cache of the head."""
    passes = runtime.passes
    return HeadDrafts(passes.model, passes.compute, Drafting(), 96)


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


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "warm"])
@pytest.mark.parametrize("slots", [None, 9], ids=["all experts", "few slots"])
def test_text_is_bitwise_that_without_drafts(
    folder, eager, monkeypatch, always_guessing, options, slots
):
    with opened(folder, "off") as runtime:
        want = text_of(runtime, **options)
    with opened(folder, slots=slots) as runtime:
        assert text_of(runtime, **options) == want  # as random weights draft
        before = runtime.stats()["drafts"]
        assert before["kind"] == "mtp" and before["drafted"] == before["passes"] > 20
        runtime.model.head.head = Prompter(monkeypatch, [id for id, _ in want])
        assert text_of(runtime, prompt=12, **options) == want
        now = runtime.stats()["drafts"]
        passes, accepted = (now[key] - before[key] for key in ("passes", "accepted"))
        assert runtime.model.experts.slots.consistent
        assert passes + accepted == 40 and accepted >= 13  # the last of the prompt anew
        whole(runtime)


@needs_kernels
def test_a_predictor_knows_the_other_layers_alone(folder, tmp_path, eager, always_guessing):
    shutil.copytree(folder / "export", tmp_path / "export")
    tensors = random_tensors(1)
    tensors["popularity"] = tensors["popularity"].abs()
    write_predictor(tmp_path / "export", tensors)
    with opened(folder, "off") as runtime:
        want = text_of(runtime)
    for draft in ("off", "mtp"):
        with opened(tmp_path, draft, slots=9) as runtime:
            assert text_of(runtime) == want
            stats = runtime.stats()
            assert stats["prefetch"]["layer"]["guessed"] > 0
            assert (stats["drafts"]["kind"], runtime.config.mtp) == (draft, draft == "mtp")
            whole(runtime)


@needs_kernels
def test_rows_of_the_head_are_those_of_one_pass_over_the_text(folder, eager, monkeypatch):
    """However the text came: a prompt in pieces, tokens one by one, right drafts and wrong ones."""
    with opened(folder, "off") as runtime:
        answer = [id for id, _ in text_of(runtime, 30)]
    ids = [*IDS[:12], *answer]
    with opened(folder) as runtime:
        runtime.model.head.head = Prompter(monkeypatch, answer)
        sequence = runtime.sequences[0]
        for start, end in ((0, 5), (5, 6), (6, 12)):
            sequence.append(ids[start:end])
        for id in ids[12:]:
            sequence.append([id])
        came, drafts = sequence._head._cache, drafts_of(runtime)
        assert runtime.stats()["drafts"]["accepted"] >= 10 and came.length >= len(ids) - 3
        sequence.rewind(0)
        (hidden_TD,) = sequence.run(ids)
        drafts.read(ids, hidden_TD[:-1].clone())
        rows_SX = drafts._cache.layers[0]
        assert torch.equal(rows_SX[: came.length], came.layers[0, : came.length])
        # What is missing is left out, and what is there already is not read again.
        drafts.read(ids[:9], hidden_TD[4:8].clone())
        assert drafts._cache.length == 8 and torch.equal(rows_SX[:8], came.layers[0, :8])
        with monkeypatch.context() as patch:
            patch.setattr(MtpHead, "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                drafts.read(ids[:5], hidden_TD[3:4].clone())
        drafts.read(ids[:7], hidden_TD[5:6].clone())  # rows 3 and 4 are not sure any more
        assert drafts._cache.length == 1
        drafts.read([*ids[:4], 9, 9], hidden_TD[4:5].clone())
        assert drafts._cache.length == 1


@needs_kernels
def test_another_text_or_a_rewind(folder, eager):
    with opened(folder, "off") as plainly, opened(folder) as runtime:
        rows = []
        for each in (plainly, runtime):
            sequence, found = each.sequences[0], []
            for length, ids in ((0, IDS[:20]), (12, IDS[30:40]), (5, IDS[2:3]), (0, IDS[5:9])):
                sequence.rewind(length)
                found.append(sequence.append(ids))
                found += [sequence.append([id]) for id in IDS[20:26]]
            rows.append(torch.cat(found))
        assert torch.equal(*rows)


@needs_kernels
def test_several_answers_in_one_pass(folder, eager):
    prompts = [IDS[:12], IDS[3:9], IDS[20:21], IDS[:14]]
    with opened(folder, "off") as plainly, opened(folder, sequences=4) as runtime:
        batch = Scheduler(runtime, 4, 0)
        callers = [Caller(batch, runtime, ids) for ids in prompts]
        found = [caller.wait().answer.ids for caller in callers]
        assert found == [[token.id for token in plainly.generate(i, 24)] for i in prompts]
        batch.close()
        assert batch.problem is None and runtime.stats()["drafts"]["drafted"] > 60


@needs_kernels
def test_interrupted_at_some_lines(folder, eager):
    """The text goes on from what the sequence holds, whichever line an exception came at."""
    with opened(folder, "off") as plainly, opened(folder, slots=9) as runtime:

        def compute(each):
            sequence = each.sequences[0]
            sequence.rewind(8)
            rows = [sequence.append(IDS[8:20])]
            return torch.cat([*rows, *(sequence.append([id]).clone() for id in IDS[20:26])])

        for each in (plainly, runtime):
            each.sequences[0].append(IDS[:8])
        want = compute(plainly)
        assert torch.equal(compute(runtime), want)
        lines, chance, came = lines_of(lambda: compute(runtime)), random.Random(5), 0
        ours = [line for line in sorted(lines) if line[0].endswith(("/head.py", "/mtp.py"))]
        for line in chance.sample(ours, 12):
            with suppress(Exception):
                moment = chance.randint(1, max(1, lines[line] * 3 // 4))
                came += interrupted_at(line, moment, lambda: compute(runtime), KeyboardInterrupt)
            assert torch.equal(compute(runtime), want), line
        whole(runtime)
        assert came > 6


def answers(chance, one, more, cost, count=2000):
    """Tokens for each time of a pass of one row, where the head is right by ``chance``."""
    drafting, asking, text, spent, luck = Drafting(), Asking(), [0], 0.0, random.Random(4)
    while len(text) < count:
        drafted, seconds = False, 0.0
        asking.came(text)
        if asking.pays(drafting):
            asking.answered(len(text), 1, cost)
            drafted, seconds = drafting.lengths([[asking.chance]]) == [1], cost
        took = one + more * drafted
        drafting.measured(1 + drafted, int(drafted), took)
        right = luck.random() < chance
        text += [int(right)] + [2] * (drafted and right)
        spent += took + seconds
    return len(text) * one / spent


@pytest.mark.parametrize(("chance", "more"), [(0.9, 0.3), (0.7, 0.3), (0.3, 0.3), (0.9, 1.1)])
def test_the_head_is_asked_as_long_as_that_pays(chance, more):
    best = max(1.0, (1 + chance) / (1 + more + 0.06))
    assert answers(chance, 1.0, more, 0.06) > 0.95 * best
    assert answers(0.0, 1.0, more, 0.06) > 0.98


@needs_kernels
@pytest.mark.usefixtures("nightly")
def test_peak_memory_is_within_three_percent_of_the_prediction(tmp_path):
    """GLM-4.7-Flash's widths with fewer layers and its head."""
    config = json.loads(geometry_path("glm-4.7-flash").read_text()) | {"num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    where = tmp_path / "config.json", tmp_path / "export"
    synthesize(*where, "int8", DEFAULT_CODECS, 1, False, lambda *_: None, keep_mtp=True)
    run = RUN.replace("context=1024", "context=1024, draft='mtp'")
    command = [sys.executable, "-c", run, "200", "900", str(tmp_path / "export")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured, predicted, _ = json.loads(done.stdout)
    assert measured == pytest.approx(predicted, rel=0.03)
