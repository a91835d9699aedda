"""Decode on a Vulkan device: each shader beside torch's operations on what the shader read, the
network beside the reference path, the bits of a row, and where barriers stand.

Shapes: T rows, H heads, N, P, R and V as in ``slotmoe.network.layer_types``, K experts of a row.
"""

from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F

from slotmoe.errors import ConfigError
from slotmoe.model.attention.grouped import GroupedAttention
from slotmoe.model.layers import route
from slotmoe.quant.backends.vulkan import VulkanBackend
from slotmoe.quant.codecs.codec import EXPERT_CODECS, KEPT_CODECS
from slotmoe.quant.codecs.weight import dequantize
from slotmoe.quant.kernels import vulkan as vk
from tests.support.families import GLM, HALVES, MISTRAL, SOFTMAX, V3, config_of
from tests.support.native import feed, reference_cache
from tests.support.oracle import relative
from tests.support.tiny import CONFIG
from tests.support.vulkan import SETS, OnDevice, needs_vulkan

pytestmark = needs_vulkan

LUT = {bits: codecs for (kind, bits), codecs in EXPERT_CODECS.items() if kind == "lut"}
IDS = [5, 17, 300, 41, 4000, 7, 7, 1023]
GREEDY = {"q_lora_rank": None, "n_group": 1, "topk_group": 1}
OF_GLM = config_of(GLM, v_head_dim=20, qk_nope_head_dim=12, **HALVES)
MODELS = {  # a config, and how its weights are coded
    "v2": (CONFIG,),
    "v2 greedy, bf16, lut4": ({**CONFIG, **GREEDY}, "bf16", LUT["4"]),
    "v2 nf4, 3.5": (CONFIG, "nf4", LUT["3.5"]),
    "v2 mixed, 3": ({**CONFIG, "hidden_size": 200, "kv_lora_rank": 320}, "mixed", LUT["3"]),
    "v3 int4": (config_of(V3), "int8", KEPT_CODECS["int4"]),
    "moonlight int5, 2": (config_of(V3, **GREEDY), "int5", LUT["2"]),
    "glm in halves, mxfp4": (OF_GLM, "int8", KEPT_CODECS["mxfp4"]),
    "mistral int6, 2.5": (config_of(MISTRAL, **SOFTMAX), "int6", LUT["2.5"]),
    "qwen3": (config_of("qwen3_moe", num_key_value_heads=1, num_attention_heads=10), "nf4"),
    "glm4 with biases, of a part": (config_of("glm4_moe"), "int8"),
    "minimax, norms of rows": (config_of("minimax_m2"), "int8", LUT["2"]),
    "hunyuan, norms last": (config_of("hunyuan_v1_moe"), "mixed", LUT["3.5"]),
}


@pytest.fixture(scope="module")
def v2(device):
    return OnDevice(device, CONFIG)


def rms(x, gain, eps):
    return F.rms_norm(x, x.shape[-1:], gain, eps)


def linear(x, weight):
    return x @ dequantize(weight).T


def mlp(x, weights):
    gate, up = linear(x, weights.gate_proj), linear(x, weights.up_proj)
    return F.silu(gate) * up


