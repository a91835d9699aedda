"""``slotmoe chat``: what the model is sent, what is kept and saved, what a full context drops, and
its use through pipes."""

import errno
import io
import json
import os
import signal
import sys
import time
from itertools import pairwise

import pytest

from slotmoe.errors import ConfigError, PlanError
from slotmoe.model.sampling import Sampling
from slotmoe.model.tokenizer import ReasoningMarks
from slotmoe.offload.runtime import Runtime
from slotmoe.tools.chat.conversation import Dialogue, Exchange
from tests.support.tiny import write_checkpoint

SYSTEM = "You are a clerk in a play by Shakespeare."


@pytest.fixture(scope="module")
def context(processes):
    return 256


@pytest.fixture
def talking(runtime, monkeypatch):
    """Make a conversation; its ``sent`` are the prompts (token ids) that it had answered,
    ``generated`` the ids of the answers, ``told`` what the user was told."""

    def generate(self, prompt, *arguments, **options):
        sent.append(prompt)
        generated.append([])
        stream = original(self, prompt, *arguments, **options)
        answer, score = stream.request.answer, stream.request.answer.take

        def take(logits_V):
            delta = score(logits_V)
            generated[-1] += [token.id for token in delta.tokens]
            return delta

        answer.take = take
        return stream

    def make(max_new_tokens=24, system=None, stop=(), **sampling):
        conversation = Dialogue(runtime, max_new_tokens, Sampling(**sampling), system, stop=stop)
        conversation.notify = told.append
        conversation.sent, conversation.generated, conversation.told = sent, generated, told
        return conversation

    sent, generated, told = [], [], []
    original = Runtime.generate
    monkeypatch.setattr(Runtime, "generate", generate)
    return make


def said(answer):
    return "".join(answer)


def fed(runtime):
    """Tokens read and made so far."""
    tokens = runtime.stats()["tokens"]
    return tokens["prefill_tokens"], tokens["decode_tokens"]


# What the model is sent


def test_messages_go_through_the_chat_template_and_what_is_new_is_read(talking):
    chat = talking(max_new_tokens=30, system=SYSTEM)
    first = said(chat.answer("Who goes there?"))
    # The first message and its answer, all but the token that was made last.
    held, before = chat.sent[0] + chat.generated[0][:-1], fed(chat.runtime)
    said(chat.answer("Speak!"))
    decode = chat.runtime.tokenizer.decode
    begun = f"{SYSTEM}\n\nUser: Who goes there?\n\nAssistant:"
    assert decode(chat.sent[0]) == begun
    assert decode(chat.sent[1]) == f"{begun} {first}User: Speak!\n\nAssistant:"
    assert chat.sent[1][: len(held)] == held
    new = len(chat.sent[1]) - len(held)
    assert fed(chat.runtime) == (before[0] + new, before[1] + 29)
    assert chat.exchanges[0] == Exchange("Who goes there?", first)
    chat.set_system(None)
    chat.reset()
    said(chat.answer("Again"))
    assert decode(chat.sent[2]) == "User: Again\n\nAssistant:"


def test_regenerate_reads_nothing_and_gives_another_answer(talking):
    with pytest.raises(ConfigError, match="no answer yet"):
        talking().regenerate()
    chat = talking(temperature=1.0, seed=5)
    first = said(chat.answer("What news?"))
    read, made = fed(chat.runtime)
    second = said(chat.regenerate())
    # The prompt's last token, and 23 of the answer's.
    assert fed(chat.runtime) == (read + 1, made + 23)
    assert chat.exchanges == [Exchange("What news?", second)]
    assert second != first


# A full context


