"""The model families that this network computes, and in what they differ.

All have routed experts behind a gate, and one of three kinds of attention: Multi-head Latent
Attention, that of DeepSeek-V4, or grouped queries.  A gated delta rule may stand in its place.
What differs is data: a row of ``FAMILIES`` says how the gate scores and chooses, and what fits it
in ``config.json``.
"""

from pathlib import Path
from typing import NamedTuple

from slotmoe.network.shapes import SWIGLU, Activation

_TEMPLATES = Path(__file__).with_name("templates")


class Family(NamedTuple):
    """A row of ``FAMILIES``.

    ``scoring`` makes scores of the gate's logits.  A group of experts counts by the sum of its
    ``group_best`` best scores.  ``correction_bias``: each expert has a bias that takes part in the
    choice and not in the weights.  ``scales_normalized``: weights that were made to add up to 1 are
    scaled too.  ``softmax_factor``: YaRN also scales the attention scores.  ``query_scaling``:
    queries grow with their position.  ``indexed``: attention is to the best ``index_topk``
    positions; ``index_halves``: it rotates two halves to pick them, not pairs side by side.
    ``attention`` is its kind: ``latent``, ``compressed`` (DeepSeek-V4) or ``grouped``; of the last,
    ``biased`` are the projections that have biases where the key ``bias_key`` is true, or always
    without one, ``qk_norm`` says whether queries and keys are normed by ``head`` or by ``row``, or
    names the key that says whether they are by head, ``norm_last`` that it is behind their
    rotation, ``ntk_alpha`` that dynamic RoPE's base is stretched by a fixed alpha, and ``sinks``
    that softmax counts one score more.  ``rotated`` is how much of a head is, if no key says it.
    ``delta``: some layers have a gated delta rule instead; ``by_key_head``: one matrix gives all
    that it takes in, key head by key head; ``by_channel``: each channel of a key decays by itself.
    ``output_gate``: ``q_proj`` also gives what gates each head's output.
    ``norms_less_one``: norms are stored as what they are more than 1.  ``logit_bias``: the gate's
    logits have biases.  ``shared_gate``: the shared expert's output has a gate of its own.
    ``expert_biases``: experts' projections have biases; ``interleaved``: rows of their gate and up
    take turns, all experts of a layer in one tensor; ``activation``: what becomes of these, if no
    key says it.

    ``words`` are its keys of ``config.json`` for those of DeepSeek's, and ``values`` what keys must
    say, if they are there; ``names`` are its parts of tensors' names for those of
    ``slotmoe.model.names``.  ``template``: the file of our
    own chat template, for models that ship Python code in place of one (sources: the README, the
    encoder and the tests in the folder ``encoding`` of each model on the hub).
    """

    architecture: str
    topk_methods: tuple[str | None, ...] = ("noaux_tc", None)
    scoring: str = "sigmoid"
    group_best: int = 2
    correction_bias: bool = True
    scales_normalized: bool = True
    softmax_factor: bool = True
    query_scaling: bool = False
    indexed: bool = False
    index_halves: bool = False
    attention: str = "latent"
    biased: str = ""
    bias_key: str = "attention_bias"
    qk_norm: str = ""
    norm_last: bool = False
    rotated: float = 1.0
    ntk_alpha: bool = False
    sinks: bool = False
    delta: bool = False
    by_key_head: bool = False
    by_channel: bool = False
    output_gate: bool = False
    norms_less_one: bool = False
    logit_bias: bool = False
    shared_gate: bool = False
    expert_biases: bool = False
    interleaved: bool = False
    activation: Activation = SWIGLU
    words: tuple[tuple[str, str], ...] = ()
    values: tuple[tuple[str, object], ...] = ()
    names: tuple[tuple[str, str], ...] = ()
    rope_interleave: tuple[bool, ...] = (True, False)
    template: str = ""

    @property
    def own_template(self) -> str | None:
        """That template, which is data and runs where a model's own does; None if there is none."""
        return (_TEMPLATES / self.template).read_text(encoding="utf-8") if self.template else None