def of_latents(model, a, x_TD, read, rope_TC, factor_T):
    """Of a layer's attention, its input normed, what each shader gives."""
    (H, N, P, R, V, _, low_eps, scale, halves), T = model.geometry[:9], len(rope_TC)
    backend, gives = model.backend, {}
    gives["latent"] = linear(x_TD, a.kv_a_proj)
    if a.q_a_proj is None:
        gives["query"] = linear(x_TD, a.q_proj)
    else:
        gives["low"] = linear(x_TD, a.q_a_proj)
        gives["query"] = linear(rms(read["low"], a.q_a_layernorm, low_eps), a.q_b_proj)
    q_THX = read["query"].view(T, H, N + P) * factor_T[:, None, None]
    kv_HXR = dequantize(a.kv_b_proj).view(H, N + V, R)
    both = torch.cat([q_THX[..., N:], read["latent"][:, None, R:]], dim=1)
    turned = backend.rotate(both, rope_TC, halves)
    absorbed = torch.einsum("thn,hnr->thr", q_THX[..., :N], kv_HXR[:, :N])
    gives["queries"] = torch.cat([absorbed, turned[:, :H]], dim=-1)
    kept = torch.cat([rms(read["latent"][:, :R], a.kv_a_layernorm, low_eps), turned[:, H]], dim=-1)
    gives["caches"] = kept.clamp(-65504, 65504).half().float()
    out_THV = []
    for q_HW, rows_SW in zip(read["queries"].view(T, H, R + P), read["latents"], strict=True):
        weights_HS = (q_HW @ rows_SW.T * scale).softmax(dim=-1)
        out_THV.append(torch.einsum("hs,sr,hvr->hv", weights_HS, rows_SW[:, :R], kv_HXR[:, N:]))
    gives["values"] = torch.stack(out_THV)
    return gives


def of_groups(model, a, x_TD, read, rope_TC, _):
    """The same of grouped queries."""
    g, T, gives = model.geometry, len(rope_TC), {}
    G, Z, _ = g.grouped
    gives["query"] = linear(x_TD, a.q_proj)
    gives["latent"] = torch.cat([linear(x_TD, a.k_proj), linear(x_TD, a.v_proj)], dim=1)
    k_TX, v_TX = read["latent"].split(G * Z, dim=1)
    of = GroupedAttention(g, model.backend)

    def keyed(x_TX, bias, gain):
        return of._keyed(x_TX if bias is None else x_TX + bias, gain, rope_TC)

    q_THZ = keyed(read["query"], a.q_bias, a.q_norm)
    gives["queries"] = torch.cat([torch.zeros_like(q_THZ), q_THZ], dim=-1)
    v_TGZ = (v_TX if a.v_bias is None else v_TX + a.v_bias).view(T, G, Z)
    kept_TGW = torch.cat([v_TGZ, keyed(k_TX, a.k_bias, a.k_norm)], dim=-1)
    gives["caches"] = kept_TGW.clamp(-65504, 65504).half().float()
    out_THV, q_TGHW = [], read["queries"].view(T, G, -1, 2 * Z)
    for q_HW, rows_GSW in zip(q_TGHW, read["latents"], strict=True):
        weights_GHS = (q_HW @ rows_GSW.mT * g.softmax_scale).softmax(dim=-1)
        out_THV.append((weights_GHS @ rows_GSW[..., :Z]).flatten(0, 1))
    gives["values"] = torch.stack(out_THV)
    return gives


def expected(model, index, read, rope_TC, factor_T):
    """Of a layer what each of its shaders gives out of what was ``read``, of each set [T, ...];
    ``latents`` are each row's cached ones, its own last."""
    router, eps, layer = model.geometry.router, model.geometry.eps, model.network.layers[index]
    T, backend, a = len(rope_TC), model.backend, layer.attention
    attended = of_groups if model.geometry.grouped else of_latents
    x_TD = rms(read["hidden"], layer.input_layernorm, eps)
    gives = attended(model, a, x_TD, read, rope_TC, factor_T)
    gives["between"] = read["hidden"] + linear(read["values"], a.o_proj)
    x_TD = rms(read["between"], layer.post_attention_layernorm, eps)
    if layer.mlp is not None:
        gives["activated"] = mlp(x_TD, layer.mlp)
    if layer.gate is None:
        gives["after"] = read["between"] + linear(read["activated"], layer.mlp.down_proj)
        return gives
    gives["normed"], gives["logits"] = x_TD, linear(x_TD, layer.gate)
    weights_TK, indices_TK = route(read["logits"], router, layer.gate_bias)
    gives |= {"weights": weights_TK, "indices": indices_TK.float()}
    row = model.config.moe_layers.index(index)
    slots_E = model.network.experts._slots_ME[row]
    chosen = [[model.records.mlp(slots_E[e]) for e in row] for row in indices_TK.tolist()]
    experts = [mlp(read["normed"][t], one) for t, row in enumerate(chosen) for one in row]
    gives["experts"] = torch.stack(experts)
    act_TKI = read["experts"].view(T, router.top_k, -1)
    outputs = [
        [linear(act_TKI[t, k], one.down_proj) for k, one in enumerate(row)]
        for t, row in enumerate(chosen)
    ]
    routed_TD = backend.weighted_sum(torch.stack([*map(torch.stack, outputs)]), weights_TK)
    if layer.mlp is not None:
        gives["shared"] = linear(read["activated"], layer.mlp.down_proj)
        routed_TD = routed_TD + read["shared"]
    gives["after"] = read["between"] + routed_TD
    return gives


