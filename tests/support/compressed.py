"""The least models of DeepSeek-V4 and V3.2: their configs, and exports of random weights."""

import torch
from safetensors.torch import load_file, save_file

from slotmoe.offload.ingest.quantize import quantize
from slotmoe.quant.shapes import MARK_TOKENS, MOST_ENDS, MOST_MARKS, SPARE
from tests.support.families import INDEXED, V32, config_of
from tests.support.tiny import write_files

V4 = {
    **{"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"},
    **{"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu"},
    **{"torch_dtype": "bfloat16", "tie_word_embeddings": False, "max_position_embeddings": 8192},
    **{"hidden_size": 64, "moe_intermediate_size": 32, "n_shared_experts": 1},
    **{"n_routed_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
    **{"topk_method": "noaux_tc", "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5},
    **{"num_hidden_layers": 4, "num_hash_layers": 1, "compress_ratios": [0, 4, 128, 4]},
    **{"num_attention_heads": 4, "num_key_value_heads": 1, "q_lora_rank": 32, "head_dim": 32},
    **{"qk_rope_head_dim": 8, "o_groups": 2, "o_lora_rank": 16, "sliding_window": 24},
    **{"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "compress_rope_theta": 40000.0},
    **{"index_head_dim": 16, "index_n_heads": 4, "index_topk": 16, "swiglu_limit": 2.0},
    **{"hc_mult": 2, "hc_sinkhorn_iters": 6, "hc_eps": 1e-6, "num_nextn_predict_layers": 0},
    "rope_scaling": {
        **{"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        **{"beta_fast": 32, "beta_slow": 1},
    },
}
CONFIGS = {"v4": V4, "v3.2": {**config_of(V32, **INDEXED), "max_position_embeddings": 8192}}


def state_bytes(state):
    """Bytes of a state's memory, with the marks that there may be but for those of the pass under
    way."""
    most = (tail.rows.shape[1] // 2 - 1 - SPARE for tail in state._tails)
    end = sum(n * tail.rows[:, 0].nbytes for n, tail in zip(most, state._tails, strict=True))
    far = MARK_TOKENS * 4096  # a multiple, behind a full window
    marks = MOST_ENDS * end + MOST_MARKS * state.snapshot_bytes(far)
    return sum(part.rows.nbytes for part in (*state._kept, *state._tails)) + marks


def export_of(folder, name):
    """An export of the model, which routes by token id to two different experts."""
    raw, source = CONFIGS[name], folder / "source"
    write_files(source, raw, torch.bfloat16)
    weights = load_file(source / "model.safetensors")
    for key, tensor in weights.items():
        if "tid2eid" in key:
            ids_T = torch.arange(len(tensor))[:, None]
            chosen_TK = (ids_T * 3 + torch.arange(tensor.shape[1])) % raw["n_routed_experts"]
            weights[key] = chosen_TK.to(torch.int64)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    quantize(source, folder / "export", workers=1)
    return folder / "export"
