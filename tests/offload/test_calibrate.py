"""The predictor: its file, its training, what it is worth, and that nothing damaged or half-written
is believed."""

import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file

from slotmoe.errors import ExportError
from slotmoe.model.config import parse_config
from slotmoe.model.names import GATE, POST_NORM, layer_tensor
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.predictor import NextGate, Predictor
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.study import calibrate as module
from slotmoe.offload.study.calibrate import calibrate, record, split
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.quant.export.layout import MANIFEST, checksum, predictor_parts
from slotmoe.quant.export.reader import Export
from slotmoe.quant.export.writer import write_predictor
from tests.support.disk import die_at_change, forked, tree
from tests.support.exported import resign
from tests.support.predictor import D, E, K, L, predictor_file, random_tensors, state_of
from tests.support.tiny import CONFIG, random_weights, write_checkpoint

ROOT = Path(__file__).parents[2]
GEOMETRIES = ROOT / "model" / "geometries"
TEXT = "\n".join(topics.values())


def quick(patch, steps=100, epochs=6, width=96):
    """Smaller and shorter trainings than real ones."""
    for name, value in (("MIN_STEPS", steps), ("EPOCHS", epochs), ("TOKEN_WIDTH", width)):
        patch.setattr(module, name, value)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a tiny checkpoint, its export, the same with a predictor of random numbers, and
    texts."""
    folder = tmp_path_factory.mktemp("calibrate")
    write_checkpoint(folder / "checkpoint")
    quantize(folder / "checkpoint", folder / "plain")
    shutil.copytree(folder / "plain", folder / "random")
    write_predictor(folder / "random", random_tensors(0))
    (folder / "text").write_text(TEXT[:30000])
    (folder / "other").write_text(TEXT[30000:40000])
    (folder / "few").write_text(TEXT[:4000])
    return folder


@pytest.fixture(scope="module")
def made(plain, heavy):
    """That folder with an export that was calibrated with its text, and what that reported."""
    seen, texts = [], [plain / "text"]
    shutil.copytree(plain / "plain", plain / "calibrated")
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        report = calibrate(plain / "calibrated", texts, lambda *now: seen.append(now), threads=1)
    (plain / "report").write_text(json.dumps(report))
    assert seen[-1] == ((plain / "text").stat().st_size,) * 2
    assert seen == sorted(seen)
    return plain


@pytest.fixture(scope="module")
def predictor(made):
    with Export.open(made / "calibrated") as export:
        return Predictor(export.predictor(), K, TorchBackend())


def predictors(export):
    return [path.name for path in export.iterdir() if "predictor" in path.name]


@pytest.fixture
def export(plain, tmp_path):
    return shutil.copytree(plain / "random", tmp_path / "export")


def test_file_is_what_the_format_says(made):
    path = predictor_file(made / "calibrated")
    with Export.open(made / "calibrated") as export:
        found = export.predictor()
        assert export.predictor_bytes == sum(tensor.nbytes for tensor in found.values())
    widths = found["token.in.weight"].shape[0], found["layer.in.weight"].shape[1]
    parts = predictor_parts(D, L, E, *widths)
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}
    assert kinds == {name: (part.dtype, part.shape) for name, part in parts.items()}
    with Export.open(made / "plain") as export:
        assert (export.predictor(), export.predictor_bytes) == (None, 0)
    theirs = load_file(path)
    assert all(torch.equal(theirs.pop(name), found[name]) for name in found) and not theirs
    assert path.read_bytes()[:8] == (4096 - 8).to_bytes(8, "little")
    order = sorted(parts, key=lambda name: -parts[name].dtype.itemsize)
    ours = b"".join(found[name].numpy().tobytes() for name in order)
    assert path.read_bytes()[4096:] == ours
    assert path.name == f"predictor-{checksum(ours)[:16]}.safetensors"


def test_scores_are_the_documented_arithmetic(made, predictor):
    with Export.open(made / "calibrated") as export:
        t = {name: tensor.double() for name, tensor in export.predictor().items()}

    def near(found, wanted):
        return torch.allclose(found.double(), wanted, atol=1e-4)

    def layers(x, name, row):
        for part in ("in", "out"):
            kinds = "weight", "weight.scale", "bias"
            weight, scale, bias = (t[f"{name}.{part}.{kind}"][row] for kind in kinds)
            x = weight * scale[:, None] @ x + bias
            x = x * x.sigmoid() if part == "in" else x
        return x

    seeded = torch.Generator().manual_seed(0)
    e, h = torch.randn(2, D, generator=seeded, dtype=torch.double) * torch.tensor([[0.01], [30.0]])
    both = torch.cat([e / e.square().mean().sqrt(), h / h.square().mean().sqrt()])
    token = layers(both, "token", ...).view(L, E)
    assert near(predictor.token_scores(e.float(), h.float()), token)
    layer = layers(h / h.square().mean().sqrt(), "layer", 0)
    assert near(predictor.layer_scores(0, h.float()), layer)
    a, b, c = t["layer.mix"][0]
    mixed = predictor.layer_scores(0, h.float(), token[1].float())
    assert near(mixed, a * layer + b * token[1] + c)
    many = predictor.layer_scores(0, h.float().repeat(5, 1))
    assert near(many, layer.repeat(5, 1))


def forged(name, change):
    """Replace one tensor, with every checksum made right again."""

    def apply(folder):
        with Export.open(folder) as export:
            tensors = export.predictor()
        tensors[name] = change(tensors[name])
        write_predictor(folder, tensors)

    return apply


def edited(change):
    def apply(folder):
        name = predictor_file(folder).name
        resign(folder, lambda manifest: change(manifest["files"], name))

    return apply


def reshaped(name, shape):
    """A manifest and a header that agree with each other, but not with the model."""
    return edited(lambda files, file: files[file]["tensors"][name].__setitem__("shape", shape))


def changed(change):
    """Change the file's bytes."""

    def apply(folder):
        path = predictor_file(folder)
        path.write_bytes(change(path.read_bytes()))

    return apply


