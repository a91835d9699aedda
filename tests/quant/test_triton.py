"""What a GPU computes, in small shapes: every op against plain torch, and against what its contract
promises.

Where there is no CUDA device the Triton kernels run on the CPU under Triton's interpreter.
"""

import importlib
import importlib.util
import shutil
import sysconfig
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from slotmoe.border import Mlp, Pending
from slotmoe.errors import ConfigError
from slotmoe.model.layers import Router
from slotmoe.quant.backends import pick_backend
from slotmoe.quant.backends.base import Records, TorchBackend
from slotmoe.quant.codecs.codec import (
    EXPERT_CODECS,
    INT4,
    LUT3,
    LUT4,
    MXFP4,
    NF4,
    TILE,
    ExpertCodecs,
)
from slotmoe.quant.codecs.weight import (
    CodedWeight,
    Int8Weight,
    dequantize,
    int8_by_torch,
    levels_of,
    map_tensors,
)
from slotmoe.quant.export.layout import PROJECTIONS, RecordLayout
from tests.support.codes import quantize_coded
from tests.support.params import nth
from tests.support.slab import NF4S, write_record

pytestmark = pytest.mark.usefixtures("interpreter")

pytest.importorskip("triton", reason="needs Triton, which is for Linux")
launch = importlib.import_module("slotmoe.quant.backends.triton_few")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def disturb(weight, generator, factors=(1.0, -1.0, 0.0, 1e-4, 8.0)):
    """Multiply scales by random ``factors``; those of rows that are not there become poison."""
    rows, numbers = weight.shape[0] % TILE or TILE, weight.scales  # of the last tile
    if numbers.dtype == torch.float16:
        numbers = numbers.view(len(numbers), -1, TILE)
    elif numbers.dtype == torch.float8_e8m0fnu:
        powers = numbers.view(torch.uint8).view(len(numbers), -1, TILE)
        if len(factors) > 2:
            chosen = torch.randint(-9, 4, powers.shape, generator=generator)
            powers.copy_(torch.where(chosen < -7, 0, (powers.int() + chosen).clamp(min=0)))
        powers[-1, :, rows:] = 160
        return
    else:
        blocks = numbers[:, 2:].view(torch.int8)
        blocks[torch.rand(blocks.shape, generator=generator) < 0.2] *= -1
        numbers = numbers[:, :2].view(torch.float32).view(-1, 1, TILE)
    chosen = torch.randint(len(factors), numbers.shape, generator=generator)
    numbers *= torch.tensor(factors, dtype=numbers.dtype)[chosen]
    numbers[-1, :, rows:] = torch.nan


def make_records(S, D, width, codecs=NF4S, seed=0):
    """Random records with scales of both signs, zeros, tiny and large ones; padding bytes are
    poison."""
    layout, generator = RecordLayout(D, width, codecs), torch.Generator().manual_seed(seed)
    slab = torch.full((S, layout.record_bytes), 0xFF, dtype=torch.uint8)  # NaN, read as scales
    for record in slab:
        for name in PROJECTIONS:
            N, K = layout.shapes[name]
            w_NK = torch.randn(N, K, generator=generator) * K**-0.5
            write_record(record, layout, name, *quantize_coded(w_NK, codecs.of(name)))
            disturb(layout.weight(record, name, layout.levels()), generator)
    return Records(slab.to(DEVICE), layout, layout.levels().to(DEVICE))


def mlp_in_float64(x_TD, *weights, limit=torch.inf):
    gate, up, down = (dequantize(weight).double() for weight in weights)
    x_TD = x_TD.double()
    gate_TI, up_TI = (x_TD @ gate.T).clamp(max=limit), (x_TD @ up.T).clamp(-limit, limit)
    return (torch.nn.functional.silu(gate_TI) * up_TI) @ down.T


def expert_of(records, slot, x_TD, limit=torch.inf):
    """One expert in float64, from dequantized weights."""
    return mlp_in_float64(x_TD, *records.weights(slot), limit=limit)


def error(actual, expected):
    """Relative RMS difference."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def error_of_rows(actual, expected):
    """The mean of the rows' relative differences."""
    return ((actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).mean().item()


def nth_interpreted(step, parameters):
    """As ``nth`` where kernels are interpreted, which takes long; on a GPU all."""
    return nth(step if DEVICE.type == "cpu" else 1, parameters)


def randn(*shape):
    return torch.randn(shape, device=DEVICE)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["torch", "triton"])
def ops(request):
    return TorchBackend() if request.param == "torch" else pick_backend(DEVICE, "triton")


SLOTS = [2, -1, 0, 3, -1, 1]  # of six experts
TOKENS = [1, 5, 9, 80]


