"""Chat templates and tokenizers made to break things."""

from contextlib import suppress

import pytest

import slotmoe.model.chat as chat_module
from slotmoe.errors import ConfigError
from slotmoe.model.chat import render_chat
from slotmoe.model.child import Child
from slotmoe.model.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer
from slotmoe.offload.model_source import read_model
from tests.support.hostile import edit_json, edited, fifo, refused, truncate, without, write

pytestmark = pytest.mark.usefixtures("processes")

TEMPLATES = {
    "endless-loop": "{% for i in range(99999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "endless-output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "memory-by-repetition": "{{ 'a' * 10 ** 9 }}",
    "class-of-a-string": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals-of-a-function": "{{ raise_exception.__globals__['sys'].modules }}",
    "change-of-arguments": "{{ messages.append(messages) }}",
    "file": "{% include '/etc/passwd' %}",
    "raises": "{{ raise_exception('first\nsecond \x1b[2J') }}",
    "deep": "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
    "surrogate": "\ud800",
    "absent": None,
}


WHICH_LIMIT = {"endless-output": "characters", "memory-by-repetition": "MemoryError"}
WHICH_LIMIT |= {"endless-loop": "did not finish"}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """A child checks the tokenizer once."""
    return tmp_path_factory.mktemp("verdicts")


HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_hostile_template(name, checkpoint, verdicts):
    template = {"chat_template": TEMPLATES[name]}
    edit_json(checkpoint / "tokenizer_config.json", lambda config: config.update(template))
    tokenizer = Tokenizer(checkpoint, 0, verdicts=verdicts)
    limit = WHICH_LIMIT.get(name, "")
    refused(lambda: render_chat(tokenizer, HI), "chat_template", limit, kind=ConfigError)


KEEPING = (
    "{% set ns = namespace(kept=SECRET) %}{% macro m(x=[]) %}{{ x }}{% endmacro %}",
    "{% set namespace.kept = SECRET %}",
    "{% set dict.fromkeys = SECRET %}",
    "{{ [].append(SECRET) }}",
    "{{ messages[0].update(kept=SECRET) }}",
    "{% set loop = SECRET %}{% set kept = SECRET %}{% set range = SECRET %}",
)
KEPT = (
    "{{ [kept, ns, m, loop] | join }}{{ range(1) }}{{ namespace.kept }}{{ dict.kept }}"
    "{{ dict.fromkeys.kept }}{{ raise_exception.kept }}{{ cycler.kept }}{{ messages[0].kept }}"
)


@pytest.mark.parametrize("keeping", KEEPING)
def test_a_conversation_leaves_nothing_to_the_next(keeping, checkpoint, verdicts):
    """Which the same process reads, by the same template."""
    template = "{% if SECRET %}KEEPING{% else %}KEPT{% endif %}"
    template = template.replace("KEEPING", keeping).replace("KEPT", KEPT)
    (checkpoint / "chat_template.jinja").write_text(template)
    tokenizer, child = Tokenizer(checkpoint, 0, verdicts=verdicts), chat_module.TEMPLATE
    before = render_chat(tokenizer, HI)
    process = child._process
    with suppress(ConfigError):
        render_chat(tokenizer, HI, extra={"SECRET": "hunter2"})
    assert render_chat(tokenizer, HI) == before == "range(0, 1)"
    assert child._process is process


def test_where_the_template_is_and_what_it_may_be(checkpoint):
    """Its file goes before the setting."""
    assert render_chat(Tokenizer(checkpoint, 0), HI).endswith("User: hi\n\nAssistant:")
    # jinja2 3.1.5 gave a template the globals of the functions that it is given.
    by_format = "{{ ('{0.__globals__}' | attr('format'))(raise_exception) }}"
    (checkpoint / "chat_template.jinja").write_text(f"<{{{{ messages[0].content }}}}{by_format}>")
    assert render_chat(Tokenizer(checkpoint, 0), HI) == "<hi>"
    (checkpoint / "chat_template.jinja").write_bytes(b"\xff")
    refused(lambda: Tokenizer(checkpoint, 0), "chat_template.jinja", kind=ConfigError)


def parts(**values):
    """Other parts of tokenizer.json."""
    return edited("tokenizer.json", lambda tokenizer: tokenizer.update(values))


def model(change):
    return edited("tokenizer.json", lambda tokenizer: change(tokenizer["model"]))


CUT = {"type": "BPE", "continuing_subword_prefix": "x", "merges": ["a é"]}
CUT |= {"vocab": {"a": 0, "é": 1, "aé": 2}}

TOKENIZERS = {
    # A merged token is cut inside a character: the library panics, and once more on its way out.
    "library-aborts": parts(model=CUT),
    "missing": without("tokenizer.json"),
    "id-too-large": model(lambda it: it["vocab"].update(a=1 << 40)),
    "deep": write("tokenizer.json", b'{"model":' + b"[" * 100_000),
    # The normalizer's table is garbage.
    "library-panics": parts(normalizer={"type": "Precompiled", "precompiled_charsmap": "////////"}),
    "too-large": truncate("tokenizer.json", MAX_TOKENIZER_BYTES + 1),
    "is-pipe": fifo("tokenizer.json"),
    "settings-many-values": write("tokenizer_config.json", b'{"a": [' + b"1," * 300_000 + b"1]}"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_broken_tokenizer(name, checkpoint):
    TOKENIZERS[name](checkpoint)
    refused(lambda: Tokenizer(checkpoint, 0), "tokenizer", kind=ConfigError)


def test_an_id_far_beyond_the_models_rows(checkpoint):
    """All that has a place for each id would be as large, above all the tables of grammars."""
    model(lambda it: it["vocab"].update(zzzzqq=4096 + 1023))(checkpoint)
    assert read_model(checkpoint)[1].size == 4096 + 1024
    for id_ in (4096 + 1024, 20_000_000):
        model(lambda it, id_=id_: it["vocab"].update(zzzzqq=id_))(checkpoint)
        words = "tokenizer.json", f"the token id {id_}", "4096 rows"
        refused(lambda: read_model(checkpoint), *words, kind=ConfigError)
    refused(lambda: Tokenizer(checkpoint, 0, rows=1 << 25), "id 20000000", kind=ConfigError)


def test_a_tokenizer_is_parsed_by_a_child_once(checkpoint, tmp_path, monkeypatch):
    started, run = [], Child.run
    monkeypatch.setattr(Child, "run", lambda *given: started.append(given) or run(*given))
    verdicts = tmp_path / "new" / "verdicts"
    for _ in range(2):
        Tokenizer(checkpoint, 0, verdicts=verdicts)
    assert len(started) == len(list(verdicts.iterdir())) == 1
    TOKENIZERS["library-aborts"](checkpoint)
    refused(lambda: Tokenizer(checkpoint, 0, verdicts=verdicts), "crashed", kind=ConfigError)
    (tmp_path / "file").touch()  # where no verdict can be kept
    refused(lambda: Tokenizer(checkpoint, 0, verdicts=tmp_path / "file" / "x"), kind=ConfigError)
    assert len(started) == 3


def test_a_tokenizer_neither_cuts_nor_pads(checkpoint):
    text = "Call me Ishmael. Some years ago, never mind how long precisely."
    whole = Tokenizer(checkpoint, 0).encode(text)
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "a"}
    parts(truncation=cut, padding=pad)(checkpoint)
    tokenizer = Tokenizer(checkpoint, 0)
    assert tokenizer.encode(text) == whole == [0, *tokenizer.encode_with_ends(text)[0]]
    refused(lambda: tokenizer.encode("a\udcff"), "UTF-8", kind=ConfigError)
