"""Sampling, streaming of text, and when generation stops."""

import json
import tracemalloc
from itertools import accumulate, chain, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slotmoe.errors import CheckpointError, ConfigError
from slotmoe.model.generate import Answer, candidates, sample
from slotmoe.model.sampling import Generation, Sampling
from slotmoe.model.tokenizer import BYTE_CHARACTERS, TextStream, Tokenizer
from slotmoe.offload.engine.requests import Stream, wait_for
from tests.support.tiny import SAMPLE

TOKENIZER = Tokenizer(SAMPLE, 0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_sampling_follows_the_tempered_distribution():
    logits, generator = torch.tensor([0.0, 1.0, 2.0]), seeded(1)
    drawn = [sample(logits, Sampling(temperature=2.0), generator) for _ in range(6000)]
    counts = torch.bincount(torch.tensor(drawn))
    torch.testing.assert_close(counts / 6000, (logits / 2).softmax(-1), atol=0.025, rtol=0)


FULL = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
PLAIN = Sampling(temperature=1.0)


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({}, PLAIN),
        ({**FULL, "do_sample": True, "max_new_tokens": 5}, Sampling(**FULL)),
        ({"do_sample": False, "top_p": 0.9}, Sampling(top_p=0.9)),
        ({"temperature": 0}, Sampling()),
        # What nobody can sample with is as if it were not there.
        ({"top_k": -1, "top_p": 0, "min_p": 2, "temperature": -1, "repetition_penalty": 0}, PLAIN),
        (dict.fromkeys(FULL), PLAIN),
        ({name: [1] for name in FULL}, PLAIN),
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
    ("top_p", "top_k", "min_p"),
    [*product([1.0, 0.97, 0.5, 1e-9], [0, 1, 40, 3000, 10**6], [0.0, 0.03])],
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


def test_what_is_forbidden_is_never_drawn(monkeypatch):
    """Not even by the smallest or the largest random number."""
    logits = torch.tensor([-torch.inf, 0.3, -torch.inf, 0.2, 0.1, -torch.inf])
    for number, expected in ((0.0, 1), (1 - 2**-53, 4)):
        mark = torch.tensor([number], dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *_, mark=mark, **__: mark)
        assert sample(logits, Sampling(temperature=1.0), seeded()) == expected


BAD = [("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.1)]


@pytest.mark.parametrize(("key", "value"), [*BAD, ("top_k", -1), ("seed", -1)])
def test_impossible_sampling_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        Sampling(**{key: value})


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_stream_gives_back_the_text_and_never_half_a_character(text):
    stream, parts = TextStream(TOKENIZER), []
    ids = TOKENIZER.encode(text, add_bos=False)
    for one in ids:
        parts.append(stream.push(one))
        assert "\ufffd" not in parts[-1] or "\ufffd" in text
    assert "".join(parts) + stream.flush() == TOKENIZER.decode(ids)


def of_a_sentencepiece():
    """Words that begin with what stands for a space, and characters in bytes, as Llama's."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["\u2581", "\u2581\u2581", "\u2581the", "the", "n't", ".", "é", "日", "<0x41"]
    about = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    steps = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    steps += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "added_tokens": [{"id": i, "content": names[i], **about, "special": True} for i in (1, 2)],
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {"type": "BPE", "vocab": {n: i for i, n in enumerate(names)}, "merges": []},
    }


def of_words():
    """As BERT's: a space goes before what is no end of a word."""
    names = ["[UNK]", "[SEP]", "the", "##n", "##'t", ".", "é", "##日"]
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    model |= {"max_input_chars_per_word": 9, "vocab": {n: i for i, n in enumerate(names)}}
    return {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}, "model": model}


KINDS = {
    "byte-level": lambda: json.loads((SAMPLE / "tokenizer.json").read_text()),
    **{"sentencepiece": of_a_sentencepiece, "words": of_words},
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = {**BARE, **KINDS[request.param]()}
    (folder / "tokenizer.json").write_text(json.dumps(source))
    return Tokenizer(folder, None)


BARE = {"version": "1.0", "added_tokens": []}
BARE |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor"))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_stream_of_any_ids_adds_up_to_their_text(tokenizer, data):
    """Of characters in bytes, where the library takes a whole run of them for none as soon as one
    byte is none, these are whole."""
    kinds = [st.integers(0, tokenizer.size - 1).map(lambda i: [i])]
    if byte := tokenizer.token_id("<0x00>"):
        kinds = [st.sampled_from([0, 1, 2, *range(byte + 256, tokenizer.size)]).map(lambda i: [i])]
        kinds += [st.text(max_size=3).map(lambda text: [byte + b for b in text.encode()])]
    ids = [*chain.from_iterable(data.draw(st.lists(st.one_of(kinds), max_size=40)))]
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def streamed(tokenizer, ids):
    stream = TextStream(tokenizer)
    return "".join([stream.push(one) for one in ids]) + stream.flush()


PARTS = [bytes([byte]) for byte in b"\x80\xa0\xbf\xc0\xc3\xe0\xe6\xed\xf0\xf4a"]


def test_stream_of_bytes_that_are_no_characters_is_that_of_the_library():
    spelled = [TOKENIZER.token_id(BYTE_CHARACTERS[part[0]]) for part in PARTS]
    assert [TOKENIZER.token_bytes(id_) for id_ in spelled] == PARTS
    for ids in product(spelled, repeat=4):
        assert streamed(TOKENIZER, ids) == TOKENIZER.decode([*ids]), ids
    # A special token, which has no text, does not part the bytes of a character.
    assert streamed(TOKENIZER, [150, 107, 1, 1904]) == TOKENIZER.decode([150, 107, 1, 1904])


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


def test_choosing_costs_the_same_however_long_the_prompt_is():
    """Ids in Python, of a prompt with penalties, were 78 ms for each token of each answer."""
    bias = tuple((token_id, 0.1) for token_id in range(1000))
    sampling = Sampling(repetition_penalty=1.1, presence_penalty=0.5, logit_bias=bias)
    logits, prompt = torch.randn(TOKENIZER.size, generator=seeded()), [*range(4096)] * 20
    answer = Answer(prompt, TOKENIZER, (1,), sampling, 99)
    answer.take(logits)
    tracemalloc.start()
    answer.take(logits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 14


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


def test_who_waits_for_a_text_goes_on_when_it_is_closed():
    """Whatever keeps the engine's thread; and who waits for a time only is told."""
    stream = Stream([0], Answer([0], TOKENIZER, (1,), Sampling(), 9), "length")
    stream.request.alive = lambda: True
    assert not stream.wait(0.0)
    stream.close()
    assert wait_for(stream._deltas, lambda: True, 0.0).finish == "cancelled"
    assert stream.wait() and [*stream] == []


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