def flip(at):
    return changed(lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at:][1:])


DAMAGES = {
    "truncated": changed(lambda data: data[:-1]),
    "missing": lambda folder: predictor_file(folder).unlink(),
    "header changed": flip(100),
    "last weight changed": flip(-1),
    "NaN scale": forged("layer.in.weight.scale", lambda tensor: tensor * float("nan")),
    "infinite popularity": forged("popularity", lambda tensor: tensor * float("inf")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_file_is_refused_by_name(damage, export):
    damage(export)

    def read():
        with Export.open(export) as opened:
            opened.predictor()

    with pytest.raises(ExportError, match=r"predictor-[0-9a-f]{16}\.safetensors: "):
        read()


BIAS, ZERO = "token.in.bias", "predictor-0123456789abcdef.safetensors"
FORGERIES = {
    "transposed": reshaped("token.in.weight", [2 * D, 96]),
    "huge": reshaped("token.in.weight", [1 << 40, 2 * D]),
    "fewer dimensions": reshaped("layer.in.weight", [3]),
    "dtype": edited(lambda files, name: files[name]["tensors"][BIAS].update(dtype="F16")),
    "tensor missing": edited(lambda files, name: files[name]["tensors"].pop("layer.mix")),
    "size": edited(lambda files, name: files[name].update(bytes=5)),
    "no tensors": edited(lambda files, name: files[name].pop("tensors")),
    "two": edited(lambda files, name: files.update({ZERO: files[name]})),
    "path": edited(lambda files, name: files.update({"../" + name: files.pop(name)})),
}


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
def test_forged_manifest_is_refused_before_anything_is_read(forgery, export):
    forgery(export)
    with pytest.raises(ExportError, match=MANIFEST):
        Export.open(export)


def test_predictor_of_another_model_is_not_written(export):
    before, parts = tree(export), predictor_parts(D, L, E + 1, 16, 16).items()
    with pytest.raises(ValueError, match="predictor"):
        write_predictor(export, {n: torch.zeros(part.shape, dtype=part.dtype) for n, part in parts})
    assert tree(export) == before


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("before", ["random", "plain"])
def test_killed_at_every_change_of_the_disk(before, plain, tmp_path, processes):
    """A new predictor is written by a child that kills itself."""
    new, states, work, survived = random_tensors(1), [], tmp_path / "work", False
    with Export.open(plain / before) as export:
        old = export.predictor()

    def run():
        die_at_change(len(states) + 1)
        write_predictor(work, new)

    while not survived:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(plain / before, work)
        survived = forked(run) == 0
        with Export.open(work) as export:
            states.append(state_of(export.predictor(), old, new))
        write_predictor(work, new)  # whatever a killed run left, the next one works and tidies up
        listed = [n for n in json.loads((work / MANIFEST).read_text())["files"] if "predictor" in n]
        assert predictors(work) == listed
    kept = states.count("none" if old is None else "old")
    assert kept and states == states[:kept] + ["new"] * (len(states) - kept), "the new one stays"
    assert len(states) >= 6


def test_same_text_gives_the_same_bytes(made, tmp_path, monkeypatch):
    export = shutil.copytree(made / "calibrated", tmp_path / "export")
    before = predictor_file(export)
    data = before.read_bytes()
    with monkeypatch.context() as patch:
        quick(patch)
        calibrate(export, [made / "text"], threads=1)
    assert predictor_file(export) == before
    assert before.read_bytes() == data
    # In little memory, one group of windows after the other.
    grouped, sizes = module.grouped, []

    def groups(windows, capacity):
        found = grouped(windows, 2000)
        assert [window for group in found for window in group] == windows
        sizes.extend(sum(map(len, group)) for group in found)
        return found

    monkeypatch.setattr(module, "grouped", groups)
    quick(monkeypatch, steps=1, epochs=1, width=32)
    calibrate(export, [made / "text"], threads=1, seed=1)
    assert len(sizes) > 2 and max(sizes) < 2300
    assert predictors(export) == [predictor_file(export).name] != [before.name]


def test_recall_beats_popularity(made):
    report = json.loads((made / "report").read_text())
    shares = report["recall"]
    assert report["guesses"] == [K, 5, 2 * K]
    for n, popular in enumerate(shares["popular"]):
        assert min(shares["token"][n], shares["layer"][n]) > popular + 0.05


def test_what_is_recorded_is_what_the_network_did(plain, monkeypatch):
    """Against a run token by token, in chunks that don't divide the window."""

    def near(found, x):
        return torch.allclose(found.float(), x / x.square().mean().sqrt(), atol=5e-3)

    monkeypatch.setattr(module, "PREFILL_CHUNK", 7)
    with Runtime.open(plain / "plain", context=64, threads=1) as runtime:
        windows = split(list(range(5, 45)), runtime.tokenizer, 21)
        assert [len(window) for window in windows] == [21, 21]
        samples = record(runtime, windows)
        model, routes, place = runtime.model, [], 0
        model.experts.on_layer(routes.append, inputs=True)
        for window in windows:
            before, hiddens = None, runtime.hidden(window, 1)
            for token in window:
                routes.clear()
                hidden_TD = next(hiddens)
                if before is not None:
                    ids = torch.tensor([token])
                    embedding = model.backend.embed(ids, model.network.embed_tokens)[0]
                    assert near(samples.token[place][:D], embedding)
                    assert near(samples.token[place][D:], before)
                    assert near(samples.inputs[0, place], routes[0].x_TD[0])
                    assert samples.used[place].tolist() == [route.indices[0] for route in routes]
                    place += 1
                before = hidden_TD[-1].clone()
        assert place == len(samples.token) == 40


def test_next_gate_is_the_next_layers_gate():
    """From what the network gives a layer's gate of the residual stream."""
    config, weights = parse_config(CONFIG), random_weights(CONFIG, torch.float32)
    guess = NextGate(config, weights, TorchBackend())
    h = torch.randn(4, D, generator=torch.Generator().manual_seed(0), dtype=torch.double)

    def gate_input(h_TD, layer):
        scaled = h_TD / (h_TD.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        return scaled * weights[layer_tensor(layer, POST_NORM)].double()

    def scores(h_TD, layer):
        return gate_input(h_TD, layer) @ weights[layer_tensor(layer, GATE)].double().T

    x = gate_input(h, 1).float()
    for found, wanted in (
        (guess.layer_scores(0, x), scores(h, 2)),
        (guess.layer_scores(0, x[2]), scores(h, 2)[2]),
        (guess.token_scores(h[1].float(), h[0].float()), scores(h[1:2], 1)),
    ):
        assert torch.allclose(found.double(), wanted, atol=1e-4)


def test_measure_counts_what_is_named():
    used = torch.tensor([[[0, 1]], [[2, 3]]])
    scores = torch.tensor([[[9.0, 1, 8, 0]], [[0.0, 1, 9, 8]]])
    assert module.recall(scores, used, (1, 2, 3)) == [0.5, 0.75, 1.0]


@pytest.fixture
def command(processes, slotmoe, monkeypatch):
    """The command line, with trainings of one step."""
    quick(monkeypatch, steps=1, epochs=1, width=32)
    monkeypatch.setattr(module, "MIN_TOKENS", 500)
    return slotmoe


@pytest.mark.parametrize(
    ("content", "message"), [(b"caf\xe9 " * 9000, "byte 3 is not"), (b"It is", "needs 500 or more")]
)
def test_bad_text_is_refused_before_any_work(content, message, plain, command, tmp_path):
    (tmp_path / "text").write_bytes(content)
    arguments = plain / "checkpoint", tmp_path / "export", "--calibrate", tmp_path / "text"
    code, out, err = command("quantize", *arguments)
    assert not (tmp_path / "export").exists()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_quantize_calibrates_and_a_finished_export_is_only_calibrated(plain, command, tmp_path):
    def inodes():
        return {path.name: path.stat().st_ino for path in destination.rglob("layer-*")}

    destination, text = tmp_path / "export", ["--calibrate", plain / "few"]
    arguments = "quantize", plain / "checkpoint", destination, *text
    code, out, _ = command(*arguments, "--json")
    assert (code, json.loads(out)["calibration"]["tokens"] > 450) == (0, True)
    before, first = inodes(), predictor_file(destination)
    code, _, err = command(*arguments, "--calibrate", plain / "other")
    assert code == 0
    assert "before a token starts" in err
    assert predictor_file(destination) != first
    assert inodes() == before
    write_checkpoint(tmp_path / "checkpoint", seed=1, rms_norm_eps=1e-5)
    code, _, err = command("quantize", tmp_path / "checkpoint", destination, *text)
    assert (code, "exists" in err) == (2, True)
    # A predictor is part of an export, so it may be replaced with it.
    assert command(*arguments, "--overwrite")[0] == 0
