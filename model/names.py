"""Names, shapes and roles of a model's tensors as DeepSeek's checkpoints have them, without torch.

This is the one place that spells those names, and llama.cpp's for them.  A tensor's role is how the
network uses it, which limits how it can be stored (``slotmoe.quant.shapes``): ``norm``, ``gate``
(of the router, and other small ones of its kind), ``table`` (expert ids by token, integers),
``embedding`` (gathered by row), ``absorbed`` (``kv_b_proj``, used by column too), ``sensitive``
(``lm_head``, ``kv_a_proj``, dense MLPs: rounding to 4 bits costs much there), else ``matrix``.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import accumulate, chain
from typing import NamedTuple

from slotmoe.model.config import Config
from slotmoe.network.shapes import CONVOLVED

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
GATE, LOGIT_BIAS, POST_NORM = "mlp.gate", "mlp.gate.bias", "post_attention_layernorm"
_GATE_BIAS, EXPERTS_OF = "mlp.gate.e_score_correction_bias", "mlp.gate.tid2eid"
# Names of parameters that are no module's weight.
_BARE = re.compile(r".*(bias|sinks|A_log|tid2eid|_hc\.\w+|hc_head\.\w+)|mlp\.experts\.\w+")


class Spec(NamedTuple):
    """A resident tensor: its ``name``, inside the layer if it is in one; its ``sizes``, a letter of
    ``_sizes`` for each dimension; its role; ``gguf``, llama.cpp's name; and the ``component`` that
    plans and profiles count it to."""

    name: str
    sizes: str
    role: str
    gguf: str = ""
    component: str = "attention"


def _mix(
    name: str, sizes: tuple[str, str, str], field: str = "", component: str = "residual streams"
) -> dict[str, Spec]:
    """What mixes the residual streams."""
    return {
        f"{field}{part}": Spec(f"{name}{part}", letters, "gate", component=component)
        for part, letters in zip(("fn", "base", "scale"), sizes, strict=True)
    }


_LAYER_MIX, _HEAD_MIX = ("CY", "C", "G"), ("MY", "M", "U")
HEAD_MIX_PARTS = _mix("model.hc_head.hc_", _HEAD_MIX)
"""What makes one of the residual streams before the output head."""
_TOP_PARTS = (
    Spec(EMBEDDING, "TD", "embedding", "token_embd", "embeddings"),
    *HEAD_MIX_PARTS.values(),
    Spec(FINAL_NORM, "D", "norm", "output_norm"),
    Spec(HEAD, "TD", "sensitive", "output", "embeddings"),
)


def _compressor(field: str, name: str, width: str, norm: str) -> dict[str, Spec]:
    """What makes one position of several: rows of ``width`` values, ``norm`` of them a position."""
    return {
        f"{field}_kv_proj": Spec(f"{name}.kv_proj", f"{width}D", "sensitive"),
        f"{field}_gate_proj": Spec(f"{name}.gate_proj", f"{width}D", "sensitive"),
        f"{field}_position_bias": Spec(f"{name}.position_bias", f"m{width}", "gate"),
        f"{field}_kv_norm": Spec(f"{name}.kv_norm", norm, "norm"),
    }


_INDEXER, _COMPRESSOR = "self_attn.indexer", "self_attn.compressor"
_DELTA = "linear_attn."
_SCORER = f"{_COMPRESSOR}.indexer.scorer.weights_proj"
LAYER_PARTS = {
    **_mix("attn_hc.", _LAYER_MIX, "attn_hc_"),
    "input_layernorm": Spec("input_layernorm", "D", "norm", "attn_norm"),
    # A gated delta rule.
    "in_proj_qkv": Spec(f"{_DELTA}in_proj_qkv", "1D", "matrix", "attn_qkv"),
    "in_proj_z_latent": Spec(f"{_DELTA}in_proj_z_latent", "8D", "sensitive"),
    "in_proj_z": Spec(f"{_DELTA}in_proj_z", "26", "matrix", "attn_gate"),
    "in_proj_b": Spec(f"{_DELTA}in_proj_b", "3D", "gate", "ssm_beta"),
    "in_proj_a_latent": Spec(f"{_DELTA}in_proj_a_latent", "8D", "sensitive"),
    "in_proj_a": Spec(f"{_DELTA}in_proj_a", "76", "gate", "ssm_alpha"),
    "conv": Spec(f"{_DELTA}conv1d", "41", "gate", "ssm_conv1d"),
    "a_log": Spec(f"{_DELTA}A_log", "3", "gate", "ssm_a"),
    "dt_bias": Spec(f"{_DELTA}dt_bias", "7", "gate", "ssm_dt"),
    "value_norm": Spec(f"{_DELTA}norm", "5", "gate", "ssm_norm"),
    "out_proj": Spec(f"{_DELTA}out_proj", "D2", "matrix", "ssm_out"),
    "q_proj": Spec("self_attn.q_proj", "QD", "matrix", "attn_q"),
    "q_a_proj": Spec("self_attn.q_a_proj", "LD", "matrix", "attn_q_a"),
    "q_a_layernorm": Spec("self_attn.q_a_layernorm", "A", "norm", "attn_q_a_norm"),
    "q_a_norm": Spec("self_attn.q_a_norm", "l", "norm"),
    "q_b_proj": Spec("self_attn.q_b_proj", "PL", "matrix", "attn_q_b"),
    # Grouped queries.
    "q_gate": Spec("self_attn.q_gate", "wD", "matrix"),
    "k_proj": Spec("self_attn.k_proj", "pD", "sensitive", "attn_k"),
    "v_proj": Spec("self_attn.v_proj", "pD", "sensitive", "attn_v"),
    "q_bias": Spec("self_attn.q_proj.bias", "q", "gate", "attn_q"),
    "k_bias": Spec("self_attn.k_proj.bias", "r", "gate", "attn_k"),
    "v_bias": Spec("self_attn.v_proj.bias", "s", "gate", "attn_v"),
    "o_bias": Spec("self_attn.o_proj.bias", "t", "gate", "attn_output"),
    "q_norm": Spec("self_attn.q_norm", "u", "norm", "attn_q_norm"),
    "k_norm": Spec("self_attn.k_norm", "v", "norm", "attn_k_norm"),
    "kv_a_proj": Spec("self_attn.kv_a_proj_with_mqa", "WD", "sensitive", "attn_kv_a_mqa"),
    "kv_a_layernorm": Spec("self_attn.kv_a_layernorm", "R", "norm", "attn_kv_a_norm"),
    "kv_b_proj": Spec("self_attn.kv_b_proj", "KR", "absorbed", "attn_kv_b"),
    "o_proj": Spec("self_attn.o_proj", "DV", "matrix", "attn_output"),
    # The indexer of V3.2.
    "indexer_wq_b": Spec(f"{_INDEXER}.wq_b", "jL", "matrix", "indexer.attn_q_b"),
    "indexer_wk": Spec(f"{_INDEXER}.wk", "iD", "sensitive", "indexer.attn_k"),
    "indexer_k_norm": Spec(f"{_INDEXER}.k_norm", "i", "norm", "indexer.k_norm"),
    "indexer_k_norm_bias": Spec(f"{_INDEXER}.k_norm.bias", "i", "norm", "indexer.k_norm"),
    "indexer_weights_proj": Spec(f"{_INDEXER}.weights_proj", "nD", "sensitive", "indexer.proj"),
    # The attention of V4.
    "kv_proj": Spec("self_attn.kv_proj", "zD", "sensitive"),
    "kv_norm": Spec("self_attn.kv_norm", "z", "norm"),
    "sinks": Spec("self_attn.sinks", "h", "gate", "attn_sinks"),
    **_compressor("compressor", _COMPRESSOR, "c", "a"),
    **_compressor("compressed_indexer", f"{_COMPRESSOR}.indexer", "k", "I"),
    "compressed_indexer_q_b_proj": Spec(f"{_COMPRESSOR}.indexer.q_b_proj", "JL", "matrix"),
    "compressed_indexer_weights_proj": Spec(_SCORER, "HD", "sensitive"),
    "o_a_proj": Spec("self_attn.o_a_proj", "go", "matrix"),
    "o_b_proj": Spec("self_attn.o_b_proj", "Dg", "matrix"),
    "post_attention_layernorm": Spec(POST_NORM, "D", "norm", "ffn_norm"),
    **_mix("ffn_hc.", _LAYER_MIX, "ffn_hc_"),
    "gate": Spec(GATE, "ED", "gate", "ffn_gate_inp", "router"),
    "gate_bias": Spec(_GATE_BIAS, "B", "gate", "exp_probs_b", "router"),
    "logit_bias": Spec(LOGIT_BIAS, "b", "gate", "ffn_gate_inp", "router"),
    "experts_of": Spec(EXPERTS_OF, "TN", "table", component="router"),
    "gate_proj": Spec("mlp.gate_proj", "FD", "sensitive", "ffn_gate", "dense layers"),
    "up_proj": Spec("mlp.up_proj", "FD", "sensitive", "ffn_up", "dense layers"),
    "down_proj": Spec("mlp.down_proj", "DF", "sensitive", "ffn_down", "dense layers"),
}
"""Tensors that a layer may have, by the network's name, in the order of the forward pass."""
_SHARED, _SHARED_GATE = "mlp.shared_experts.", "mlp.shared_expert_gate"
SHARED_PARTS = {
    "gate_proj": Spec(f"{_SHARED}gate_proj", "SD", "matrix", "ffn_gate_shexp", "shared experts"),
    "up_proj": Spec(f"{_SHARED}up_proj", "SD", "matrix", "ffn_up_shexp", "shared experts"),
    "down_proj": Spec(f"{_SHARED}down_proj", "DS", "matrix", "ffn_down_shexp", "shared experts"),
    "output_gate": Spec(_SHARED_GATE, "yD", "gate", "ffn_gate_inp_shexp", "shared experts"),
}
"""Those of its shared experts."""
_HEAD_NORM = "nextn.shared_head_norm"
MTP_PARTS = {
    "enorm": Spec("enorm", "D", "norm", "nextn.enorm", "drafting head"),
    "hnorm": Spec("hnorm", "D", "norm", "nextn.hnorm", "drafting head"),
    "eh_proj": Spec("eh_proj", "DX", "matrix", "nextn.eh_proj", "drafting head"),
    "norm": Spec("shared_head.norm", "D", "norm", _HEAD_NORM, "drafting head"),
}
"""What the layer that predicts one token more has beside a decoder layer.  Its embedding and
output head are the model's own; checkpoints repeat them: ``embed_tokens``, ``shared_head.head``."""
V4_MTP_PARTS = {
    "e_proj": Spec("e_proj", "Dd", "matrix", component="drafting head"),
    "h_proj": Spec("h_proj", "Dd", "matrix", component="drafting head"),
    **_mix("hc_head.hc_", _HEAD_MIX, "hc_", "drafting head"),
}
"""What V4's has in place of ``eh_proj``: two projections, of which the second is of each residual
stream, and what makes one stream of them."""
_TABLES = LAYER_PARTS, SHARED_PARTS, MTP_PARTS, V4_MTP_PARTS
PARTS = {part.name: part for part in chain(_TOP_PARTS, *(table.values() for table in _TABLES))}
"""All of them by name."""
_EXPERT = Spec("", "", "matrix")

