"""What crosses between the network and its backend: a layer's weights, sizes, a pass on its way.

Only the backend knows what a weight ``W`` is made of (fp32, int8, codes) and where it lies.

Shapes: T tokens, D hidden_size, H heads, N qk_nope_head_dim, P qk_rope_head_dim, R kv_lora_rank, V
v_head_dim, W = R + P latent row, X elements of a cached row, C = P / 2, S cached positions, B a
block of them, E routed experts, K experts a token, M MoE layers, J heads of an indexer, A
index_head_dim, Z head_dim, G groups of heads, Y columns of a compressor, L rows of a list, Q
residual streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from slotmoe.network.state import SequenceState

W = TypeVar("W", covariant=True)
Biases = tuple[Tensor, Tensor, Tensor]


class Timer:
    """Where a pass says what it has just done; a profiler keeps it."""

    def begin(self) -> None:
        """A pass begins."""

    def end(self, kind: str, tokens: int) -> None:
        """A pass of ``prefill`` or ``decode`` is done, which has appended so many tokens."""

    def accepted(self) -> None:
        """The last pass has given one token more, which it had drafted."""

    def mark(self, stage: str, now: float | None = None) -> None:
        """The time since the last mark, until ``now`` (``time.perf_counter()``), is ``stage``'s."""


@dataclass(frozen=True)
class Mlp(Generic[W]):
    """Weights of a feed-forward network.  ``biases``, float32, of the three; ``output_gate``,
    float32 [1, D]: the sigmoid of its product with the input multiplies the output (Qwen2-MoE)."""

    gate_proj: W
    up_proj: W
    down_proj: W
    biases: Biases | None = None
    output_gate: Tensor | None = None


@dataclass(frozen=True)
class Indexer(Generic[W]):
    """Weights of a lightning indexer (DeepSeek-V3.2, arXiv 2512.02556): J queries out of the
    query's latent, one key of A values a token, and what each head counts."""

    wq_b: W
    wk: W
    k_norm: Tensor
    k_norm_bias: Tensor
    weights_proj: W


@dataclass(frozen=True)
class Mla(Generic[W]):
    """Weights of Multi-head Latent Attention.  The parts of ``q_a`` and ``q_b``, or ``q_proj``, are
    None where queries are made without, ``indexer`` where a layer has none."""

    q_proj: W | None
    q_a_proj: W | None
    q_a_layernorm: Tensor | None
    q_b_proj: W | None
    kv_a_proj: W
    kv_a_layernorm: Tensor
    kv_b_proj: W
    o_proj: W
    indexer: Indexer[W] | None


@dataclass(frozen=True)
class Compressor(Generic[W]):
    """Weights that make one row of a few tokens' (DeepSeek-V4): ``kv_proj`` and ``gate_proj`` give
    Y columns of each token, ``position_bias``, float32 [tokens, Y], is the gate's."""

    kv_proj: W
    gate_proj: W
    position_bias: Tensor
    kv_norm: Tensor


@dataclass(frozen=True)
class CompressedIndexer(Generic[W]):
    """Weights of the indexer that chooses among compressed rows (DeepSeek-V4)."""

    compressor: Compressor[W]
    q_b_proj: W
    weights_proj: W


@dataclass(frozen=True)
class Compressed(Generic[W]):
    """Weights of DeepSeek-V4's attention: one key that is the value too, a window of tokens, and
    compressed rows of those before.  ``compressor`` is None where a layer has the window alone,
    ``indexer`` where it sees all compressed rows."""

    q_a_proj: W
    q_a_norm: Tensor
    q_b_proj: W
    kv_proj: W
    kv_norm: Tensor
    sinks: Tensor
    o_a_proj: W
    o_b_proj: W
    compressor: Compressor[W] | None
    indexer: CompressedIndexer[W] | None


@dataclass(frozen=True)
class Grouped(Generic[W]):
    """Weights of grouped-query attention (arXiv 2305.13245): H heads of queries, G of keys and
    values, Z values each.  Biases are float32, or None, as norms and sinks are where the family has
    none: norms float32 [Z], of each head, or [H Z] and [G Z], of the whole row; ``sinks`` float32
    [H].  Each token sees the last ``window``, itself among them, or all for 0.  ``q_gate`` gives
    H Z values, whose sigmoid multiplies what goes into ``o_proj``; None where nothing does."""

    q_proj: W
    k_proj: W
    v_proj: W
    o_proj: W
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    o_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    sinks: Tensor | None
    window: int
    q_gate: W | None = None