def test_full_context_drops_the_oldest_and_says_so_once(talking):
    chat = talking(system=SYSTEM, max_new_tokens=20)
    context, decode = chat.runtime.context, chat.runtime.tokenizer.decode
    for number in range(11):
        said(chat.answer(f"Tell me, I pray you, of number {number}."))
    assert all(len(prompt) + 20 <= context for prompt in chat.sent)
    texts = [decode(prompt) for prompt in chat.sent]
    assert all(text.startswith(SYSTEM) for text in texts)
    seen = [[n for n in range(11) if f"number {n}." in text] for text in texts]
    changes = 0
    for number, (before, now) in enumerate(pairwise(seen), 1):
        assert now == list(range(now[0], number + 1))  # the newest, without a gap
        if now[0] != before[0]:
            changes += 1
            assert len(chat.sent[number]) <= context // 2 < len(chat.sent[number - 1])
    assert changes == len([note for note in chat.told if "context is full" in note]) >= 2
    assert chat.forgotten == seen[-1][0]


def test_an_answer_that_reaches_an_end_says_which(talking, monkeypatch):
    """And a message beyond the context changes nothing."""
    chat = talking(max_new_tokens=1000)
    said(chat.answer("Tell me of the kings of England, and of their wars with France, at length."))
    length = len(chat.sent[0]) + len(chat.generated[0])
    assert length == chat.runtime.context, "the model ended by itself; choose another message"
    assert "stopped because the context is full" in chat.told[0]
    state = chat.exchanges, chat.forgotten
    wanted = r"the message has \d+ tokens .* and 192 fit: the context holds 256, of which 64 .*"
    with pytest.raises(PlanError, match=f"{wanted}--context"):
        said(chat.answer("word " * 300))
    assert (chat.exchanges, chat.forgotten, len(chat.sent)) == (*state, 1)
    said(talking(max_new_tokens=3).answer("Hello"))
    assert "stopped after 3 tokens" in chat.told[1]
    monkeypatch.setattr(Runtime, "generate", lambda *_, **__: (token for token in ()))
    assert said(talking().answer("Hello")) == ""
    assert chat.told[2:] == ["the model gave an empty answer"]


# Stopped answers


@pytest.mark.parametrize("again", [False, True])
def test_stopped_answers(talking, monkeypatch, again):
    """Kept as far as it came; interrupted before a word it changes nothing."""
    chat = talking()
    answer = chat.answer("Hello")
    begun = next(answer) + next(answer)
    answer.close()
    assert chat.exchanges == [Exchange("Hello", begun)]
    said(chat.answer("Go on"))
    assert f"Assistant: {begun}User: Go on" in chat.runtime.tokenizer.decode(chat.sent[1])
    before = chat.exchanges
    experts, pressed = type(chat.runtime.model.experts), []
    original = experts.begin

    def begin(*given):
        if not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)  # the main thread hears of it meanwhile
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(experts, "begin", begin)
        with pytest.raises(KeyboardInterrupt):
            said(chat.regenerate() if again else chat.answer("Wait"))
    assert chat.exchanges == before
    # Greedy, so the latent cache is as good as new.
    assert said(chat.regenerate()) == before[1].assistant


def test_reasoning_is_apart_from_the_answer_and_not_kept(talking, runtime, monkeypatch):
    """The sample's answers are taken for reasoning up to the first comma."""
    monkeypatch.setattr(runtime.tokenizer, "reasoning", ReasoningMarks("Assistant:", ",", {}))
    conversation, thoughts = talking(60), []
    conversation.think = thoughts.append
    answer = said(conversation.answer("It is a truth"))
    whole = conversation.runtime.tokenizer.decode(conversation.generated[-1])
    thought, _, rest = whole.partition(",")
    assert ("".join(thoughts), answer) == (thought.strip(), rest.strip()) and answer
    assert conversation.exchanges == [Exchange("It is a truth", answer)]


# Files


