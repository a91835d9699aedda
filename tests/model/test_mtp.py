"""The head that predicts one token more, beside plain float64 arithmetic of its formula
(transformers leaves its weights out)."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from slotmoe.errors import CheckpointError, ConfigError
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.network import MtpHead
from tests.support import plain, v4
from tests.support.encoded import fused
from tests.support.engine import IDS
from tests.support.families import V3, oracle_network, quietly, write_family
from tests.support.native import reference_cache, reference_network
from tests.support.oracle import relative

MTP = {"num_nextn_predict_layers": 1}
TIGHT = 1e-5
SOME = ("v3-groups-yarn", "v3-no-groups-no-qlora", "v3-two-dense-not-normalized")


def reference(folder, step_tokens=1 << 30):
    """The network and its head in float32, and an empty cache of each."""
    with open_checkpoint(folder, keep_mtp=True) as checkpoint:
        config = checkpoint.config
        weights = {name: checkpoint.tensor(name).float() for name in checkpoint.infos}
    network = reference_network(config, weights)
    head = MtpHead(network, weights, network.experts, step_tokens)
    return network, head, *(reference_cache(c, 64) for c in (config, head.config))


WITHOUT_HEAD = [  # what the checkpoint is, whether its config speaks of a head, and the answer
    ({}, False, ConfigError, "num_nextn_predict_layers is 0, expected 1 or more"),
    ({"moe_layer_freq": 2}, True, ConfigError, "moe_layer_freq 2 gives layer 3"),
    ({}, True, CheckpointError, "model.layers.3.enorm.weight is missing"),
]


@pytest.mark.parametrize(("overrides", "speaks", "problem", "found"), WITHOUT_HEAD)
def test_a_checkpoint_without_a_head_is_refused_by_name(
    tmp_path, overrides, speaks, problem, found
):
    config = write_family(tmp_path, V3, **overrides)
    if speaks:
        (tmp_path / "config.json").write_text(json.dumps(config | MTP))
    with pytest.raises(problem) as caught:
        open_checkpoint(tmp_path, keep_mtp=True)
    message = str(caught.value)
    assert found in message and "leave --keep-mtp out" in message and "\n" not in message
    open_checkpoint(tmp_path).close()


def v4_head_logits(folder, ids):
    """Float32 logits [T - 1, vocab] of V4's head, by transformers' decoder layer and its collapse
    of the streams; the way there is vLLM's and SGLang's."""
    config = json.loads((folder / "config.json").read_text())
    weights, streams = load_file(folder / "model.safetensors"), []
    layer = f"model.layers.{config['num_hidden_layers']}."
    plainly = {name: tensor for name, tensor in weights.items() if layer not in name}
    main = oracle_network(folder, plainly)
    main.model.hc_head.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
    own = {"num_hidden_layers": 1, "layer_types": [v4.WINDOW], "mlp_layer_types": ["moe"]}
    (folder / "head").mkdir()
    (folder / "head" / "config.json").write_text(json.dumps(config | own))
    inner = {name.removeprefix(layer): tensor for name, tensor in weights.items() if layer in name}
    eps, width = config["rms_norm_eps"], config["hidden_size"]
    parts = {name: inner.pop(f"{name}.weight") for name in ("enorm", "hnorm", "e_proj", "h_proj")}
    shared = {name: weights[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    shared["model.norm.weight"] = inner.pop("shared_head.norm.weight")
    shared |= {f"model.{name}": inner.pop(name) for name in [*inner] if name.startswith("hc_head")}
    shared |= {f"model.layers.0.{name}": tensor for name, tensor in inner.items()}
    with quietly():
        network = oracle_network(folder / "head", shared)
        main(torch.tensor([ids]))
        embedding_TD = F.rms_norm(
            main.model.embed_tokens.weight[ids[1:]], (width,), parts["enorm"], eps
        )
        h_1TQD = F.rms_norm(streams[0][:, :-1], (width,), parts["hnorm"], eps) @ parts["h_proj"].t()
        h_1TQD = h_1TQD + (embedding_TD @ parts["e_proj"].t())[None, :, None]
        positions_1T = torch.arange(len(ids) - 1)[None]
        far_TT = positions_1T.t() - positions_1T
        seen_TT = (far_TT >= 0) & (far_TT < config["sliding_window"])
        mask = torch.zeros(seen_TT.shape).masked_fill(~seen_TT, -torch.inf)[None, None]
        tables = {
            kind: network.model.rotary_emb(h_1TQD, positions_1T, layer_type=kind)
            for kind in ("main", "compress")
        }
        given = {"position_embeddings": tables, "position_ids": positions_1T}
        h_1TQD = network.model.layers[0](h_1TQD, attention_mask=mask, **given)
        return network.lm_head(network.model.norm(network.model.hc_head(h_1TQD)))[0]


def glm4_head_logits(folder, ids):
    """The same of GLM-4.5's, by transformers' layer for it."""
    from transformers.modeling_layers import MtpLayer

    main, weights = oracle_network(folder, {}), load_file(folder / "model.safetensors")
    prefix = f"model.layers.{main.config.num_hidden_layers}."
    words = {"shared_head.norm": "post_norm"} | {n: n for n in ("enorm", "hnorm", "eh_proj")}
    inner = {}
    for name in [name for name in weights if name.startswith(prefix)]:
        base, _, kind = name.removeprefix(prefix).rpartition(".")
        inner[f"{words.get(base, f'mtp_block.{base}')}.{kind}"] = weights[name]
    with quietly():
        kinds = type(main.model.layers[-1]), type(main.model.norm)
        layer = MtpLayer(main.config, *kinds, main.config.num_hidden_layers)
        layer.load_state_dict(fused(inner))
        h_1TD = main.model(torch.tensor([ids])).last_hidden_state[:, :-1]
        positions_1T = torch.arange(len(ids) - 1)[None]
        mask = torch.full((len(ids) - 1,) * 2, -torch.inf).triu(1)[None, None]
        tables = main.model.rotary_emb(h_1TD, positions_1T)
        given = main.model.embed_tokens(torch.tensor([ids[1:]])), h_1TD, tables, mask
        return main.lm_head(layer(*given, positions_1T, None))[0]


HEADS = [(case, plain.mtp_logits, {}) for case in SOME]
WITH_TRANSFORMERS = [("glm4", glm4_head_logits, {}), ("glm4-no-norm", glm4_head_logits, {})]
for case in ("v4", "v4-odd", "v4-two-streams"):  # so that no choice is a tie
    WITH_TRANSFORMERS += [(case, v4_head_logits, {"index_n_heads": 16})]
HEADS += [pytest.param(*head, marks=pytest.mark.full) for head in WITH_TRANSFORMERS]


@pytest.mark.parametrize(("case", "wanted", "more"), HEADS)
def test_a_head_beside_its_formula_or_transformers_layer(tmp_path, case, wanted, more):
    ids = IDS[:30]
    v4.write_case(tmp_path, case, **more, **MTP)
    network, head, state, own = reference(tmp_path)
    hidden_TD = network.forward(torch.tensor(ids), [state])
    logits_RV = head.head(head.forward(hidden_TD[:-1].clone(), torch.tensor(ids[1:]), own))
    assert (own.length, state.length) == (29, 30)
    if case in SOME:
        assert len(own.layers) == 1 and len(state.layers) == len(network.layers)
    assert relative(logits_RV, wanted(tmp_path, ids)) <= TIGHT
    # what it predicts is its own: neither the network's next token, nor the one behind it
    assert relative(logits_RV, network.head(hidden_TD)[1:]) > 0.1