def slots_of(*slots):
    return torch.tensor(slots, dtype=torch.int32, device=DEVICE)


def choice(T):
    """Three different experts of six for each token.  All use expert 2, which is more than a tile
    of tokens if these are many; expert 5 has few uses, expert 1 often none."""
    orders = [[5, 2, 3] if t == 3 else [[2, 0, 4], [3, 2, 0], [4, 3, 2]][t % 3] for t in range(T)]
    return torch.tensor(orders, device=DEVICE)


def outputs(ops, x_TD, records, slots_E, indices_TK):
    """What ``experts`` writes into a tensor of -7."""
    y_TKD = torch.full((*indices_TK.shape, x_TD.shape[1]), -7.0, device=DEVICE)
    ops.experts(x_TD, records, slots_E, indices_TK, y_TKD)
    return y_TKD


CODINGS = {**EXPERT_CODECS, "kept": ExpertCodecs(MXFP4, MXFP4)}


@pytest.mark.parametrize(("T", "coding"), nth_interpreted(4, product(TOKENS, CODINGS)), ids=str)
def test_experts_are_those_experts_and_leave_the_others(ops, T, coding):
    records, indices_TK = make_records(4, 128, 48, CODINGS[coding]), choice(T)
    x_TD = randn(T, 128)
    y_TKD = outputs(ops, x_TD, records, slots_of(*SLOTS), indices_TK)
    plain_TKD = outputs(TorchBackend(torch.bfloat16), x_TD, records, slots_of(*SLOTS), indices_TK)
    exact_TKD, computed = y_TKD.double(), []
    for expert, slot in enumerate(SLOTS):
        uses = (indices_TK == expert).nonzero(as_tuple=True)
        if slot < 0:
            assert bool((y_TKD[uses] == -7).all())
        elif len(uses[0]):
            exact_TKD[uses] = expert_of(records, slot, x_TD[uses[0]])
            computed.append(expert)
            # A few tokens are computed in float32.  Else bfloat16 rounds by up to 2**-9 the input
            # and a weight twice, for gate and up, then their product and a weight.
            rounding = 1e-6 if T <= launch.ROWS else 6 * 2**-9
            assert error(y_TKD[uses], exact_TKD[uses]) <= rounding
    assert len(computed) == min(T + 1, 4)
    if T == 80:  # enough rows to compare two roundings; each counts alike, however large it is
        # The bound is an error itself, of one sample: hence the tenth.
        assert error_of_rows(y_TKD, exact_TKD) <= 1.1 * error_of_rows(plain_TKD, exact_TKD)


@pytest.mark.parametrize("T", [1, 9])
def test_gates_and_ups_have_a_limit(ops, T):
    """In experts and in an MLP; NaN stays NaN, and a limit that nothing reaches changes no bit."""
    limit, x_TD, indices_TK = 0.5, randn(T, 64), choice(T)
    records, slots_E = make_records(4, 64, 32), slots_of(2, 1, 0, 3, 0, 1)
    weights = [make_weight(kind, *shape, wild=False) for kind, shape in (
        ("mxfp4", (24, 64)), ("mxfp4", (24, 64)), ("int8", (64, 24)),
    )]  # fmt: skip
    results = {}
    for ops.swiglu_limit in (0.0, 1e30, limit):
        y_TKD = outputs(ops, x_TD, records, slots_E, indices_TK)
        results[ops.swiglu_limit] = y_TKD, ops.mlp(x_TD, Mlp(*weights))
    y_TKD, y_TD = results[limit]
    exact_TKD = torch.stack([
        torch.cat([expert_of(records, slots_E[e], x[None], limit) for e in row])
        for x, row in zip(x_TD, indices_TK, strict=True)
    ])  # fmt: skip
    rounding = 3e-6 if T <= launch.ROWS or type(ops) is TorchBackend else 12 * 2**-9
    for found, exact in ((y_TKD, exact_TKD), (y_TD, mlp_in_float64(x_TD, *weights, limit=limit))):
        assert error(found, exact) <= rounding
    for found, without, large in zip(*(results[key] for key in (limit, 0.0, 1e30)), strict=True):
        assert torch.equal(without, large) and error(found, without) > 0.05
    if T == 1:  # numpy warns of NaN in the interpreter's products of many
        x_TD[0, 5] = torch.nan
        assert bool(outputs(ops, x_TD, records, slots_E, indices_TK).isnan().all())