_GATE_UP = "mlp.experts.gate_up_proj"
FUSED = {"gate_proj": (_GATE_UP, 0, 2), "up_proj": (_GATE_UP, 1, 2)}
FUSED |= {"down_proj": ("mlp.experts.down_proj", 0, 1)}
"""All routed experts of a layer in one tensor, as transformers 5 saves them: its name there, and
which of how many equal parts of the rows of each expert's matrix a projection is."""

_HUB_TOP = {"embed.weight": EMBEDDING, "head.weight": HEAD, "norm.weight": FINAL_NORM}
_HUB_TOP |= {f"hc_head_{part}": f"model.hc_head.hc_{part}" for part in HEAD_MIX_PARTS}
_HUB_WORDS = {
    **{"attn": "self_attn", "ffn": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
    **{"attn_norm": "input_layernorm", "ffn_norm": POST_NORM, "attn_sink": "sinks"},
    **{"wq_a": "q_a_proj", "q_norm": "q_a_norm", "wq_b": "q_b_proj", "wkv": "kv_proj"},
    **{"wo_a": "o_a_proj", "wo_b": "o_b_proj", "wgate": "gate_proj", "norm": "kv_norm"},
    **{"ape": "position_bias", "weights_proj": "scorer.weights_proj"},
    **{f"hc_{at}_{part}": f"{at}_hc.{part}" for at in ("attn", "ffn") for part in HEAD_MIX_PARTS},
    **{f"hc_head_{part}": f"hc_head.hc_{part}" for part in HEAD_MIX_PARTS},
}
"""DeepSeek's own words for V4's tensors, which transformers 5 also writes."""
_HUB_LAYER = re.compile(r"(?:model\.)?(layers\.\d+|mtp\.\d+)\.(.+)")


def text_name(name: str) -> str:
    """Name without what checkpoints with images put before the tensors of their text part
    (``language_model.model.norm.weight`` or ``model.language_model.norm.weight``), and in the words
    of this module where a V4 has DeepSeek's: ``layers.0.attn.wkv.weight``."""
    name = re.sub(r"^(model\.)?language_model\.", r"\1", name)
    match = _HUB_LAYER.fullmatch(name)
    if match is None:
        return _HUB_TOP.get(name, name)
    layer, inner = match[1], match[2]
    if layer.startswith("layers") and not re.match(r"((attn|ffn)(_norm)?|hc_\w+)\b", inner):
        return name
    inner = "shared_head.norm.weight" if inner == "norm.weight" else inner
    inner = re.sub(r"\bindexer\.(compressor\.)?", "compressor.indexer.", inner)
    inner = inner.replace("ffn.gate.bias", _GATE_BIAS)
    inner = re.sub(r"\.scale$", ".weight_scale_inv", inner)
    if not inner.startswith("shared_head."):
        inner = ".".join(_HUB_WORDS.get(word, word) for word in inner.split("."))
    return f"model.{layer}.{inner}"


def in_layers(name: str, config: Config) -> str:
    """Name in the words of this module where the family has others, and with the number of its
    layer where it is that of a head that predicts one token more: ``model.layers.43.enorm.weight``
    for ``model.mtp.0.enorm.weight``."""
    for theirs, ours in config.family.names:
        name = name.replace(theirs, ours)
    match = re.match(r"model\.mtp\.(\d{1,4})\.", name)
    if match is None:
        return name
    return f"model.layers.{config.num_hidden_layers + int(match[1])}.{name[match.end() :]}"


def spelled(name: str, config: Config) -> str:
    """The family's own name for a tensor."""
    for theirs, ours in reversed(config.family.names):
        name = name.replace(ours, theirs)
    return name


def layer_tensor(layer: int, part: str) -> str:
    """Checkpoint name of the tensor ``part`` of a layer."""
    return f"model.layers.{layer}.{part}" + ("" if _BARE.fullmatch(part) else ".weight")


def expert_name(layer: int, expert: int, projection: str) -> str:
    """Checkpoint name of one routed expert's ``gate_proj``, ``up_proj`` or ``down_proj``."""
    return layer_tensor(layer, f"mlp.experts.{expert}.{projection}")


def split_expert(name: str) -> tuple[int, int, str] | None:
    """Layer, expert and projection of a routed expert's tensor, or with ``.bias`` behind it of its
    bias; None for another one."""
    pattern = r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+_proj(?:\.bias)?)(?:\.weight)?"
    match = re.fullmatch(pattern, name)
    return None if match is None else (int(match[1]), int(match[2]), match[3])