_V3 = Family("DeepseekV3ForCausalLM")
_GROUPED = Family("", (None,), attention="grouped", softmax_factor=False, rope_interleave=(False,))
_SOFTMAX = _GROUPED._replace(scoring="softmax", group_best=1, correction_bias=False)
_ONE_GROUP = ("n_group", 1), ("topk_group", 1), ("first_k_dense_replace", 0)
_UNSCALED = *_ONE_GROUP, ("routed_scaling_factor", 1.0)
_NONE_SHARED, _NORMALIZED = ("n_shared_experts", 0), ("norm_topk_prob", True)
_EXPERTS, _LOCAL = ("num_experts", "n_routed_experts"), ("num_local_experts", "n_routed_experts")
_WIDTH = "intermediate_size", "moe_intermediate_size"
_NO_WINDOW = "use_sliding_window", False
_SHARED = (("mlp.shared_expert.", "mlp.shared_experts."),)
_DELTA = _SOFTMAX._replace(
    delta=True, qk_norm="head", rotated=0.25, shared_gate=True, output_gate=True,
    norms_less_one=True, words=(_EXPERTS,), names=_SHARED,
    values=(*_UNSCALED, ("attn_output_gate", True), ("linear_conv_kernel_dim", 4),
            ("mamba_ssm_dtype", "float32"), ("output_gate_type", "swish")),
)  # fmt: skip
_WORDS = ("w1", "gate"), ("w2", "down"), ("w3", "up")
_KDA = {"A_log": "A_log", "dt_bias": "dt_bias", "b_proj.": "in_proj_b.", "o_norm.": "norm."}
_KDA |= {"f_a_proj.": "in_proj_a_latent.", "f_b_proj.": "in_proj_a."}
_KDA |= {"g_a_proj.": "in_proj_z_latent.", "g_b_proj.": "in_proj_z."}
FAMILIES = {
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM", topk_methods=("greedy", "group_limited_greedy"), scoring="softmax",
        group_best=1, correction_bias=False, scales_normalized=False, rope_interleave=(True,),
    ),
    "deepseek_v3": _V3,
    "kimi_k2": _V3,
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM"),
    "mistral4": Family(
        "Mistral4ForCausalLM", topk_methods=(None,), scoring="softmax",
        correction_bias=False, softmax_factor=False, query_scaling=True,
    ),
    "deepseek_v32": Family(
        "DeepseekV32ForCausalLM", indexed=True, index_halves=True, rope_interleave=(True,),
        template="deepseek-v3.2.jinja",
    ),
    "glm_moe_dsa": Family("GlmMoeDsaForCausalLM", indexed=True, rope_interleave=(True,)),
    "deepseek_v4": Family(
        "DeepseekV4ForCausalLM", scoring="sqrtsoftplus", softmax_factor=False, indexed=True,
        attention="compressed", rope_interleave=(True,), template="deepseek-v4.jinja",
        values=(*_ONE_GROUP, ("num_key_value_heads", 1), ("norm_topk_prob", True),
                ("moe_layer_freq", 1), ("rope_interleave", True)),
    ),
    "qwen3_moe": _SOFTMAX._replace(
        architecture="Qwen3MoeForCausalLM", biased="qkvo", qk_norm="head", words=(_EXPERTS,),
        values=(*_UNSCALED, _NONE_SHARED, _NO_WINDOW),
    ),
    "glm4_moe": _GROUPED._replace(
        architecture="Glm4MoeForCausalLM", topk_methods=("noaux_tc", None), biased="qkv",
        qk_norm="use_qk_norm", rotated=0.5,
    ),
    "minimax_m2": _GROUPED._replace(
        architecture="MiniMaxM2ForCausalLM", group_best=1, qk_norm="row",
        words=(_LOCAL, _WIDTH, ("attn_type_list", "attn_type_list")),
        values=(*_UNSCALED, _NONE_SHARED, _NORMALIZED, ("use_qk_norm", True), ("attn_type_list", 1),
                ("qk_norm_type", "per_layer"), ("use_routing_bias", True),
                ("shared_intermediate_size", 0)),
        names=(("block_sparse_moe.", "mlp."), ("mlp.e_score_", "mlp.gate.e_score_"),
               (".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj.")),
    ),
    "gpt_oss": _SOFTMAX._replace(
        architecture="GptOssForCausalLM", biased="qkvo", sinks=True, logit_bias=True,
        expert_biases=True, interleaved=True, activation=Activation(7.0, 1.702, 1.0),
        words=(_LOCAL, _WIDTH), values=(*_UNSCALED, _NONE_SHARED, _NORMALIZED),
        names=(("mlp.router.", "mlp.gate."),),
    ),
    "qwen2_moe": _SOFTMAX._replace(
        architecture="Qwen2MoeForCausalLM", biased="qkv", bias_key="", shared_gate=True,
        words=(_EXPERTS,), values=(*_UNSCALED, _NO_WINDOW, ("qkv_bias", True)),
        names=_SHARED,
    ),
    "qwen3_next": _DELTA._replace(architecture="Qwen3NextForCausalLM", by_key_head=True),
    "qwen3_5_moe_text": _DELTA._replace(
        architecture="Qwen3_5MoeForCausalLM", values=(*_DELTA.values, _NORMALIZED),
    ),
    "kimi_linear": _V3._replace(
        architecture="KimiLinearForCausalLM", delta=True, by_channel=True, rotated=0.0,
        words=(_EXPERTS, ("num_experts_per_token", "num_experts_per_tok"),
               ("num_shared_experts", "n_shared_experts"), ("num_expert_group", "n_group"),
               ("moe_renormalize", "norm_topk_prob"),
               ("moe_router_activation_func", "scoring_func"),
               ("model_max_length", "max_position_embeddings")),
        values=(("mla_use_nope", True), ("use_grouped_topk", True), ("linear_conv_kernel_dim", 4),
                ("num_nextn_predict_layers", 0)),
        names=(*((f"{of}.{ours}_proj.", f"{of}.{word}.")  # these say it as we do
                 for of in ("mlp", "shared_experts") for word, ours in _WORDS),
               *((f"block_sparse_moe.{of}.", f"mlp.{of}.")
                 for of in ("gate", "experts", "shared_experts")),
               *((f".{word}.", f".{ours}_proj.") for word, ours in _WORDS),
               *((f"self_attn.{word}", f"linear_attn.{ours}") for word, ours in _KDA.items())),
    ),
    "dots1": _GROUPED._replace(
        architecture="Dots1ForCausalLM", topk_methods=("noaux_tc", None), biased="qkvo",
        qk_norm="head",
    ),
    "hunyuan_v1_moe": _SOFTMAX._replace(
        architecture="HunYuanMoEV1ForCausalLM", biased="qkvo", qk_norm="head", norm_last=True,
        ntk_alpha=True,
        words=(_EXPERTS, _WIDTH, ("moe_topk", "num_experts_per_tok"),
               ("num_shared_expert", "n_shared_experts")),
        values=(*_UNSCALED, _NORMALIZED, ("n_shared_experts", 1), ("use_qk_norm", True),
                ("use_cla", False), ("moe_layer_num_skipped", 0)),
        names=(("mlp.gate.wg.", "mlp.gate."), ("mlp.shared_mlp.", "mlp.shared_experts."),
               ("query_layernorm.", "q_norm."), ("key_layernorm.", "k_norm.")),
    ),
    "ernie4_5_moe": _SOFTMAX._replace(
        architecture="Ernie4_5_MoeForCausalLM", correction_bias=True, rope_interleave=(True,),
        words=(("moe_num_experts", "n_routed_experts"), ("moe_k", "num_experts_per_tok"),
               ("moe_num_shared_experts", "n_shared_experts"),
               ("moe_layer_interval", "decoder_sparse_step")),
        values=(*_UNSCALED, _NORMALIZED, ("use_bias", False)),
        names=(("mlp.gate.moe_statics.", "mlp.moe_statics."),
               ("mlp.moe_statics.e_score_", "mlp.gate.e_score_")),
    ),
    "sarvam_mla": _V3._replace(
        architecture="SarvamMLAForCausalLM",
        words=(_EXPERTS, ("num_shared_experts", "n_shared_experts")),
    ),
}  # fmt: skip
"""By ``model_type``."""

WRAPPERS = ("kimi_k25", "mistral3", "qwen3_5_moe")
"""Values of ``model_type`` of models with more than text, whose ``text_config`` is of a family."""

OTHERS = {
    "deepseek": "its attention has keys and values for each head, no latent",
    "deepseek_v41": "its layers share keys, and some look up pieces of text",
    "deepseek_v41_text": "its layers share keys, and some look up pieces of text",
    "kimi_k3": "its delta rule is bounded, its layers attend to layers, its experts to less",
    "qwen4_exp": "its attention chooses blocks, its streams are several, and it looks up n-grams",
    "glm5_next": "its delta rule decays within a bound, and its indexer chooses pools of tokens",
    "bailing_hybrid": "its delta rule decays within a bound",
    "longcat_flash": "its layers have two attentions, and experts that compute nothing",
}
"""Why a ``model_type`` that is close is not one of them."""