class Watched:
    """Two rows behind some positions, one of them scaled, that go on operation by operation."""

    def __init__(self, model):
        self.model, self.T = model, 2
        self.caches, self.positions = [model.cache(1200), model.cache(36)], [1100, 35]
        self.scale_T = torch.tensor([1.0, 1.5])
        groups, width = model.cached
        for seed, (cache, position) in enumerate(zip(self.caches, self.positions, strict=True)):
            past = torch.randn(
                position, width, generator=torch.Generator().manual_seed(seed)
            ).half()
            for row in range(groups * model.config.num_hidden_layers):
                start = cache[0] + row * cache[1]
                model.device.write(start, past.data_ptr(), 1, past.nbytes)
        self.step = model.step(IDS[:2], self.positions, self.caches, query_scale=self.scale_T)
        self.rope_TC = model.kept[1]

    def go(self, first, last):
        self.step.first, self.step.last = first, last
        self.model.decoder.run(self.step)

    def rows(self, name, columns=None):
        """A set's rows of so many columns, [T, columns]."""
        memory = self.model.read(name)
        columns = len(memory) // len(self.model.views.hidden) if columns is None else columns
        return memory[: self.T * columns].view(self.T, columns)

    def read(self, index):
        """What a layer's shaders have left."""
        model, views, T = self.model, self.model.views, self.T
        names = "low query latent values between logits shared hidden"
        read = {name: self.rows(name) for name in names.split()}
        groups, width = model.cached
        read["queries"] = self.rows("queries", model.geometry.H * width)
        read["experts"] = self.rows("experts", len(model.read("experts")) // vk.ROWS)
        layer = model.network.layers[index]
        if layer.mlp is not None:
            read["activated"] = self.rows("activated", layer.mlp.gate_proj.shape[0])
        if layer.gate is not None:
            row = model.config.moe_layers.index(index)
            normed_D = model.read("normed").view(-1, model.config.hidden_size)
            read["normed"] = normed_D[row * vk.ROWS :][:T]
            read["weights"] = torch.from_numpy(views.weights[row, :T].copy())
            read["indices"] = torch.from_numpy(views.indices[row, :T].copy()).float()
        read["latents"] = list[torch.Tensor]()
        for (start, size), position in zip(self.caches, self.positions, strict=True):
            host = torch.empty(groups, position + 1, width).half()
            first, one = start + index * groups * size, host[0].nbytes
            model.device.read(first, host.data_ptr(), groups, one, size, one)
            read["latents"].append(host.float() if model.geometry.grouped else host[0].float())
        read["caches"] = torch.stack([rows_SW[..., -1, :] for rows_SW in read["latents"]])
        return read


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("name", MODELS)
def test_each_shader(device, name):
    model = OnDevice(device, *MODELS[name])
    watched, views, at = Watched(model), model.views, model.views.begin
    plan = model.plan()[1:]
    ends = [op.at + 1 for op in plan if op.writes >> SETS.index("hidden") & 1]
    watched.go(at, ends[0])
    embedded = model.backend.embed(torch.tensor(IDS[:2]), model.network.embed_tokens)
    assert torch.equal(watched.rows("hidden"), embedded)
    for index, (first, last) in enumerate(pairwise(ends)):
        before = watched.rows("hidden")
        watched.go(first, last)
        read = watched.read(index)
        read["after"], read["hidden"] = read["hidden"], before
        want = expected(model, index, read, watched.rope_TC, watched.scale_T)
        for key, value in want.items():
            found = read[key].view(value.shape)
            assert relative(found, value) < (1e-4 if key == "caches" else 1e-6), key
    watched.go(ends[-1], views.logits_end)
    normed_TD = rms(watched.rows("hidden"), model.network.norm, model.config.rms_norm_eps)
    logits_TV = torch.from_numpy(views.logits[:2].copy())
    assert relative(logits_TV, linear(normed_TD, model.network.lm_head)) < 1e-6
    assert torch.equal(torch.from_numpy(views.hidden[:2].copy()), watched.rows("hidden"))


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("name", MODELS)
def test_the_network(device, name):
    """Beside the reference path, which differs more from its own with latents in float32."""
    model = OnDevice(device, *MODELS[name])
    cache = model.cache()
    got = torch.stack([model.run([token], [at], [cache])[0] for at, token in enumerate(IDS)])
    halves, floats = (
        feed(model.network, reference_cache(model.config, 96, dtype), IDS, [1] * len(IDS))
        for dtype in (torch.float16, torch.float32)
    )
    errors = [relative(*pair) for pair in zip(got, halves, strict=True)]
    assert max(errors) < relative(floats, halves) and sorted(errors)[2] < 1e-4, errors


@pytest.mark.parametrize("name", ["v2", "qwen3"])
def test_the_bits_of_a_row(heavy, device, name):
    """Alone, among others of its and of other sequences, and again; wherever records lie."""
    one, other = (OnDevice(device, *MODELS[name], far=far) for far in ((1, 3), range(8)))
    turns = [[(0, at) for at in range(8)], [(s, 0) for s in (0, 1, 2)], [(0, 1), (1, 1), (0, 2)]]
    turns.append([(1, 2), (2, 1), (1, 3), (2, 2), (1, 4), (0, 3), (0, 4), (2, 3)])
    texts = [IDS, IDS[::-1], [9] * 8]
    alone = {}
    for number, text in enumerate(texts):
        cache = one.cache()
        for at, token in enumerate(text):
            alone[number, at] = one.run([token], [at], [cache])[0]
    for model in (one, one, other):
        caches = [model.cache() for _ in texts]
        for rows in turns[1:] if model is one else turns:
            ids = [texts[s][at] for s, at in rows]
            got = model.run(ids, [at for _, at in rows], [caches[s] for s, _ in rows])
            assert all(map(torch.equal, got, [alone[row] for row in rows]))


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("name", MODELS)
def test_rows_in_tiles(device, name, monkeypatch):
    """Of two texts: with the bits that each row has alone, also where a step is of many parts and
    a layer's experts come in two."""
    monkeypatch.setattr(VulkanBackend, "at_once", 1.0)
    model = OnDevice(device, *MODELS[name])
    views, decoder, table = model.views, model.decoder, model.views.table.copy()
    texts = [[(IDS[at % 8] + 9 * at) % 1000 for at in range(29)], [*range(40, 54)]]
    ids, positions = texts[0] + texts[1], [*range(29), *range(14)]
    caches, alone = [model.cache()] * 29 + [model.cache()] * 14, list[torch.Tensor]()
    for row in zip(ids, positions, caches, strict=True):
        model.run(*([part] for part in row))
        alone.append(torch.from_numpy(views.hidden[0].copy()))
    caches = [model.cache()] * 29 + [model.cache()] * 14
    step = model.step(ids, positions, caches, None, views.hidden_end)
    for _ in range(2):
        decoder.run(step)
        assert torch.equal(torch.from_numpy(views.hidden[:43]), torch.stack(alone))
    for layer, (gate, end) in enumerate(zip(views.gates, views.sums, strict=True)):
        views.table[layer, ::2] = 0
        step.first, step.last = views.begin, views.hidden_end
        decoder.run(step)
        assert views.stopped[0] == layer
        step.first, step.last = gate, end
        decoder.run(step)
        views.table[layer] = table[layer]
        views.table[layer, 1::2] = 0
        step.last = views.hidden_end
        decoder.run(step)
        assert views.stopped[0] == -1
        assert torch.equal(torch.from_numpy(views.hidden[:43]), torch.stack(alone))
        views.table[:] = table


def test_it_stops_where_an_expert_is_missing(v2):
    """And goes on from there with the same bits; also choice by choice."""
    views, rows = v2.views, (IDS, range(8), [v2.cache()] * 8)
    want, indices = v2.run(*rows), views.indices.copy()
    step, K = v2.step(*rows), v2.geometry.router.top_k
    for row in range(len(indices)):
        missing = int(indices[row, 7, K - 1])
        views.table[row, missing] = 0
        step.first, step.last = views.begin, views.logits_end
        v2.decoder.run(step)
        assert views.stopped[0] == row and (views.indices[row] == indices[row]).all()
        v2.decoder.run(step)
        assert views.stopped[0] == row
        views.table[row, missing] = v2.addresses_ME[row, missing]
        step.first = views.gates[row]
        v2.decoder.run(step)
        assert views.stopped[0] == -1
        assert torch.equal(torch.from_numpy(views.logits), want)
    ends = [views.begin, *views.gates, views.logits_end]
    for step.first, step.last in pairwise(ends):
        v2.decoder.run(step)
    assert torch.equal(torch.from_numpy(views.logits), want)


def test_rows_of_the_residual_stream(v2):
    """They take the place of tokens, and the head takes them alone."""
    cache = v2.cache()
    want = v2.run(IDS, range(8), [cache] * 8)
    embedded = v2.backend.embed(torch.tensor(IDS), v2.network.embed_tokens)
    ids = [-1, *IDS[1:7], -1]
    assert torch.equal(v2.run(ids, range(8), [cache] * 8, hidden=embedded), want)
    h_TD = torch.from_numpy(v2.views.hidden.copy())
    v2.run([3], [0], [v2.cache()])
    ends = v2.views.hidden_end, v2.views.logits_end
    v2.decoder.run(vk.Step(4, *ends, hidden=h_TD[2:].data_ptr()))
    assert torch.equal(torch.from_numpy(v2.views.logits[:4]), want[2:6])


def hazards(plan, without=None):
    """Pairs of operations that no barrier keeps apart though one writes what the other touches,
    when the barrier before operation ``without`` is taken out."""
    found, epoch = [], 0
    touched = list[tuple[int, int, int, int]]()  # when, which, what it reads and writes
    for at, op in enumerate(plan):
        epoch += bool(op.barrier) and at != without
        for when, other, reads, writes in touched:
            if when == epoch and (writes & (op.reads | op.writes) or reads & op.writes):
                found.append((other, at))
        touched.append((epoch, at, op.reads, op.writes))
    return found


def test_barriers_stand_where_they_must(v2):
    """And nowhere else: without any of them there is a hazard."""
    views = v2.views
    for first, rows in product([views.begin, *views.gates], (8, 9)):
        plan = v2.plan(first, views.hidden_end, rows)
        barriers = [at for at, op in enumerate(plan) if op.barrier]
        assert not hazards(plan) and len(barriers) >= 3
        assert all(hazards(plan, without=at) for at in barriers)


@pytest.mark.parametrize("count", [3, 20])
def test_operations_touch_what_they_say(v2, count):
    """What one does not say that it reads is made NaN before it, and what it does not say that it
    writes stays as it is."""
    views, cache = v2.views, v2.cache()
    rows, plan = ([*IDS, *range(12)][:count], range(count), [cache] * count), v2.plan(rows=count)
    ends = views.begin, plan[-1].at + 1
    v2.run(*rows, None, ends[1])
    want, step = views.hidden.copy(), v2.step(*rows)
    spans = {name: v2.span(name) for name in SETS if name not in ("io", "taken")}
    spans["caches"] = cache[0], cache[1] * v2.config.num_hidden_layers

    def memory():
        held = {n: torch.empty(nbytes // 4, dtype=torch.int32) for n, (_, nbytes) in spans.items()}
        for name, tensor in held.items():
            v2.device.read(spans[name][0], tensor.data_ptr(), 1, tensor.nbytes)
        return held

    def put(held):
        for name, tensor in held.items():
            v2.device.write(spans[name][0], tensor.data_ptr(), 1, tensor.nbytes)

    kept = memory()
    for op in plan[1:]:
        reads, writes = (
            {n for n in spans if of >> SETS.index(n) & 1} for of in (op.reads, op.writes)
        )
        before = {n: held if n in reads else torch.full_like(held, -2) for n, held in kept.items()}
        put(before)
        step.first, step.last = op.at, op.at + 1
        v2.decoder.run(step)
        for name, after in memory().items():
            changed = after != before[name]
            if name == "told":  # where the step itself says that nothing has stopped it
                changed[0] = False
            assert name in writes or not changed.any(), (op.at, name)
            kept[name] = torch.where(changed, after, kept[name])
    put(kept)
    assert (views.hidden[:count] == want[:count]).all()


SHAPES = {
    "odd columns": (lambda m: setattr(m, "hidden", 66), "multiples of 4"),
    "another shape": (lambda m: setattr(m.layer[0].out, "n", 60), "another shape"),
    "a coded embedding": (lambda m: setattr(m.embedding, "kind", 1), "a kind"),
    "no such kind": (lambda m: setattr(m.head, "kind", 12), "a kind"),
    "a stranger's address": (lambda m: setattr(m.head, "data", 1 << 40), "outside"),
    "a crooked address": (lambda m: setattr(m, "norm", m.norm + 4), "multiple of 16"),
    "a router's groups": (lambda m: setattr(m, "groups", 3), "router"),
    "square roots": (lambda m: setattr(m, "scoring", 2), "router"),
    "experts in 8 bits": (lambda m: setattr(m, "down", 0), "experts"),
    "wide latents": (lambda m: setattr(m, "r", 4096), "too wide"),
    "nothing": (lambda m: setattr(m, "layers", 0), "out of range"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_are_refused_by_name(device, case, monkeypatch):
    change, words = SHAPES[case]
    real = vk.Vulkan.decoder
    monkeypatch.setattr(vk.Vulkan, "decoder", lambda self, m: (change(m), real(self, m)))
    with pytest.raises(ConfigError, match=words):
        OnDevice(device, CONFIG)


def test_steps_are_refused(v2):
    cache, end = v2.cache(), v2.views.logits_end
    good = [7], [0], [cache]
    for words, arguments, ends in (
        ("1 to 64 rows", ([7] * 65, [0] * 65, [cache] * 65), {}),
        ("no such operations", ([7] * 9, [0] * 9, [cache] * 9), {}),
        ("position", ([7], [-1], [cache]), {}),
        ("vocabulary", ([4096], [0], [cache]), {}),
        ("residual stream", ([-1], [0], [cache]), {}),
        ("multiples of 4", ([7], [0], [(cache[0] + 2, cache[1])]), {}),
        ("no such operations", good, {"last": end + 1}),
        ("no such operations", good, {"first": 3, "last": 3}),
    ):
        with pytest.raises(ValueError, match=words):
            v2.run(*arguments, **ends)
    with pytest.raises(ValueError, match="lacks a list"):
        v2.decoder.run(vk.Step(1, v2.views.begin, end))
