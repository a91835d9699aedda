"""Sampling, streaming of text, and when generation stops."""

from itertools import accumulate, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slotmoe.errors import CheckpointError, ConfigError
from slotmoe.model import generate
from slotmoe.model.generate import Answer, candidates, numbers, sample
from slotmoe.model.sampling import Generation, Sampling
from slotmoe.model.tokenizer import BYTE_CHARACTERS, TextStream, Tokenizer
from slotmoe.offload.engine.requests import Stream
from tests.support.kernels import native, needs_native
from tests.support.tiny import SAMPLE

TOKENIZER = Tokenizer(SAMPLE, 0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_sampling_follows_the_tempered_distribution(heavy):
    logits, draws = torch.tensor([0.0, 1.0, 2.0]), numbers(seeded(1))
    drawn = [sample(logits, Sampling(temperature=2.0), draws)[0] for _ in range(1500)]
    counts = torch.bincount(torch.tensor(drawn))
    torch.testing.assert_close(counts / 1500, (logits / 2).softmax(-1), atol=0.05, rtol=0)


FULL = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
PLAIN = Sampling(temperature=1.0)


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({}, PLAIN),
        ({**FULL, "do_sample": True, "max_new_tokens": 5}, Sampling(**FULL)),
        ({"do_sample": False, "top_p": 0.9}, Sampling(top_p=0.9)),
        # What nobody can sample with is as if it were not there.
        ({"top_k": -1, "top_p": 0, "min_p": 2, "temperature": -1, "repetition_penalty": 0}, PLAIN),
        (dict.fromkeys(FULL, "?"), PLAIN),
        (dict.fromkeys(FULL, 10**400), Sampling(temperature=1.0, top_k=10**400)),
    ],
)
def test_a_models_own_settings(about, expected):
    assert Generation.of((), about) == ((), expected)
    assert sorted(Generation.of((7,), {**about, "eos_token_id": [1, "x"]}).eos_token_ids) == [1, 7]


def by_full_sort(logits, sampling):
    """The probability of each id, from a stable sort of all of them."""
    order = logits.argsort(descending=True, stable=True)[: sampling.top_k or None]
    probabilities = ((logits[order] - logits.max()).double() / sampling.temperature).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= sampling.top_p] = 0
    probabilities[probabilities < sampling.min_p * probabilities[0]] = 0
    return torch.zeros(len(logits), dtype=torch.float64).scatter(0, order, probabilities)


@pytest.mark.parametrize(
    ("top_p", "top_k", "min_p"), [*product([1.0, 0.5, 1e-9], [0, 1, 40, 10**6], [0.0, 0.03])]
)
def test_candidates_are_those_of_a_full_sort(top_p, top_k, min_p):
    sampling = Sampling(temperature=0.9, top_p=top_p, top_k=top_k, min_p=min_p)
    for seed, width in enumerate((0.5, 3.0)):  # flat: top-p reaches far; steep: a few ids
        logits = torch.randn(5000, generator=seeded(seed)) * width
        ties = (logits * 4).round() / 4  # many equals at every cut
        for values in (logits, ties, logits.where(logits > 0, -torch.inf)):
            ids, weights = candidates(values, sampling)
            got = torch.zeros(5000, dtype=torch.float64).scatter(0, ids, weights / weights.sum())
            want = by_full_sort(values, sampling)
            torch.testing.assert_close(got, want / want.sum(), atol=1e-12, rtol=0)


def test_what_is_forbidden_is_never_drawn():
    """Not even by the smallest or the largest random number."""
    logits = torch.tensor([-torch.inf, 0.3, -torch.inf, 0.2, 0.1, -torch.inf])
    for number, expected in ((0.0, 1), (1 - 2**-53, 4)):
        assert sample(logits, Sampling(temperature=1.0), iter([number]))[0] == expected


@pytest.mark.parametrize(
    "limits",
    [{"top_p": 0.95}, {"top_p": 0.6, "min_p": 0.05}, {"top_k": 99}, {"top_k": 9, "top_p": 0.9}],
)
@needs_native
def test_kernels_draw_what_is_drawn_without_them(limits, monkeypatch):
    """Where rounding could decide, they leave it to torch; that is rare."""
    drawn, certain, choose = [[], []], [], native.choose

    def chosen(*given, **by_id):
        found = choose(*given, **by_id)
        certain.extend([] if by_id else found[:1])
        return found

    monkeypatch.setattr(native, "choose", chosen, raising=False)
    for way, found in zip((native, None), drawn, strict=True):
        monkeypatch.setattr(generate, "load", lambda way=way: way)
        for seed, (width, temperature) in enumerate(product((2.0, 4.0), (0.3, 0.7, 1.5))):
            logits = torch.randn(20_011, generator=seeded(seed)) * width
            draws = numbers(seeded(seed))
            ties = (logits * 4).round() / 4
            for values in (logits, ties, logits.where(logits > 2, -torch.inf)):
                sampling = Sampling(temperature=temperature, **limits)
                found += [sample(values, sampling, draws) for _ in range(6)]
                found.append(sample(values, Sampling(), draws))
    for (id, *logs), (other, *others) in zip(*drawn, strict=True):
        assert id == other and logs == pytest.approx(others, abs=1e-5)
    assert certain.count(-1) <= len(certain) / 50, (certain.count(-1), len(certain))
    for values in (logits * torch.nan, logits.where(logits < 0, torch.inf)):
        for limits in ((1.0, 0.9, 0, 0.0, 0.5), (0.0, 1.0, 0, 0.0, 0.0)):
            assert choose(values, limits)[0] == -1