@pytest.mark.parametrize("T", nth_interpreted(3, TOKENS))
def test_an_experts_output_depends_on_its_token_alone(ops, T):
    """Bitwise the same in several calls, in any order, from other slots; a call without any expert
    changes nothing.  And it is the same among other tokens."""
    records, indices_TK, x_TD = make_records(4, 64, 32), choice(T), randn(T, 64)
    whole = outputs(ops, x_TD, records, slots_of(*SLOTS), indices_TK)
    parts = torch.full_like(whole, -7.0)
    moved = Records(records.slab[[3, 1, 2, 0]], records.layout, records.levels)
    for some in ({3: 0, 5: 1}, {}, {0: 2}, {2: 3}):
        table = slots_of(*(some.get(expert, -1) for expert in range(6)))
        ops.experts(x_TD, moved, table, indices_TK, parts)
    assert torch.equal(whole, parts)
    some = T if T // 2 < launch.ROWS < T else T // 2 + 1  # of the kernels that all go through
    order = torch.randperm(T, device=DEVICE)[:some]
    some = outputs(ops, x_TD[order], records, slots_of(*SLOTS), indices_TK[order])
    # numpy's product, which the interpreter uses, and torch's sum a row differently by where it
    # stands.
    exact = type(ops) is not TorchBackend and (T <= launch.ROWS or DEVICE.type == "cuda")
    assert torch.equal(some, whole[order]) if exact else error(some, whole[order]) < 1e-6