def split_name(name: str) -> tuple[int | None, str]:
    """Layer (None if in no layer) and the name inside it: 3 and ``self_attn.o_proj``."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    inner = name.removeprefix(match[0] if match else "model.").removesuffix(".weight")
    return int(match[1]) if match else None, inner


def part_of(name: str) -> Spec:
    """The row of the tables for a tensor; a routed expert's has none of its own."""
    layer, inner = split_name(name)
    return PARTS.get(name if layer is None else inner, _EXPERT)


def text_layer(name: str, config: Config) -> int | None:
    """The layer of a tensor if texts go through it: None for the head that predicts one more."""
    layer, _ = split_name(name)
    return None if layer == config.num_hidden_layers else layer


def role_of(name: str) -> str:
    """The role of a tensor, see above."""
    return part_of(name).role


def _sizes(c: Config, layer: int) -> dict[str, int]:
    """Sizes of a layer's tensors by letter; one is 0 or missing of a tensor that it lacks."""
    D, H, L, moe = c.hidden_size, c.num_attention_heads, c.q_lora_rank or 0, c.is_moe(layer)
    hashed, sizes = layer < c.num_hash_layers, {"T": c.vocab_size, "D": D, "L": L}
    sizes["P" if L else "Q"] = H * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    sizes["E"] = c.n_routed_experts if moe else 0
    sizes["B"] = sizes["E"] if c.family.correction_bias and not hashed else 0
    sizes["N"] = c.num_experts_per_tok if moe and hashed else 0
    sizes["F"] = 0 if moe else c.intermediate_size
    sizes["S"] = c.n_shared_experts * c.moe_intermediate_size if moe else 0
    if c.hyper is not None:
        streams = c.hyper.mult
        sizes |= {"M": streams, "Y": streams * D, "C": (2 + streams) * streams, "G": 3, "U": 1}
    sizes["b"], sizes["y"] = sizes["E"] * c.family.logit_bias, int(moe and c.family.shared_gate)
    if (of := c.delta) is not None and c.has_delta(layer):
        values, width = of.num_value_heads * of.value_head_dim, of.latent or D
        convolved = of.columns - of.num_value_heads - of.decays
        sizes |= {"1": convolved, "2": values, "3": of.num_value_heads, "4": CONVOLVED}
        sizes |= {"5": of.value_head_dim, "6": width, "7": of.decays, "8": of.latent}
        return sizes | dict.fromkeys("PQL", 0)
    return sizes | _SIZES_OF[c.family.attention](c, layer)


