"""Every kind of a sequence's state beside a list of all its tokens: passes in steps, passes that
fail, cuts, marks, copies, and what goes to the disk and back, in any order."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from slotmoe.model.attention import new_state
from slotmoe.model.config import parse_config
from slotmoe.quant.shapes import MARK_TOKENS, MOST_ENDS, MOST_MARKS, SPARE
from slotmoe.state import CompressedCache, plain_row
from tests.support import states
from tests.support.v4 import CONFIGS, state_bytes

CONTEXTS = 1600, 1000
LEAST = {
    "v4": {"head_dim": 4, "qk_rope_head_dim": 2, "index_head_dim": 3, "sliding_window": 9},
    "v3.2": {"kv_lora_rank": 3, "qk_rope_head_dim": 2, "index_head_dim": 3, "index_n_heads": 1},
}
WHICH = st.integers(0, 1)


def unwritten(shape, dtype):
    return torch.full(shape, torch.nan, dtype=dtype)


def row_of(layer, tokens, start, end, width):
    """What the tokens from ``start`` to ``end`` leave in a layer, [T, width]."""
    rows = torch.full((end - start, width), float(layer))
    rows[:, 0] = torch.tensor(tokens[start:end]) * 4096.0 + torch.arange(start, end)
    return rows


def open_of(layer, tokens, start, end, width):
    row = row_of(layer, tokens, start, end, width)
    return torch.stack([row, row + 0.5], dim=1)


def squeezed(open_T2Y, ratio, overlaps, width):
    """A stand-in for a compressor: a row of each ``ratio`` tokens, and of those before."""
    rows, size = [], ratio * (1 + overlaps)
    for end in range(size, len(open_T2Y) + 1, ratio):
        rows.append(open_T2Y[end - size : end, :, :width].double().sum((0, 1)).float())
    return torch.stack(rows) if rows else torch.empty(0, width)


@dataclass
class Text:
    """A state, and what should be in it: it can be cut to each length from ``floor`` on, and to
    those of ``ends``."""

    state: object
    tokens: list = field(default_factory=list)
    floor: int = 0
    ends: list = field(default_factory=list)

    def drop(self):
        """Tokens are gone: ends behind them are, too."""
        self.ends = [end for end in self.ends if end <= len(self.tokens)]


class Latents:
    """How a pass writes a ``LatentCache``, and what is in one."""

    def __init__(self, state, config):
        self.state, self.layers, self.full = state, config.num_hidden_layers, config.indexer.full

    def write(self, layer, tokens, start, end):
        behind = end - self.state.length
        rows = self.state.extend(layer, behind)
        assert len(rows) == end
        rows[start:] = row_of(layer, tokens, start, end, rows.shape[1])
        if self.full[layer]:
            keys = self.state.extend_index(layer, behind)
            keys[start:] = row_of(layer, tokens, start, end, keys.shape[1])

    def right(self, tokens):
        state, end = self.state, len(tokens)
        full = [layer for layer in range(self.layers) if self.full[layer]]
        for rows, layers in ((state.layers, range(self.layers)), (state.index_keys, full)):
            for row, layer in zip(rows, layers, strict=True):
                assert torch.equal(row[:end], row_of(layer, tokens, 0, end, row.shape[1]))


class Compressed:
    """The same of a ``CompressedCache``."""

    def __init__(self, state, config):
        self.state, self.ratios = state, config.compressed.ratios
        self.window, self.layers = config.compressed.sliding_window, config.num_hidden_layers

    def groups(self, layer):
        state, ratio = self.state, self.ratios[layer]
        groups = [state.groups[ratio]] if ratio else []
        return groups + [state.index] * (ratio == 4)

    def write(self, layer, tokens, start, end):
        state, row = self.state, self.state.row_of[layer]
        width = state.window.rows.shape[-1]
        new = row_of(layer, tokens, start, end, width)
        rows, first = state.window.extend(layer, start, new)
        since = max(0, start - self.window + 1)
        assert first <= since and len(rows) == end - first
        assert torch.equal(rows[since - first :], row_of(layer, tokens, since, end, width))
        for group in self.groups(layer):
            ratio, width = group.ratio, group.rows.shape[-1]
            new = open_of(layer, tokens, start, end, group.open.rows.shape[-1])
            rows, first = group.open.extend(row, start, new)
            begin = max(0, start // ratio - group.overlaps)
            made = squeezed(
                rows[begin * ratio - first : end // ratio * ratio - first],
                ratio,
                group.overlaps,
                width,
            )
            stop = begin + group.overlaps + len(made)
            assert stop == max(end // ratio, begin + group.overlaps)
            group.rows[row, begin + group.overlaps : stop] = made
            if begin == 0 and group.overlaps and end >= ratio:
                group.rows[row, 0] = -1.0

    def right(self, tokens):
        for layer in range(self.layers):
            for group in self.groups(layer):
                rows = group.rows[self.state.row_of[layer], : len(tokens) // group.ratio]
                every = open_of(layer, tokens, 0, len(tokens), group.open.rows.shape[-1])
                made = squeezed(every, group.ratio, group.overlaps, rows.shape[-1])
                assert torch.equal(rows[group.overlaps :], made)
        for length in (len(tokens), *self.state.marks):
            self.right_tails(tokens, length)
        assert (
            self.state.used_bytes <= state_bytes(self.state) + self.state.snapshot_bytes(4096) * 3
        )

    def right_tails(self, tokens, length):
        state = self.state
        for layer in range(self.layers):
            start, width = max(0, length - self.window + 1), state.window.rows.shape[-1]
            last = state.window.last(length)[layer]
            assert torch.equal(last, row_of(layer, tokens, start, length, width))
            for group in self.groups(layer):
                start = max(0, (length // group.ratio - group.overlaps) * group.ratio)
                last = group.open.last(length)[state.row_of[layer]]
                width = group.open.rows.shape[-1]
                assert torch.equal(last, open_of(layer, tokens, start, length, width))


class Contract(RuleBasedStateMachine):
    name = ""

    @initialize()
    def start(self):
        self.config = parse_config({**CONFIGS[self.name], **LEAST[self.name]})
        made = [new_state(self.config, size, plain_row, unwritten) for size in CONTEXTS]
        self.texts, self.next = [Text(state) for state in made], 0
        kind = Compressed if isinstance(made[0], CompressedCache) else Latents
        self.views = [kind(state, self.config) for state in made]

    @rule(
        which=WHICH,
        count=st.one_of(st.integers(1, 17), st.integers(1, 600)),
        size=st.integers(1, 300),
        fails=st.none() | st.integers(0, 3),
    )
    def run(self, which, count, size, fails):
        """A pass in steps, which may end in the middle of a layer."""
        text, view = self.texts[which], self.views[which]
        count = min(count, text.state.context - len(text.tokens))
        if not count:
            return
        size = max(size, count // 4)
        start, before = len(text.tokens), text.tokens
        tokens = [*before, *range(self.next, self.next + count)]
        self.next = (self.next + count) % 997
        text.state.begin(count)
        for layer in range(view.layers):
            for at in range(start, start + count, size):
                end = min(at + size, start + count)
                view.write(layer, tokens, at, end)
                if fails == layer and at + size >= start + count // 2:
                    text.state.cut(start)
                    text.floor = max(text.floor, start - SPARE)
                    return
        text.state.done(count)
        text.tokens, text.floor = tokens, max(text.floor, len(tokens) - SPARE)

    @rule(which=WHICH, back=st.integers(0, SPARE))
    def cut(self, which, back):
        text = self.texts[which]
        length = max(text.floor, len(text.tokens) - back)
        assert text.state.reach(length) == length
        self.cut_to(text, length)

    @rule(which=WHICH, asked=st.integers(0, CONTEXTS[0]))
    def cut_far(self, which, asked):
        text = self.texts[which]
        self.cut_to(text, self.reached(text, asked))

    def reached(self, text, asked):
        """How far a state reaches, which is as far as it must."""
        length = text.state.reach(asked)
        assert length <= min(asked, len(text.tokens))
        must = [end for end in text.ends if end <= asked]
        if asked >= text.floor:
            must.append(min(asked, len(text.tokens)))
        assert length >= max(must, default=0)
        return length

    def cut_to(self, text, length):
        text.state.cut(length)
        text.tokens, text.floor = text.tokens[:length], min(text.floor, length)
        text.drop()

    @rule(which=WHICH, back=st.integers(0, SPARE))
    def mark(self, which, back):
        text = self.texts[which]
        length = max(text.floor, len(text.tokens) - back)
        text.state.mark(length)
        if length:
            text.ends = [*(end for end in text.ends if end != length), length][-MOST_ENDS:]

    @rule(which=WHICH, asked=st.integers(0, CONTEXTS[0]))
    def copy(self, which, asked):
        source, other = self.texts[which], self.texts[1 - which]
        length = self.reached(source, min(asked, other.state.context))
        other.state.copy(source.state, length)
        other.tokens, other.floor, other.ends = source.tokens[:length], length, [*source.ends]
        other.drop()

    @rule(
        which=WHICH, asked=st.integers(0, CONTEXTS[0]), more=st.integers(0, 64), held=st.booleans()
    )
    def restore(self, which, asked, more, held):
        """In blocks of 64 tokens, of which the last may go on behind the place; from the beginning,
        or behind what another text has of the same."""
        source, other = self.texts[which], self.texts[1 - which]
        length = self.reached(source, min(asked, other.state.context))
        snapshot = source.state.snapshot(length)
        assert snapshot.numel() == source.state.snapshot_bytes(length)
        common = 0
        if held:
            pairs = zip(source.tokens, other.tokens, strict=False)
            common = next((at for at, (a, b) in enumerate(pairs) if a != b), 0)
            common = other.state.reach(min(common, length))
        for start in range(common // 64 * 64, length, 64):
            stop = min(start + 64, length)
            end = min(start + 64, stop + more, len(source.tokens))
            data = source.state.saved(start, end)
            assert data.numel() == source.state.saved_bytes(start, end)
            other.state.put(start, end, data, stop)
        self.cut_to(other, common)
        other.state.resume(length, snapshot)
        other.tokens, other.floor = source.tokens[:length], length

    @invariant()
    def right(self):
        for text, view in zip(self.texts, self.views, strict=True):
            state = text.state
            assert state.length == len(text.tokens)
            view.right(text.tokens)
            assert set(text.ends) <= {*state.marks} or isinstance(view, Latents)
            multiples = [mark for mark in state.marks if mark not in text.ends]
            assert all(mark % MARK_TOKENS == 0 for mark in multiples)
            assert len(state.marks) <= MOST_MARKS + MOST_ENDS + 600 // MARK_TOKENS + 1


def of_v4():
    config = parse_config({**CONFIGS["v4"], **LEAST["v4"]})
    state = new_state(config, CONTEXTS[0], plain_row, unwritten)
    return state, Compressed(state, config)


def extend(state, view, tokens):
    """A pass, up to the end of ``tokens``."""
    start = state.length
    state.begin(len(tokens) - start)
    for layer in range(view.layers):
        view.write(layer, tokens, start, len(tokens))
    state.done(len(tokens) - start)


def test_of_many_marks_those_at_ends_stay():
    (state, view), tokens = of_v4(), [*range(CONTEXTS[0])]
    ends = [1490, 1500, 1515, 1540, 1560, 1570, 1590]
    for index, end in enumerate(ends):
        extend(state, view, tokens[:end])
        state.mark(end)
        wanted = ends[max(0, index - 3) : index + 1]
        assert [mark for mark in state.marks if mark % MARK_TOKENS] == wanted
        assert len(state.marks) <= MOST_MARKS + 2  # of the pass, and of its end


def test_rows_that_a_long_pass_left_out_do_not_come_back():
    """A short pass behind it moves the rows; what it moves is not all right."""
    state, view, tokens, length = *of_v4(), [*range(700)], 0
    for count, back in ((40, 0), (600, 10), (12, 0)):
        extend(state, view, tokens[: length + count])
        length += count - back
        assert state.reach(length) == length
        state.cut(length)
    for asked in range(length - 60, length):
        if (reached := state.reach(asked)) == asked:
            view.right_tails(tokens, asked)
        else:
            assert reached in state.marks and asked < length - SPARE


@states.SIZES
@pytest.mark.parametrize("of", CONFIGS)
def test_states_beside_lists_of_tokens(of, examples, steps, part):
    machine = type(of, (Contract,), {"name": of})
    states.run(machine, examples, min(steps, 60 if of == "v4" else 40))
