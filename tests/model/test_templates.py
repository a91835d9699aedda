"""Chat templates in the words of many families write what transformers writes."""

import json

import pytest

from tests.support.forkserver import ROOT
from tests.support.templates import CHATS, both, tokenizer_in

TEMPLATES = json.loads((ROOT / "tests" / "data" / "templates.json").read_text(encoding="utf-8"))

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