def _sizes_of_mla(c: Config, layer: int) -> dict[str, int]:
    H, indexer = c.num_attention_heads, c.indexer
    sizes = {"X": 2 * c.hidden_size, "A": c.q_lora_rank or 0, "V": H * c.v_head_dim}
    expanded = H * (c.qk_nope_head_dim + c.v_head_dim)
    sizes |= {"W": c.kv_lora_rank + c.qk_rope_head_dim, "R": c.kv_lora_rank, "K": expanded}
    if indexer is None or not c.has_indexer(layer):
        return sizes
    width, heads = indexer.head_dim, indexer.n_heads
    return sizes | {"j": heads * width, "i": width, "n": heads}


def _sizes_of_v4(c: Config, layer: int) -> dict[str, int]:
    attention, indexer, ratio = c.compressed, c.indexer, c.ratio(layer)
    assert attention is not None and indexer is not None
    width, overlap, heads = attention.head_dim, 1 + c.has_indexer(layer), indexer.n_heads
    sizes = {"l": c.q_lora_rank or 0, "d": c.hidden_size, "z": width, "h": c.num_attention_heads}
    if ratio:
        sizes |= {"m": ratio, "a": width, "c": overlap * width}
    sizes["g"] = attention.o_groups * attention.o_lora_rank
    sizes["o"] = c.num_attention_heads * width // attention.o_groups
    if not c.has_indexer(layer):
        return sizes
    width = indexer.head_dim
    return sizes | {"k": overlap * width, "I": width, "J": heads * width, "H": heads}


