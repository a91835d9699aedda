"""What a sequence keeps, in bytes, and what attention to it costs: arithmetic without torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from slotmoe.model.config import Config
from slotmoe.quant.shapes import MARK_TOKENS, MOST_ENDS, MOST_MARKS, SPARE, latent_bytes


@dataclass(frozen=True)
class _Kept:
    """Rows that some layers keep: one of every ``ratio`` tokens for good, in ``row`` bytes, or none
    for 0; and of the last ``most`` tokens, ``regular`` of them at a mark that is no text's end,
    ``last`` bytes a token.  A token reads ``topk`` rows at most, all for 0."""

    ratio: int
    row: int
    most: int
    regular: int
    last: int
    topk: int = 0

    def nbytes(self, positions: int) -> int:
        rows = self.row * max(1, positions // self.ratio) if self.ratio else 0
        marks = MOST_ENDS * self.most + MOST_MARKS * self.regular
        return rows + self.last * (2 * (self.most + 1 + SPARE) + marks)

    def read_bytes(self, length: int) -> int:
        if not self.ratio:
            return self.last * min(length, self.most)
        rows = length // self.ratio
        return self.row * min(rows, self.topk or rows) + self.last * (self.most + 1) // self.ratio


def _kept(config: Config, kernels: str, value_bytes: int) -> Iterator[_Kept]:
    """What a model keeps: latents and index keys; or keys and values of groups, of all tokens or of
    a window; or where attention compresses, the window, and compressed rows by their ratio, twice
    where they have keys for an indexer.  ``native`` kernels keep 8 bits a value, with 16 bytes of
    scales and sums a row, others ``value_bytes``."""

    def row(latent: int, rope: int) -> int:
        return latent_bytes(latent, rope) if kernels == "native" else (latent + rope) * value_bytes

    c, indexer = config.compressed, config.indexer
    layers = [(config.ratio(at), config.has_indexer(at)) for at in range(config.layer_count)]
    topk = 0 if indexer is None else indexer.topk
    if (a := config.grouped) is not None:
        own, windows = a.groups * row(a.head_dim, a.head_dim), a.windows
        full = len(layers) - len(windows) + windows.count(0)  # with that of the mtp head
        yield _Kept(1, full * own, 0, 0, 0)
        if any(windows):
            most = max(windows) - 1
            yield _Kept(0, 0, most, most, (len(layers) - full) * own)
        return
    if c is None:
        latent = row(config.kv_lora_rank, config.qk_rope_head_dim)
        yield _Kept(1, len(layers) * latent, 0, 0, 0, topk)
        if indexer is not None:
            yield _Kept(1, layers.count((0, True)) * row(indexer.head_dim, 0), 0, 0, 0)
        return
    assert indexer is not None
    most = c.sliding_window - 1
    yield _Kept(0, 0, most, most, len(layers) * row(c.head_dim, 0))
    for ratio, overlaps in sorted({*layers} - {(0, False)}):
        count, span = layers.count((ratio, overlaps)), (1 + overlaps) * ratio
        sizes = [(c.head_dim, topk * overlaps), *[(indexer.head_dim, 0)] * overlaps]
        for values, most_read in sizes:
            last = count * 2 * (1 + overlaps) * values * 4
            yield _Kept(ratio, count * row(values, 0), span - 1, overlaps * ratio, last, most_read)


def kv_bytes(config: Config, positions: int, kernels: str = "native", value_bytes: int = 2) -> int:
    """Bytes of the KV cache for so many positions: ``kv_lora_rank + qk_rope_head_dim`` values a
    layer each, and ``index_head_dim`` in layers with an indexer; with grouped queries a value and a
    key of each group, and windows with all possible marks.  Where attention compresses: a window,
    compressed rows, uncompressed tokens in float32, all possible marks."""
    return sum(kept.nbytes(positions) for kept in _kept(config, kernels, value_bytes))


def kv_read_bytes(config: Config, length: int, kernels: str, value_bytes: int = 2) -> int:
    """Bytes of it that a token behind so many reads: all index keys, and the rows chosen."""
    return sum(kept.read_bytes(length) for kept in _kept(config, kernels, value_bytes))


def mark_bytes(config: Config, tokens: int, kernels: str = "native", value_bytes: int = 2) -> int:
    """Bytes of the marks that a pass over so many tokens makes."""
    kept = _kept(config, kernels, value_bytes)
    return tokens // MARK_TOKENS * sum(one.regular * one.last for one in kept)


def attention_products(config: Config, length: int) -> int:
    """Multiply-adds of scores and sums, and of an indexer's scores, for a token behind so many."""
    c, total, compresses = config, 0, config.compressed is not None
    window = 0 if c.compressed is None else min(length, c.compressed.sliding_window)
    for layer in range(c.num_hidden_layers):
        ratio = c.ratio(layer) if compresses else 1
        rows = min(length // ratio, c.window(layer) or length) if ratio else 0
        if c.indexer is not None:
            if c.has_indexer(layer):
                total += c.indexer.n_heads * c.indexer.head_dim * rows
            if not compresses or c.has_indexer(layer):
                rows = min(rows, c.indexer.topk)
        total += c.num_attention_heads * row_products(c) * (rows + window)
    return total


def row_products(config: Config) -> int:
    """Multiply-adds of a query and a row: of its key, and of its value, which may be the same."""
    rotated = config.qk_rope_head_dim if config.family.attention == "latent" else 0
    return 2 * config.kv_lora_rank + rotated
