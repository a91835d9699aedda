"""``slotmoe chat``: what the model is sent, what is kept, what a full context drops, and
its use through pipes and on a terminal."""

import io
import json
import sys

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from slotmoe.errors import ConfigError, PlanError
from slotmoe.model.reasoning import ReasoningMarks
from slotmoe.model.sampling import Sampling
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.sessions.names import NamedSession, Saved
from slotmoe.tools.chat import COMMANDS
from slotmoe.tools.chat.conversation import Dialogue, Exchange
from slotmoe.tools.chat.terminal import Terminal
from tests.support.forkserver import OnTerminal
from tests.support.tiny import write_checkpoint

SYSTEM = "You are a clerk in a play by Shakespeare."


@pytest.fixture(scope="module")
def context(processes):
    return 256


@pytest.fixture
def talking(runtime, monkeypatch):
    """Make a conversation; its ``sent`` are the prompts (token ids) that it had answered, ``told``
    what the user was told."""

    def generate(self, prompt, *arguments, **options):
        sent.append(prompt)
        return original(self, prompt, *arguments, **options)

    def make(max_new_tokens=24, system=None, **sampling):
        conversation = Dialogue(runtime, max_new_tokens, Sampling(**sampling), system)
        conversation.notify = told.append
        conversation.sent, conversation.told = sent, told
        return conversation

    sent, told, original = [], [], Runtime.generate
    monkeypatch.setattr(Runtime, "generate", generate)
    return make


def said(answer):
    return "".join(answer)


def test_messages_go_through_the_chat_template_and_what_is_new_is_read(talking):
    chat = talking(max_new_tokens=30, system=SYSTEM)
    first = said(chat.answer("Who goes there?"))
    tokens = chat.runtime.stats()["tokens"]
    said(chat.answer("Speak!"))
    decode = chat.runtime.tokenizer.decode
    begun = f"{SYSTEM}\n\nUser: Who goes there?\n\nAssistant:"
    assert decode(chat.sent[0]) == begun
    assert decode(chat.sent[1]) == f"{begun} {first}User: Speak!\n\nAssistant:"
    read = chat.runtime.stats()["tokens"]["prefill_tokens"] - tokens["prefill_tokens"]
    # All but the first message and its answer, of which the last token was not read.
    assert read == len(chat.sent[1]) - len(chat.sent[0]) - 29
    chat.set_system(None)
    chat.reset()
    said(chat.answer("Again"))
    assert decode(chat.sent[2]) == "User: Again\n\nAssistant:"


def test_full_context_drops_the_oldest_and_says_so_once(talking):
    chat = talking(system=SYSTEM, max_new_tokens=20)
    context, decode = chat.runtime.context, chat.runtime.tokenizer.decode
    for number in range(11):
        said(chat.answer(f"Tell me, I pray you, of number {number}."))
    assert all(len(prompt) + 20 <= context for prompt in chat.sent)
    texts = [decode(prompt) for prompt in chat.sent]
    assert all(text.startswith(SYSTEM) for text in texts)
    seen = [[n for n in range(11) if f"number {n}." in text] for text in texts]
    firsts = [numbers[0] for numbers in seen]
    assert seen == [[*range(first, number + 1)] for number, first in enumerate(firsts)]
    told = len([note for note in chat.told if "context is full" in note])
    assert told == len({*firsts}) - 1 >= 2 and chat.forgotten == firsts[-1]


def test_an_answer_that_reaches_an_end_says_which(talking):
    """And a message beyond the context changes nothing."""
    chat = talking(max_new_tokens=1000)
    said(chat.answer("Tell me of the kings of England, and of their wars with France, at length."))
    assert "stopped because the context is full" in chat.told[0]
    state = chat.exchanges, chat.forgotten
    with pytest.raises(PlanError, match=r"192 fit: the context holds 256, of which 64 .*--context"):
        said(chat.answer("word " * 300))
    assert (chat.exchanges, chat.forgotten, len(chat.sent)) == (*state, 1)


def test_a_stopped_answer_is_kept_as_far_as_it_came(talking):
    chat = talking()
    answer = chat.answer("Hello")
    begun = next(answer) + next(answer)
    answer.close()
    assert chat.exchanges == [Exchange("Hello", begun)]
    said(chat.answer("Go on"))
    assert f"Assistant: {begun}User: Go on" in chat.runtime.tokenizer.decode(chat.sent[1])
    # Greedy, so the latent cache is as good as new.
    answers = [exchange.assistant for exchange in chat.exchanges]
    assert said(chat.regenerate()) == answers[1]