def test_saved_conversation_goes_on_where_it_was(talking, tmp_path, monkeypatch):
    """No other file is overwritten, and a save that fails leaves the file before it."""
    chat, path = talking(system="Grüße"), tmp_path / "talk.json"
    said(chat.answer("Hello\nthere"))
    chat.save(path)
    roles = ["system", "user", "assistant"]
    texts = ["Grüße", *chat.exchanges[0]]
    saved = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    assert json.loads(path.read_text()) == {"messages": saved}
    other = talking()
    other.load(path)
    assert (other.system, other.exchanges) == (chat.system, chat.exchanges)
    assert said(other.answer("More")) == said(chat.answer("More"))
    other.save(other.file)
    before = path.read_bytes()
    assert len(json.loads(before)["messages"]) == 5
    talking().reset()
    for taken, problem in ((path, "exists already"), (tmp_path / "nowhere" / "x", "be written")):
        with pytest.raises(ConfigError, match=problem):
            talking().save(taken)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"talk.json: can't be written .No space"):
        other.save(path)
    assert path.read_bytes() == before


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
BAD_FILES = [
    ("{", "not valid JSON"),
    ([], "expected a JSON object"),
    ({"messages": [], "model": "x"}, "'model'"),
    ({"messages": "hi"}, "expected a list under 'messages'"),
]
BAD_MESSAGES = [
    (["hi"], r"messages\[0\]: is 'hi'"),
    ([USER | {"name": "x"}, ASSISTANT], r"messages\[0\]: .*role and content"),
    ([USER, ASSISTANT | {"content": 3}], r"messages\[1\].content: is 3"),
    ([USER | {"content": "\ud800"}, ASSISTANT], r"messages\[0\].content: .*Unicode"),
    ([USER, USER], r"messages\[1\].role: is 'user', expected 'assistant'"),
    ([USER, ASSISTANT, USER], r"messages\[2\]: is a message without an answer"),
]
BAD_FILES += [({"messages": messages}, wanted) for messages, wanted in BAD_MESSAGES]


def test_bad_file_is_refused_by_name_and_changes_nothing(talking, tmp_path):
    chat = talking(system=SYSTEM)
    said(chat.answer("Hello"))
    before = chat.system, chat.exchanges, chat.file
    for content, wanted in BAD_FILES:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match=f"bad.json: (.*{wanted}|{wanted})"):
            chat.load(tmp_path / "bad.json")
        assert (chat.system, chat.exchanges, chat.file) == before


# Through pipes


@pytest.fixture
def chat(slotmoe, processes, sample_export, tmp_path, monkeypatch):
    """Run ``slotmoe chat`` with ``lines`` as stdin: exit code, stdout, stderr."""
    options = ["-n", 8, "--temperature", 0, "--context", 256]

    def run(lines, *arguments, model=sample_export):
        data = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return slotmoe("chat", model, *options, *arguments)

    monkeypatch.chdir(tmp_path)
    return run


LINES = "Hello\n\n//slash\n/system Be brief\n/save talk.json\n/help\n/stats\n/exit\nnever\n"
SHOWN = ["system message: Be brief", "2 exchanges are in ", "/regenerate", "% hits"]
SHOWN += ["2 of 2 exchanges are seen", "8 tokens"]


def test_one_message_a_line_and_plain_text_out(chat, tmp_path):
    code, out, err = chat(LINES, "--system", SYSTEM)
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert code == 0 and all(part in err for part in SHOWN)
    first, *texts = [message["content"] for message in messages]
    assert (first, texts[::2]) == ("Be brief", ["Hello", "/slash"])
    assert out == "".join(f"{answer}\n" for answer in texts[1::2])
    lines = "/load talk.json\n/regenerate\n/save\n/reset\n/system off\n/system\n"
    code, _, err = chat(lines, "--system", SYSTEM)
    assert code == 0 and "there is no system message" in err


BAD_LINES = [
    ("/fly\nnever\n", "/fly: no such command"),
    ("/save\n", "/save: needs the name"),
    ("/load nowhere.json\n", "nowhere.json: can't be read"),
    ("word " * 400, "the context holds 256"),
    (b"fine\n\xff\n", "stdin: line 2 is not valid UTF-8"),
]


def test_bad_line_ends_it_with_one_line_and_exit_code_2(chat, tmp_path):
    for lines, wanted in BAD_LINES:
        code, out, err = chat(lines)
        assert code == 2 and wanted in err and "Traceback" not in err
        assert out.count("\n") == isinstance(lines, bytes)
    write_checkpoint(tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    code, out, err = chat("Hello\n", model=tmp_path / "base")
    assert (code, out) == (2, "") and "not a chat model: take its Chat or Instruct" in err