@pytest.mark.parametrize(("T", "shared"), [(1, "nf4"), (3, "int8")])
def test_a_layer_in_two_launches_is_bitwise_the_layer_in_several(T, shared):
    """All experts, the shared one and the sums together; or experts as they come, the shared one
    with the first of them, their sum, and all that added; and each token alone.  What counts the
    programs of a tile is as it was."""
    D, width, indices_TK = 32, 16, choice(T)
    records, x, h, weights = make_records(4, D, width), randn(T, D), randn(T, D), randn(T, 3).abs()
    matrices = [make_weight(shared, *shape, wild=False) for shape in ((24, D), (24, D), (D, 24))]
    y_TKD, between, shared_y = (
        torch.empty(T, *shape, device=DEVICE) for shape in ((3, D), (24,), (D,))
    )
    triton_ops = pick_backend(DEVICE, "triton", swiglu_limit=0.5)
    few, of_shared = triton_ops.few, launch.Shared.of(Mlp(*matrices))
    few.shared = of_shared
    finished = torch.zeros(T, D // TILE, dtype=torch.int32, device=DEVICE)
    whole, parts, slots_E = torch.empty_like(h), torch.empty_like(h), slots_of(2, 1, 0, 3, 0, 1)

    def at_once(*rows, out):
        x, h, weights, indices, y, *outputs = rows
        routed = launch.Routed(x, records, slots_E, indices, y)
        with_shared = of_shared._replace(outputs=outputs)
        launch.experts(routed, with_shared, launch.Ending(finished, weights, h, out), 0.5)
        return out

    given = x, h, weights, indices_TK, y_TKD, between, shared_y
    at_once(*given, out=whole)
    assert not finished.any()
    for token in range(T):
        rows = [tensor[token : token + 1].clone() for tensor in given]
        assert torch.equal(at_once(*rows, out=torch.empty_like(rows[1]))[0], whole[token])
    for stale in (y_TKD, between, shared_y):
        stale.fill_(torch.nan)
    with_shared = of_shared._replace(outputs=(between, shared_y))
    few.awaited = Pending(0, x, weights, indices_TK), with_shared
    for table in ([-1, -1, 0, -1, -1, -1], [2, 1, -1, 3, 0, 1]):
        triton_ops.experts(x, records, slots_of(*table), indices_TK, y_TKD)
        assert few.awaited[1].outputs is None and not shared_y.isnan().any()
    launch.finish(triton_ops.weighted_sum(y_TKD, weights), shared_y, h, parts)
    assert torch.equal(whole, parts)
    exact = h + mlp_in_float64(x, *matrices, limit=0.5)
    for token, row in enumerate(indices_TK):
        for weight, index in zip(weights[token].double(), row, strict=True):
            exact[token] += (
                weight * expert_of(records, slots_E[index], x[token : token + 1], limit=0.5)[0]
            )
    assert error(whole, exact) < 1e-6


def test_weighted_sum_goes_in_the_gates_order_and_no_token_has_no_experts(ops):
    y_TKD, weights_TK = randn(3, 6, 80), torch.rand(3, 6, device=DEVICE)
    expected = TorchBackend().weighted_sum(y_TKD, weights_TK)
    assert torch.equal(ops.weighted_sum(y_TKD, weights_TK), expected)
    none_TK = torch.empty(0, 3, dtype=torch.int64, device=DEVICE)
    y_TKD = outputs(ops, randn(0, 64), make_records(4, 64, 32), slots_of(*SLOTS), none_TK)
    assert y_TKD.shape == (0, 3, 64)


CODECS = {codec.name: codec for codec in (NF4, LUT4, LUT3, INT4, MXFP4)}


def make_weight(kind, N, K, seed=0, wild=True):
    """A [N, K] matrix of a kind, with rows or blocks of zeros, tiny, large and (of codes) negative
    scales if ``wild``."""
    generator = torch.Generator().manual_seed(seed)
    w_NK = torch.randn(N, K, generator=generator) * K**-0.5
    if kind == "int8":
        q, scale = int8_by_torch(w_NK)
        scale *= torch.tensor([1.0, 0.0, 1e-6, 100.0] if wild else [1.0] * 4)[
            torch.randint(4, (N,), generator=generator)
        ]
        return Int8Weight(q.to(DEVICE), scale.to(DEVICE))
    if kind in CODECS:
        levels = levels_of(CODECS[kind]) * 1.5 + 0.1
        weight = CodedWeight(*quantize_coded(w_NK, CODECS[kind]), levels, (N, K))
        disturb(weight, generator, *[] if wild else [(1.0, -1.0)])
        return map_tensors(weight, lambda tensor: tensor.to(DEVICE))
    return w_NK.to(kind).to(DEVICE)


@pytest.fixture(scope="module")
def triton_ops():
    return pick_backend(DEVICE, "triton")


@pytest.mark.parametrize("E", nth_interpreted(2, [20, 64]))
def test_norm_logits_and_choice_in_one_launch(triton_ops, E):
    """Whichever program finishes last chooses; the count of them is as it was."""
    x, gain, weight, bias = randn(3, 600), torch.rand(600, device=DEVICE), randn(E, 600), randn(E)
    router = Router(4, 2, 3, 2.0, normalized=True, group_best=2, scoring="sigmoid")
    normed, logits = torch.empty_like(x), torch.empty(3, E, device=DEVICE)
    finished = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    choice = torch.empty(3, 3, device=DEVICE), torch.empty(3, 3, dtype=torch.int64, device=DEVICE)
    for _ in range(2):
        launch.gate(x, (gain, 1e-3), normed, weight, router, bias, logits, finished, choice)
        expected = torch.nn.functional.rms_norm(x.double(), (600,), gain.double(), 1e-3)
        assert error(normed, expected) < 1e-6
        assert error(logits, expected @ weight.double().T) < 1e-6
        assert all(map(torch.equal, choice, triton_ops.route(logits, router, bias, None)))
        assert not finished.any()
        x *= -1


@pytest.mark.parametrize("T", [1, 9])
def test_experts_far_into_a_slab_larger_than_2_gib_are_addressed(triton_ops, T):
    """Row times record bytes outgrows 32 bits; the pages between are never touched."""
    small = make_records(1, 64, 32)
    size = small.layout.record_bytes
    slab = torch.empty(2**31 // size + 2, size, dtype=torch.uint8, device=DEVICE)
    slab[-1] = small.slab[0]
    far = Records(slab, small.layout, small.levels)
    x_TD, indices_TK = randn(T, 64), torch.zeros(T, 1, dtype=torch.int64)
    y_TKD = outputs(triton_ops, x_TD, far, slots_of(len(slab) - 1), indices_TK.to(DEVICE))
    assert error(y_TKD[:, 0], expert_of(small, 0, x_TD)) < (1e-5 if T == 1 else 1e-2)


def test_a_gpu_without_what_triton_needs_computes_through_torch_and_says_why(monkeypatch, tmp_path):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler" in pick_backend(device).name
    monkeypatch.setenv("CC", "a compiler")
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": f"/nowhere/{scheme}"})
    monkeypatch.setattr(sysconfig, "get_default_scheme", lambda: "posix_local")  # Debian's
    assert pick_backend(device).name.endswith("/nowhere/posix_prefix/Python.h is not there")
    monkeypatch.delenv("CC")
    (tmp_path / "runtime" / "tcc").mkdir(parents=True)  # as in the wheel for Windows
    spec = SimpleNamespace(origin=tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert "Python.h" in pick_backend(device).name
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "below 8.0" in pick_backend(device).name
    monkeypatch.setattr("slotmoe.quant.backends.triton.InterpretedFunction", int)
    with pytest.raises(ConfigError, match=r"kernels triton: .* set TRITON_INTERPRET=1; or use k"):
        pick_backend(torch.device("cpu"), "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert pick_backend(device).name.startswith("torch, since Triton is not installed")
    with pytest.raises(ConfigError, match=r"Triton is not installed.* or use kernels torch"):
        pick_backend(device, "triton")