def test_reasoning_is_apart_from_the_answer_and_not_kept(talking, runtime, monkeypatch):
    """The sample's answers are taken for reasoning up to the first comma."""
    thought, _, rest = said(talking(60).answer("It is a truth")).partition(",")
    monkeypatch.setattr(runtime.tokenizer, "reasoning", ReasoningMarks("Assistant:", ",", {}))
    conversation, thoughts = talking(60), []
    conversation.think = thoughts.append
    answer = said(conversation.answer("It is a truth"))
    assert ("".join(thoughts), answer) == (thought.strip(), rest.strip()) and answer
    assert conversation.exchanges == [Exchange("It is a truth", answer)]


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
BAD_MESSAGES = [
    ([USER | {"content": "\ud800"}, ASSISTANT], r"\[0\].content: .* expected Unicode"),
    ([USER, USER], r"\[1\].role: is 'user', expected 'assistant'"),
    ([USER, ASSISTANT, USER], r"\[2\]: is a message without an answer"),
]


@pytest.mark.parametrize(("messages", "wanted"), BAD_MESSAGES)
def test_bad_messages_of_a_session_are_refused_by_their_place(runtime, tmp_path, messages, wanted):
    with NamedSession(tmp_path, "plans") as session:
        session.save(Saved(bytes(16), [1], "chat", messages))
        with pytest.raises(ConfigError, match=f"plans.json: messages{wanted}"):
            Dialogue(runtime, 8, Sampling(), session=session)


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


LINES = "Hello\n\n//slash\n/system Be brief\n/help\n/stats\n/regenerate\n/exit\nnever\n"
SHOWN = ["system message: Be brief", "/regenerate", "2 of 2 exchanges"]


def test_one_message_a_line_and_plain_text_out(chat, tmp_path):
    kept = "--session", "talk", "--session-dir", tmp_path
    code, out, err = chat(LINES, "--system", SYSTEM, *kept)
    messages = json.loads((tmp_path / "names" / "talk.json").read_text())["messages"]
    assert code == 0 and all(part in err for part in SHOWN)
    system, *texts = [message["content"] for message in messages]
    assert (system, texts[::2]) == ("Be brief", ["Hello", "/slash"])
    first, _, again = out.splitlines()
    assert [first, again] == texts[1::2]
    code, _, err = chat("/regenerate\n/reset\n/system off\n/system\n", *kept)
    assert code == 0 and "there is no system message" in err


BAD_LINES = [
    ("/fly\nnever\n", "/fly: no such command"),
    ("/regenerate\n", "there is no answer yet"),
    (b"fine\n\xff\n", "stdin: line 2 is not valid UTF-8"),
]


def test_bad_line_ends_it_with_one_line_and_exit_code_2(chat, tmp_path):
    for lines, wanted in BAD_LINES:
        code, out, err = chat(lines)
        assert code == 2 and wanted in err and "Traceback" not in err
        assert out.count("\n") == isinstance(lines, bytes)
    write_checkpoint(tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": None}))
    code, out, err = chat("Hello\n", model=tmp_path / "base")
    assert (code, out) == (2, "") and "not a chat model: take its Chat or Instruct" in err


KEYS = {
    "hello\r": "hello",
    "one\x1b\rtwo\ntree\x1b[Dh\r": "one\ntwo\ntrehe",  # Alt-Enter, Ctrl-J, then an arrow
    "\r  \rhello\r": "  hello",  # nothing is not sent
    "\x1b[200~two\nlines\x1b[201~\r": "two\nlines",  # pasted
    "dropped\x03kept\r": "kept",
    "\x04": None,
    "x\x01\x04\x04": None,  # deletes first
}


def test_keys_and_history(tmp_path):
    path, printed = tmp_path / "cache" / "history", io.StringIO()
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        terminal = Terminal(path, list(COMMANDS), lambda: "status", Console(file=printed))
        for typed, wanted in KEYS.items():
            keys.send_text(typed)
            assert terminal.read() == wanted
        assert printed.getvalue() == "" and path.stat().st_mode & 0o777 == 0o600
        keys.send_text("\x1b[A\x1b[A\r")
        assert Terminal(path, [], str, Console(file=printed)).read() == "two\nlines"
        keys.send_text("\x03\x04")
        assert terminal.read() is None
        assert "Ctrl-D" in printed.getvalue()  # how to leave


@pytest.mark.usefixtures("processes")
def test_interrupt_on_a_real_terminal(sample_export):
    options = "--temperature 0 -n 1000 --context 1024".split()
    with OnTerminal("chat", sample_export, *options) as terminal:
        terminal.until("loading ")
        terminal.send("/system Be brief\r")  # waits for the prompt, and is sent there
        terminal.until("system message: Be brief")
        terminal.until("context 0 of 1,024")
        terminal.send("Tell me of the kings of England, and of their wars, at length.\r")
        terminal.until("tokens/s")
        terminal.send("typed meanwhile")
        shown = terminal.until("tokens/s")
        terminal.send("\x03")
        assert b"typed" not in shown + terminal.until("stopped")
        terminal.until("of 1,024")  # the prompt is back, with its status line
        terminal.send("\x15/stats\r")
        terminal.until("1 of 1 exchanges")
        terminal.until("of 1,024")
        terminal.send("\x04")
        terminal.rest()
        assert terminal.wait() == 0
