"""Chat templates and tokenizers made to break things."""

from dataclasses import replace

import pytest

import slotmoe.model.tokenizer as tokenizer_module
from slotmoe.errors import ConfigError
from slotmoe.model.child import Child
from slotmoe.model.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer
from tests.support.hostile import edit_json, edited, fifo, refused, truncate, without, write

pytestmark = pytest.mark.usefixtures("processes")

TEMPLATES = {
    "endless-loop": "{% for i in range(99999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "endless-output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "memory-by-repetition": "{{ 'a' * 10 ** 9 }}",
    "memory-by-doubling": "{% set n = namespace(a='x') %}{% for i in range(40) %}"
    "{% set n.a = n.a + n.a %}{% endfor %}{{ n.a }}",
    "memory-by-format": "{{ '%099999999999d' % 1 }}",
    "memory-by-lists": "{{ (range(99999) | list * 99999) | length }}",
    "time-by-power": "{{ 9 ** (9 ** 9) }}",
    "class-of-a-string": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class-by-format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "globals-of-a-function": "{{ raise_exception.__globals__['sys'].modules }}",
    "globals-by-attr": "{{ (raise_exception | attr('__globals__')).sys.modules }}",
    "globals-by-self": "{{ self._TemplateReference__context.environment.globals.clear() }}",
    "range-too-long": "{{ range(10 ** 9) | list }}",
    "change-of-arguments": "{{ messages.append(messages) }}",
    "file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "syntax": "{% if %}",
    "raises": "{{ raise_exception('first\nsecond \x1b[2J') }}",
    "deep": "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
    "surrogate": "\ud800",
    "undefined": "{{ nothing.at.all }}",
    "not-text": 5,
    "absent": None,
}


WHICH_LIMIT = {"endless-output": "characters", "memory": "MemoryError"}
WHICH_LIMIT |= dict.fromkeys(("endless-loop", "time"), "did not finish")


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
    limits = [limit for prefix, limit in WHICH_LIMIT.items() if name.startswith(prefix)]
    refused(lambda: tokenizer.chat(HI), "chat_template", *limits, kind=ConfigError)


def test_a_template_that_breaks_out_finds_no_keys(checkpoint, monkeypatch, tmp_path):
    """Its process has neither the environment nor modules of the working directory."""
    (tmp_path / "jinja2").mkdir()
    (tmp_path / "jinja2" / "__init__.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tokenizer = Tokenizer(checkpoint, 0)
    assert tokenizer.chat(HI).endswith("User: hi\n\nAssistant:")
    printing = replace(tokenizer_module._TEMPLATE, program="import os; print(os.environ)")
    monkeypatch.setattr(tokenizer_module, "_TEMPLATE", printing)
    printed = tokenizer.chat(HI)
    assert "environ" in printed and "hf_secret" not in printed and str(tmp_path) not in printed


def test_a_template_finds_no_globals_by_format(checkpoint):
    """jinja2 3.1.5 gave it those of the functions that it is given."""
    template = "<{{ ('{0.__globals__}' | attr('format'))(raise_exception) }}>"
    (checkpoint / "chat_template.jinja").write_text(template)
    assert Tokenizer(checkpoint, 0).chat(HI) == "<>"


def test_template_file_goes_before_the_setting(checkpoint):
    assert Tokenizer(checkpoint, 0).chat(HI).endswith("User: hi\n\nAssistant:")
    (checkpoint / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    assert Tokenizer(checkpoint, 0).chat(HI) == "<hi>"
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
    "empty": write("tokenizer.json", b""),
    "not-json": write("tokenizer.json", b"{"),
    "not-a-tokenizer": write("tokenizer.json", b'{"version": "1.0"}'),
    "unknown-model": model(lambda it: it.update(type="Magic")),
    "id-too-large": model(lambda it: it["vocab"].update(a=1 << 40)),
    "merge-of-nothing": model(lambda it: it["merges"].insert(0, "zzq qqz")),
    "deep": write("tokenizer.json", b'{"model":' + b"[" * 100_000),
    # The normalizer's table is garbage.
    "library-panics": parts(normalizer={"type": "Precompiled", "precompiled_charsmap": "////////"}),
    "too-large": truncate("tokenizer.json", MAX_TOKENIZER_BYTES + 1),
    "is-pipe": fifo("tokenizer.json"),
    "settings-not-json": write("tokenizer_config.json", b"{"),
    "settings-is-pipe": fifo("tokenizer_config.json"),
    "settings-many-values": write("tokenizer_config.json", b'{"a": [' + b"1," * 300_000 + b"1]}"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_broken_tokenizer(name, checkpoint):
    TOKENIZERS[name](checkpoint)
    refused(lambda: Tokenizer(checkpoint, 0), "tokenizer", kind=ConfigError)


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


def test_prompt_that_is_no_text(checkpoint):
    refused(lambda: Tokenizer(checkpoint, 0).encode("a\udcff"), "UTF-8", kind=ConfigError)