@dataclass(frozen=True)
class Delta(Generic[W]):
    """Weights of a gated delta rule (arXiv 2412.06464).  ``in_proj_qkv`` gives Y columns: queries
    and keys of all key heads, and values of all value heads; ``in_proj_z`` what gates the output.
    Of each value head, float32: ``in_proj_b`` and ``in_proj_a`` [value heads, D] say how much is
    written and how much decays, with ``a_log`` and ``dt_bias``; ``value_norm`` is the norm of its
    output.  ``conv``, float32 [4, Y], are a convolution's taps, the oldest token's first.

    Where each channel of a key decays by itself (arXiv 2510.26692), ``in_proj_a`` and ``dt_bias``
    are of all of these, and two projections are of what a ``latent`` one gives."""

    in_proj_qkv: W
    in_proj_z: W
    in_proj_b: W
    in_proj_a: W
    conv: Tensor
    a_log: Tensor
    dt_bias: Tensor
    value_norm: Tensor
    out_proj: W
    in_proj_z_latent: W | None = None
    in_proj_a_latent: W | None = None


@dataclass(frozen=True)
class Mixing:
    """Weights, float32, that make what a hyper-connection mixes by out of all Q streams: ``fn``
    [(2 + Q) Q, Q D], ``base`` [(2 + Q) Q] and ``scale`` [3]; of the head [Q, Q D], [Q] and [1]."""

    fn: Tensor
    base: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Layer(Generic[W]):
    """Weights of one decoder layer.  ``gate`` is None in a dense layer, ``gate_bias``, which takes
    part in the choice, and ``logit_bias``, in the gate's logits, where the family has none,
    ``experts_of``, int32 [vocab, K], where the gate chooses by its scores instead
    of by the token, ``mlp`` where there is no shared expert, the mixings with one stream."""

    input_layernorm: Tensor
    attention: Mla[W] | Compressed[W] | Grouped[W] | Delta[W]
    post_attention_layernorm: Tensor
    gate: Tensor | None
    gate_bias: Tensor | None
    logit_bias: Tensor | None
    experts_of: Tensor | None
    mlp: Mlp[W] | None
    attention_mixing: Mixing | None
    mlp_mixing: Mixing | None


@dataclass(frozen=True)
class Ends(Generic[W]):
    """What a network has before its layers and behind them; and the angles of a position, float32
    in RAM, whose cosines and sines, times ``factor``, rotate pairs."""

    embedding: W
    norm_D: Tensor
    head: W
    frequencies_C: Tensor
    factor: float


class Router(NamedTuple):
    """What becomes of the gate's logits.

    Scores are the ``softmax`` of a token's logits, or each logit's own ``sigmoid``, or the root of
    its softplus, ``sqrtsoftplus`` (DeepSeek-V4): so says ``scoring``.  Of ``n_group`` groups of
    experts the ``topk_group`` best take part, a group counting by the sum of its ``group_best``
    best experts, and of their experts the ``top_k`` best (group-limited greedy, DeepSeek-V2, arXiv
    2405.04434, section 2.2.2; DeepSeek-V3, arXiv 2412.19437, section 2.1.2).  Weights are scores,
    ``normalized`` to add up to 1, times ``factor``.
    """

    n_group: int
    topk_group: int
    top_k: int
    factor: float = 1.0
    normalized: bool = False
    group_best: int = 1
    scoring: str = "softmax"


class IndexGeometry(NamedTuple):
    """Of an indexer: sizes, rows chosen, rotated pairs in ``halves`` (V3.2) or side by side."""

    J: int
    A: int
    topk: int
    halves: bool


class CompressedGeometry(NamedTuple):
    """Of DeepSeek-V4's attention: tokens that each token sees uncompressed, itself among them, and
    groups of heads that ``o_a_proj`` projects each by itself."""

    window: int
    groups: int


class GroupedGeometry(NamedTuple):
    """Of grouped-query attention: groups, values of a head, and whether queries and keys are normed
    behind their rotation instead of before it."""

    G: int
    Z: int
    norm_last: bool


class DeltaGeometry(NamedTuple):
    """Of a gated delta rule: heads of queries and keys, of values, and values of each.  If it
    decays ``by_channel`` of a key, the output's gate is a sigmoid instead of SiLU."""

    key_heads: int
    value_heads: int
    K: int
    V: int
    by_channel: bool


class HyperGeometry(NamedTuple):
    """Of hyper-connections: streams, Sinkhorn and Knopp's iterations, their epsilon, the norm's."""

    Q: int
    iterations: int
    small: float
    eps: float