def _sizes_of_groups(c: Config, layer: int) -> dict[str, int]:
    attention, D, rows = c.grouped, c.hidden_size, c.num_attention_heads * c.v_head_dim
    assert attention is not None
    shared = attention.groups * attention.head_dim  # by the heads of a group
    sizes = {"X": 2 * D, "p": shared, "V": rows, "h": c.num_attention_heads * c.family.sinks}
    sizes["w"] = rows * c.family.output_gate
    widths = zip("qkvo", "qrst", (rows, shared, shared, D), strict=True)
    sizes |= {letter: width * (name in attention.biased) for name, letter, width in widths}
    norms = {"head": (c.v_head_dim,) * 2, "row": (rows, shared), "": (0, 0)}[attention.qk_norm]
    return sizes | dict(zip("uv", norms, strict=True))


def stored_as(name: str, config: Config) -> list[str]:
    """The tensors of the checkpoint whose rows, one behind the other, are those of this one, if it
    has it by other names."""
    layer, inner = split_name(name) if config.family.by_channel else (None, "")
    if layer is None or not inner.startswith(_DELTA):
        return []
    end = {"in_proj_qkv": "qkv_proj", "conv1d": "qkv_conv1d", "out_proj": "o_proj"}
    words = end.get(inner.removeprefix(_DELTA), "_").split("_")
    return [layer_tensor(layer, f"self_attn.{part}_{words[1]}") for part in words[0]]


