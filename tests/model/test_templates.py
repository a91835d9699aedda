"""Chat templates in the words of many families write what transformers writes."""

import pytest

from tests.support.templates import CHATS, both, tokenizer_in

TEMPLATES = {
    "whitespace": "  {% if true %}\n a\n  {% endif %}\n\n{% for m in messages %}\n  {{ m.role }}\n"
    "    {#- gone -#}\n{% endfor %}\n",
    "tools": "{% if tools is not none %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "{% endif %}{{ tools is defined }}{{ documents is none }}{{ documents is defined }}",
    "tojson": "{% for t in tools or [messages[0].content] %}{{ t | tojson(ensure_ascii=False) }}"
    "{{ t | tojson(ensure_ascii=True, indent=2) }}{{ t | tojson(separators=(',', ':')) }}"
    "{{ t | tojson(sort_keys=True, indent='\t') }}{{ t | tojson(true) }}{% endfor %}",
    "calls": "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v if v is string else v | tojson }};"
    "{% endfor %}{% endfor %}{% endfor %}",
    "generation": "{% for m in messages %}{% set n = 1 %}{% if m.role == 'assistant' %}"
    "{% generation %}{% set n = 2 %}{{ m.content }}{{ n }}{{ loop.index }}{% endgeneration %}"
    "{%- endif %}{{ n }}\n{% generation -%}  {{ m.role }}  {%- endgeneration %}{% endfor %}",
    "loops": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.role }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "hidden": "{% set ns = namespace(_kept=1) %}{{ ns._kept }}",
    "absent": "{{ messages[0].nothing.at.all }}",
}

REFUSED = ("hidden", "absent", "raises")
pytestmark = pytest.mark.usefixtures("processes", "oracle")


@pytest.fixture(scope="module")
def tokenizer(processes, tmp_path_factory):
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
def test_transformers_writes_the_same(chat, template, tokenizer):
    theirs, ours = both(TEMPLATES[template], tokenizer, **CHATS[chat])
    assert theirs == ours
    assert theirs is not None or template in REFUSED or chat == "begun"
