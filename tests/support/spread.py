"""How evenly a decoded token's work spreads over many threads: counts, no measurement.

A phase is a number of parts that no two threads share, all of one size.  As the pool gives them
out, the thread with most has ``ceil(parts / threads)`` of them.
"""

from typing import NamedTuple

CHUNK_ROWS, MOST_SPANS, TILE, SUM_COLUMNS = 64, 16, 16, 256  # of the kernels
BYTES, PRODUCTS = 20e9, 260e9  # a second of one core: of weights, and of attention's multiply-adds


class Phase(NamedTuple):
    """``parts`` of so many ``seconds`` each on one thread, ``times`` in a token."""

    name: str
    parts: int
    seconds: float
    times: int = 1


def up(a, b):
    return -(-a // b)


def phases(c, context, code_bytes=0.53):
    """Of a token behind ``context`` others, with int8 residents; no phase has less than two parts,
    which its caller does alone."""
    H, heads, R = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    nope, rope, value = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    layers, routed = c.num_hidden_layers, len(c.moe_layers)

    def product(name, rows, columns, times, width=1.0, both=1):
        seconds = TILE * columns * width * both / BYTES
        return Phase(name, up(rows, TILE), seconds, times)

    chunks = up(context, CHUNK_ROWS)
    spans = up(chunks, up(chunks, MOST_SPANS))
    attended = heads * (2 * R + rope) * context / PRODUCTS
    query = c.q_lora_rank or heads * (nope + rope)
    found = [product("projections", query + R + rope, H, layers)]
    if c.q_lora_rank:
        found += [product("projections", heads * (nope + rope), c.q_lora_rank, layers)]
    found += [
        Phase("absorbed products", heads, nope * R / BYTES, layers),
        Phase("attention", up(heads, TILE), 4 * TILE * (R + rope) / BYTES, layers),
        Phase("attention", spans, attended / spans, layers),
        Phase("absorbed products", heads, value * R / BYTES, layers),
        product("projections", H, heads * value, layers),
        product("router", c.n_routed_experts, H, routed, width=4.0),
    ]
    K, inner = c.num_experts_per_tok, c.moe_intermediate_size
    gate_up, down = (
        product("experts", rows, columns, routed, code_bytes, both)
        for rows, columns, both in ((inner, H, 2), (H, inner, 1))
    )
    found += [phase._replace(parts=K * phase.parts) for phase in (gate_up, down)]
    found += [Phase("experts", up(H, SUM_COLUMNS), 4 * K * SUM_COLUMNS / BYTES, routed)]
    sizes = (c.n_shared_experts * inner, routed), (c.intermediate_size, layers - routed)
    for size, times in sizes:
        found += [product("MLPs", size, H, times, both=2), product("MLPs", H, size, times)]
    found += [product("head", c.vocab_size, H, 1)]
    return [phase for phase in found if phase.parts > 1]


def barriers(found):
    """How often a token's threads wait for each other."""
    return sum(phase.times for phase in found)


def spread(found, threads):
    """By name and in ``all``: the share of the threads' time that is work, which is 1 where each
    has as much as the others."""
    work, spent = dict.fromkeys(["all"], 0.0), dict.fromkeys(["all"], 0.0)
    for name, parts, seconds, times in found:
        for key in (name, "all"):
            work[key] = work.get(key, 0.0) + parts * seconds * times
            spent[key] = spent.get(key, 0.0) + up(parts, threads) * seconds * times * threads
    return {name: work[name] / spent[name] for name in work}