BAD = [("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.1)]


@pytest.mark.parametrize(("key", "value"), [*BAD, ("top_k", -1), ("seed", -1)])
def test_impossible_sampling_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        Sampling(**{key: value})


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text("a \n.éЖ文\u0301\ufffd😀🇩", max_size=60))
def test_stream_gives_back_the_text_and_never_half_a_character(text):
    stream, parts = TextStream(TOKENIZER), []
    ids = TOKENIZER.encode(text, add_bos=False)
    for one in ids:
        parts.append(stream.push(one))
        assert "\ufffd" not in parts[-1] or "\ufffd" in text
    assert "".join(parts) + stream.flush() == TOKENIZER.decode(ids)


def streamed(ids):
    stream = TextStream(TOKENIZER)
    return "".join([stream.push(one) for one in ids]) + stream.flush()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, TOKENIZER.size - 1), max_size=40))
def test_stream_of_any_ids_adds_up_to_their_text(ids):
    assert streamed(ids) == TOKENIZER.decode(ids)


PARTS = [bytes([byte]) for byte in b"\x80\xa0\xbf\xc0\xc3\xe0\xe6\xed\xf0\xf4a"]


def test_stream_of_bytes_that_are_no_characters_is_that_of_the_library():
    spelled = [TOKENIZER.token_id(BYTE_CHARACTERS[part[0]]) for part in PARTS]
    assert [TOKENIZER.token_bytes(id_) for id_ in spelled] == PARTS
    for ids in product(spelled, repeat=4):
        assert streamed(ids) == TOKENIZER.decode([*ids]), ids


@pytest.mark.parametrize("part", [b"\x80", b"\xe6", b"\xed"])
def test_a_token_costs_the_same_however_many_came_before(part, monkeypatch):
    stream, decoded, decode = TextStream(TOKENIZER), [], Tokenizer.decode

    def counted(self, ids, *how):
        decoded.append(len(ids))
        return decode(self, ids, *how)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    id_ = TOKENIZER.token_id(BYTE_CHARACTERS[part[0]])
    shown = [*accumulate(len(stream.push(id_)) for _ in range(500))]
    assert all(count - 1 <= there for count, there in enumerate(shown, 1))
    assert sum(decoded) <= 3 * 500
    assert shown[-1] + len(stream.flush()) == 500


def generated(rows_RV, count=99, sampling=None):
    """Tokens of an answer that chooses from these logits."""
    answer = Answer([0], TOKENIZER, (1,), sampling or Sampling(), count, logprobs=0)
    stream, tokens = Stream([0], answer, "length"), []
    for logits_V in rows_RV:
        stream.request.emit(answer.take(logits_V))
        tokens += stream.ready()
        if stream.ended:
            break
    return tokens


def run(wanted, count=99):
    """The same of a model that answers the ids ``wanted``, one after the other."""
    return generated(9.0 * torch.nn.functional.one_hot(torch.tensor(wanted), 4200), count)


def test_where_a_text_ends():
    assert [token.id for token in run([50, 60, 1, 70])] == [50, 60]
    assert [token.id for token in run([50, 60, 70], count=2)] == [50, 60]
    ids = TOKENIZER.encode("日", add_bos=False)
    for cut in (ids, ids[:-1]):  # an incomplete character is flushed
        tokens = run([*cut, 1])
        assert [token.id for token in tokens] == cut
        assert "".join(token.text for token in tokens) == TOKENIZER.decode(cut)


def test_which_rows_are_chosen_and_how_likely_they_were():
    """None past the tokenizer; by the model's own distribution, before temperature."""
    logits = torch.zeros(3, TOKENIZER.size + 100)
    logits[:, TOKENIZER.size :] = 50.0
    logits[:, 77] = 5.0
    wanted = logits[0, : TOKENIZER.size].log_softmax(-1)[77].item()
    for token in generated(logits, 3, Sampling(temperature=0.01, seed=1)):
        assert (token.id, token.logprob) == (77, pytest.approx(wanted))
    with pytest.raises(CheckpointError, match="NaN"):
        generated(torch.full((1, 4096), float("nan")))
