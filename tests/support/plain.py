"""An independent DeepSeek-V2 in float64 numpy: no cache, no absorption, one token and one expert at
a time.

Written from the paper (arXiv 2405.04434) and DeepSeek's published modelling code, not from
``model/``; slow on purpose.
"""

import json
import math
from pathlib import Path

import numpy as np
from safetensors.torch import load_file


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean() + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def mscale(factor: float, m: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1


def frequencies(config: dict) -> tuple[np.ndarray, float, float]:
    """Angles per position, scale of the rotary table, factor on the softmax scale."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    dim, theta = config["qk_rope_head_dim"], rope.get("rope_theta", config.get("rope_theta"))
    base = np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return base, 1.0, 1.0
    factor, original = rope["factor"], rope["original_max_position_embeddings"]

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction(rope.get("beta_fast", 32))), 0)
    high = min(math.ceil(correction(rope.get("beta_slow", 1))), dim - 1)
    out = np.empty_like(base)
    for i, angle in enumerate(base):
        ramp = min(max((i - low) / ((high - low) or 0.001), 0), 1)
        out[i] = angle / factor * ramp + angle * (1 - ramp)
    m, m_all = rope.get("mscale", 1), rope.get("mscale_all_dim", 0)
    return out, mscale(factor, m) / mscale(factor, m_all), mscale(factor, m_all) ** 2


def rotate(x: np.ndarray, position: int, angles: np.ndarray, scale: float) -> np.ndarray:
    """Interleaved pairs."""
    out = np.empty_like(x)
    for i, angle in enumerate(angles):
        c, s = math.cos(position * angle) * scale, math.sin(position * angle) * scale
        a, b = x[2 * i], x[2 * i + 1]
        out[2 * i], out[2 * i + 1] = a * c - b * s, a * s + b * c
    return out


def corrected_gate(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, config: dict):
    """DeepSeek-V3's, section 2.1.2 of arXiv 2412.19437: the bias takes part in the choice alone."""
    scores, k = 1 / (1 + np.exp(-(weight @ x))), config["num_experts_per_tok"]
    groups = (scores + bias).reshape(config["n_group"], -1)
    worth = [sum(sorted(group)[-2:]) for group in groups]
    kept = np.argsort(-np.array(worth))[: config["topk_group"]]
    allowed = np.full_like(groups, -np.inf)
    allowed[kept] = groups[kept]
    best = np.argsort(-allowed.reshape(-1), kind="stable")[:k]
    total = scores[best].sum() + 1e-20 if config["norm_topk_prob"] else 1.0
    return [(int(e), scores[e] / total * config["routed_scaling_factor"]) for e in best]


def gate(x: np.ndarray, weight: np.ndarray, bias, config: dict) -> list[tuple[int, float]]:
    if config.get("topk_method") == "noaux_tc":
        return corrected_gate(x, weight, bias, config)
    scores, k = softmax(weight @ x), config["num_experts_per_tok"]
    if config.get("topk_method") == "group_limited_greedy":
        groups = scores.reshape(config["n_group"], -1)
        kept = np.argsort(-groups.max(axis=1))[: config["topk_group"]]
        masked = np.zeros_like(groups)
        masked[kept] = groups[kept]
        scores = masked.reshape(-1)
    best = np.argsort(-scores, kind="stable")[:k]
    if config.get("norm_topk_prob") and k > 1:
        return [(int(e), scores[e] / (scores[best].sum() + 1e-20)) for e in best]
    return [(int(e), scores[e] * config["routed_scaling_factor"]) for e in best]


def mlp(x: np.ndarray, tensors: dict, prefix: str, config: dict) -> np.ndarray:
    gate_, up, down = (tensors[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    limit, alpha = config.get("swiglu_limit") or math.inf, config.get("swiglu_alpha", 1.0)
    up_ = np.clip(up @ x, -limit, limit) + ("swiglu_alpha" in config)
    return down @ (silu(alpha * np.minimum(gate_ @ x, limit)) / alpha * up_)


def layer_of(config: dict, tensors: dict, layer: int, hidden: list) -> list:
    """The residual stream of all tokens behind a decoder layer."""
    H, N, P = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    R, V, eps = config["kv_lora_rank"], config["v_head_dim"], config["rms_norm_eps"]
    angles, table_scale, softmax_factor = frequencies(config)
    hidden, p = [*hidden], f"model.layers.{layer}."
    a = p + "self_attn."
    keys, values, queries = [], [], []
    for position, h in enumerate(hidden):
        x = norm(h, tensors[p + "input_layernorm.weight"], eps)
        if config["q_lora_rank"] is None:
            q = tensors[a + "q_proj.weight"] @ x
        else:
            narrow, weight = tensors[a + "q_a_proj.weight"] @ x, tensors[a + "q_a_layernorm.weight"]
            q = tensors[a + "q_b_proj.weight"] @ norm(narrow, weight, 1e-6)
        q = q.reshape(H, N + P)
        kv = tensors[a + "kv_a_proj_with_mqa.weight"] @ x
        k_pe = rotate(kv[R:], position, angles, table_scale)
        latent = norm(kv[:R], tensors[a + "kv_a_layernorm.weight"], 1e-6)
        expanded = (tensors[a + "kv_b_proj.weight"] @ latent).reshape(H, N + V)
        turned = [rotate(row[N:], position, angles, table_scale) for row in q]
        queries.append(np.concatenate([q[:, :N], turned], axis=1))
        keys.append([np.concatenate([row[:N], k_pe]) for row in expanded])
        values.append(expanded[:, N:])
    for position in range(len(hidden)):
        out = []
        for head in range(H):
            query = queries[position][head]
            scores = np.array([query @ keys[s][head] for s in range(position + 1)])
            weights = softmax(scores * (N + P) ** -0.5 * softmax_factor)
            out.append(sum(w * values[s][head] for s, w in enumerate(weights)))
        hidden[position] = hidden[position] + tensors[a + "o_proj.weight"] @ np.concatenate(out)
    moe = layer >= config["first_k_dense_replace"] and layer % config.get("moe_layer_freq", 1) == 0
    for position, h in enumerate(hidden):
        x = norm(h, tensors[p + "post_attention_layernorm.weight"], eps)
        if not moe:
            y = mlp(x, tensors, p + "mlp", config)
        else:
            bias = tensors.get(p + "mlp.gate.e_score_correction_bias")
            chosen = gate(x, tensors[p + "mlp.gate.weight"], bias, config)
            y = sum(w * mlp(x, tensors, f"{p}mlp.experts.{e}", config) for e, w in chosen)
            if config.get("n_shared_experts"):
                y = y + mlp(x, tensors, p + "mlp.shared_experts", config)
        hidden[position] = h + y
    return hidden


def streams(folder: Path, ids: list[int]) -> tuple[dict, dict, list]:
    """Config, tensors, and the residual stream of each token behind the last layer."""
    config, tensors = json.loads((folder / "config.json").read_text()), {}
    for path in folder.glob("*.safetensors"):
        tensors |= {name: value.double().numpy() for name, value in load_file(path).items()}
    hidden = [tensors["model.embed_tokens.weight"][i] for i in ids]
    for layer in range(config["num_hidden_layers"]):
        hidden = layer_of(config, tensors, layer, hidden)
    return config, tensors, hidden


def logits(folder: Path, ids: list[int]) -> np.ndarray:
    """Float64 logits [T, vocab] of a checkpoint folder."""
    config, tensors, hidden = streams(folder, ids)
    tied, eps = config.get("tie_word_embeddings"), config["rms_norm_eps"]
    head = tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
    return np.stack([head @ norm(h, tensors["model.norm.weight"], eps) for h in hidden])


def mtp_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """Float64 logits [T - 1, vocab] of the head that predicts one token more, written from section
    2.2 of arXiv 2412.19437: row i, of tokens 0 to i + 1, is about token i + 2."""
    config, tensors, hidden = streams(folder, ids)
    layer, eps = config["num_hidden_layers"], config["rms_norm_eps"]
    names = "enorm", "hnorm", "eh_proj", "shared_head.norm"
    own = {name: tensors[f"model.layers.{layer}.{name}.weight"] for name in names}
    inputs = []
    for h, token in zip(hidden, ids[1:], strict=False):
        embedding = norm(tensors["model.embed_tokens.weight"][token], own["enorm"], eps)
        h = norm(norm(h, tensors["model.norm.weight"], eps), own["hnorm"], eps)
        inputs.append(own["eh_proj"] @ np.concatenate([embedding, h]))
    outputs = layer_of(config, tensors, layer, inputs)
    head, weight = tensors["lm_head.weight"], own["shared_head.norm"]
    return np.stack([head @ norm(h, weight, eps) for h in outputs])