def stored_rows(name: str, config: Config) -> tuple[str, int, list[range]] | None:
    """Where a resident matrix has its rows among others' in the checkpoint: the name of that
    tensor, its rows, and which they are."""
    family, of, Z = config.family, config.delta, config.v_head_dim
    tables = list[tuple[str, int, list[tuple[str, int]]]]()  # of a head, parts and their rows
    if family.output_gate:
        parts = [(f"self_attn.{part}", Z) for part in ("q_proj", "q_gate")]
        tables.append(("self_attn.q_proj", config.num_attention_heads, parts))
    if family.by_key_head and of is not None:
        K, heads = of.key_head_dim, of.num_value_heads // of.num_key_heads
        V, qkv = heads * of.value_head_dim, f"{_DELTA}in_proj_qkv"
        parts = [(qkv, K), (qkv, K), (qkv, V), (f"{_DELTA}in_proj_z", V)]
        tables.append((f"{_DELTA}in_proj_qkvz", of.num_key_heads, parts))
        parts = [(f"{_DELTA}in_proj_{part}", heads) for part in "ba"]
        tables.append((f"{_DELTA}in_proj_ba", of.num_key_heads, parts))
    layer, inner = split_name(name) if tables else (None, "")
    for stored, heads, parts in tables:
        ends = [*accumulate(rows for _, rows in parts)]
        ranges = [
            range(head * ends[-1] + end - rows, head * ends[-1] + end)
            for (part, rows), end in zip(parts, ends, strict=True)
            if part == inner
            for head in range(heads)
        ]
        if ranges and layer is not None:
            return layer_tensor(layer, stored), heads * ends[-1], ranges
    return None


_SIZES_OF = {"latent": _sizes_of_mla, "compressed": _sizes_of_v4, "grouped": _sizes_of_groups}


@lru_cache(maxsize=4)  # a plan asks for the same over and over
def resident_shapes(config: Config) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of all but the routed experts, in the order of the forward pass."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(parts: Iterable[Spec], layer: int | None = None) -> None:
        sizes = _sizes(config, layer or 0)
        for part in parts:
            shape = tuple(sizes.get(letter, 0) for letter in part.sizes)
            if 0 not in shape:
                shapes[part.name if layer is None else layer_tensor(layer, part.name)] = shape

    embedding, *end = _TOP_PARTS
    add([embedding])
    for layer in range(config.layer_count):
        add(chain(LAYER_PARTS.values(), SHARED_PARTS.values()), layer)
    add(end[:-1] if config.tie_word_embeddings else end)
    if config.mtp:
        add(chain(MTP_PARTS.values(), V4_MTP_PARTS.values()), config.num_hidden_layers)
    return shapes


def expert_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shape of each projection of a routed expert, ``[out, in]``, and of each one's bias."""
    width, hidden = config.moe_intermediate_size, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("gate_proj", "up_proj"), (width, hidden))
    shapes["down_proj"] = hidden, width
    if config.family.expert_biases:
        shapes |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    return shapes


def tensor_shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of ``config``, one by one: a hostile one has far too many."""
    yield from resident_shapes(config).items()
    for layer in config.moe_layers:
        for projection, shape in expert_shapes(config).items():
            for expert in range(config.n_routed_experts):
                yield expert_name(layer, expert, projection), shape