class Geometry(NamedTuple):
    """What a backend has to know beside the weights to bind layers: sizes as in the shape legend,
    epsilons of the norms over D and over the latents, the factor of the scores, whether rotated
    pairs stand in two ``halves``.  DeepSeek-V4's head_dim is R and V, N + P of it; that of grouped
    queries too, of which the first P values are rotated."""

    H: int
    N: int
    P: int
    R: int
    V: int
    eps: float
    latent_eps: float
    softmax_scale: float
    halves: bool
    router: Router
    moe_intermediate_size: int
    indexer: IndexGeometry | None = None
    compressed: CompressedGeometry | None = None
    hyper: HyperGeometry | None = None
    grouped: GroupedGeometry | None = None
    delta: DeltaGeometry | None = None


class Pending(NamedTuple):
    """A layer that waits for its routed experts: their input, float32 [T, D], weights, float32
    [T, K], and indices, int64 [T, K], best first."""

    layer: int
    x_TD: Tensor
    weights_TK: Tensor
    indices_TK: Tensor


class ListedRows(NamedTuple):
    """Cached rows that attention is to, for each token those that its list names, in that order.

    ``lists``, int32 [T, L], are indices of ``rows``, and from ``len(rows)`` on of ``more``; -1
    ends a list.  A row's first R values are its value too.  ``sinks``, float32 [H], take part in
    the softmax as the score of a row without a value.
    """

    rows_SX: Tensor
    more_SX: Tensor | None
    lists_TL: Tensor
    sinks_H: Tensor | None = None


class GroupedRows(NamedTuple):
    """Cached rows of each group, a value and a key, of the positions from ``first`` on; the groups
    may lie apart.  With a ``window`` a token sees so many of them, itself among them.  ``sinks`` as
    in `ListedRows`."""

    rows_GSX: Tensor
    first: int
    window: int = 0
    sinks_H: Tensor | None = None


class DeltaRows(NamedTuple):
    """What a delta rule folds into its state: ``rows``, float32 [S, X], are of tokens one behind
    the other, each queries, keys and values before the convolution, then b and a.
    The first ``past`` rows, at most 3, are there for the convolution; tokens before have none.

    ``before``, float32 [value heads, K, V], is the state before the others.  The state behind
    ``folded`` of them, if any, goes to ``after``, which may be the same memory."""

    rows_SX: Tensor
    past: int
    before_HKV: Tensor
    after_HKV: Tensor
    folded: int


class Mixed(NamedTuple):
    """How a block's output is added to Q residual streams (DeepSeek-V4): ``post``, float32 [T, Q],
    is each one's share, ``comb``, float32 [T, Q, Q], how much of stream j goes on in stream k."""

    post_TQ: Tensor
    comb_TQQ: Tensor


@dataclass
class Chunk:
    """T tokens of a pass, or all of them, on their way through the layers: ``counts`` of each
    sequence, which has a state of its own, behind the pass's ``before`` of each.

    ``rope_TC`` rotates a token's pairs, ``compressed_rope_TC`` does in layers with compressed rows,
    where a position is an angle of so many ``compressed_C``, and ``query_scale_T``, None for 1,
    multiplies its queries.  ``ids_T`` are the tokens, None where no gate chooses by them.
    ``layer`` is the next layer, with the residual stream ``h_TD`` before it; several streams stand
    side by side.  Where ``x_TD`` is set, that layer lacks only its feed-forward: ``x_TD`` is the
    input of that, ``routed_TD`` the weighted sum of its routed experts, and ``mixed`` how the
    streams take it in.  ``lists_TL``, int32, are the rows that the last indexer has chosen for each
    token, best known in ascending order, -1 behind the last.  A chunk that ``waits`` stops at each
    layer with experts, where other chunks of its pass go first.  The pass ``ends`` with this chunk;
    then a runner may give ``logits_TV``, float32, until the next pass.  A stream without rows is
    before the embedding.
    """

    h_TD: Tensor
    rope_TC: Tensor
    query_scale_T: Tensor | None
    caches: Sequence[SequenceState]
    before: Sequence[int]
    counts: Sequence[int]
    timer: Timer | None
    ids_T: Tensor | None
    layer: int = 0
    x_TD: Tensor | None = None
    routed_TD: Tensor | None = None
    compressed_rope_TC: Tensor | None = None
    compressed_C: Tensor | None = None
    mixed: Mixed | None = None
    lists_TL: Tensor | None = None
    ends: bool = False
    waits: bool = False
    logits_TV: Tensor | None = None
