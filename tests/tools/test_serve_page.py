"""The page of ``slotmoe serve`` in a headless Chromium."""

import json
import re
import shutil

import pytest

from tests.support.forkserver import ROOT

PROGRAMS = "chromium-headless-shell chromium chromium-browser google-chrome chrome".split()

# Answers with the given deltas, piece by piece, in place of the server.  What follows null never
# comes, and false breaks the connection off.
SCRIPT = """
window.serverFetch ??= window.fetch;
window.fetch = async (address, options) => {
  if (!address.startsWith("/v1/")) return serverFetch(address, options);
  return new Response(new ReadableStream({async start(controller) {
    options.signal.addEventListener("abort", () => controller.error(options.signal.reason));
    const put = text => controller.enqueue(new TextEncoder().encode(text));
    for (const delta of DELTAS) {
      if (delta === null) return;
      if (delta === false) return controller.close();
      const data = JSON.stringify({choices: [{delta}]});
      put(": ping\\n\\ndata: " + data.slice(0, 20));
      put(data.slice(20) + "\\n\\n");
      await new Promise(done => setTimeout(done));
    }
    put('data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\\n\\ndata: [DONE]\\n\\n');
    controller.close();
  }}));
};
"""


class Page:
    """The page, with the server's first figures on it.  What it asked for, and what its scripts
    complain of, is kept."""

    def __init__(self, browser, port):
        self.origin, self.requests, self.complaints = f"http://127.0.0.1:{port}", [], []
        self.context = browser.new_context(viewport={"width": 1280, "height": 800})
        self.tab = tab = self.context.new_page()
        tab.on("request", lambda request: self.requests.append(request.url))
        tab.on("console", lambda it: it.type == "error" and self.complaints.append(it.text))
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.evaluate, self.press, self.click = tab.evaluate, tab.keyboard.press, tab.click
        self.type = tab.keyboard.insert_text
        self.load()

    def load(self):
        self.tab.goto(self.origin)
        self.wait("now !== null")

    def wait(self, expression):
        """Until it is true."""
        self.tab.wait_for_function(f"() => {expression}", polling=10)

    def run(self, code):
        """What ``code`` returns."""
        return self.evaluate(f"() => {{ {code} }}")

    def answer_with(self, *deltas):
        deltas = [{"content": delta} if isinstance(delta, str) else delta for delta in deltas]
        self.run(SCRIPT.replace("DELTAS", json.dumps(deltas)))

    def settings(self, **values):
        self.run(f"for (const [name, it] of Object.entries({values})) at(name).value = it")

    def send(self, text):
        """Send a message with the keyboard."""
        self.run("at('prompt').focus()")
        self.type(text)
        self.press("Enter")

    def say(self, text, messages):
        self.send(text)
        self.end(messages)

    def end(self, messages):
        """Wait until the conversation has so many messages and no answer is under way."""
        self.wait(f"chat.messages.length === {messages} && !stopper")

    def contents(self):
        return self.evaluate("chat.messages.map(message => message.content)")

    def texts(self, selector):
        return self.tab.locator(selector).all_text_contents()

    def is_seen(self, selector):
        """Whether the element is inside the window and nothing lies over its middle."""
        return self.run(
            f"const it = document.querySelector('{selector}'), box = it.getBoundingClientRect();"
            "const x = box.x + box.width / 2, y = box.y + box.height / 2;"
            "return box.width > 0 && it.contains(document.elementFromPoint(x, y));"
        )


@pytest.fixture(scope="module")
def browser(processes, network):
    sync = pytest.importorskip("playwright.sync_api")
    if (program := next(filter(None, map(shutil.which, PROGRAMS)), None)) is None:
        pytest.skip("no Chromium on this machine: scripts/ci-system installs one")
    with sync.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=program, args=["--no-sandbox"])


@pytest.fixture
def page(served, browser):
    page = Page(browser, served.port)
    yield page
    # Nothing else was loaded, and no script complained, also of the page's content policy.
    assert all(it.startswith((page.origin, "data:", "blob:")) for it in page.requests)
    assert [text for text in page.complaints if "status of 4" not in text] == []
    page.context.close()


def test_talk_by_keys(page, served):
    """An answer, another one, one that is stopped, a new chat."""
    page.settings(temperature=0, max_tokens=12)
    page.say("Tell me of the king.", 2)
    expected = served.chat(max_tokens=12)[1]["choices"][0]["message"]["content"]
    assert page.contents() == ["Tell me of the king.", expected]
    assert "".join(page.texts(".said > .text")[0].split()) == "".join(expected.split())
    note = page.texts(".assistant .note")[0]
    assert note.startswith("12 tokens · ") and "stopped by Most tokens" in note
    page.settings(temperature=2, seed=1)
    page.press("Alt+r")
    page.wait(f"!stopper && chat.messages[1].content !== {json.dumps(expected)}")
    page.answer_with("Half", None)
    page.send("x")
    page.wait("chat.messages.length === 4")
    assert page.texts("#send") == ["Stop"]
    page.press("Escape")
    page.end(4)
    assert "· stopped" in page.texts(".assistant .note")[1]
    page.press("Alt+n")
    page.wait("!document.querySelector('.said') && chat.messages.length === 0")


RENDER = "const it = make('div'); renderMarkdown(it, {}); return {};"
MARKDOWN = json.loads((ROOT / "tests" / "data" / "markdown.json").read_text())


def test_markdown(page):
    def render(source, expression="it.innerHTML"):
        return page.run(RENDER.format(json.dumps(source), expression))

    for source, expected in MARKDOWN.items():
        assert render(source) == expected, source
    codes = "[...it.querySelectorAll('code')].map(part => part.textContent)"
    source = (
        "```py x\ndef f():\n\tif 1:\n```\nb\n~~~\n```\n~~~~\n- c\n  ```\n  d\n  ```\n\n```\nopen"
    )
    assert render(source, codes) == ["def f():\n\tif 1:", "```", "d", "open"]
    rows = "[...it.querySelectorAll('tr')].map(n => [...n.children].map(c => c.textContent))"
    table = "| a | b |\n|---|:-:|\n| 1 | x\\|y |\n| **2** | |\n\nend"
    assert render(table, rows) == [["a", "b"], ["1", "x|y"], ["2", ""]]
    # An answer in pieces looks like the whole.
    text = json.dumps("\n\n".join([*MARKDOWN, source[:-8], table]))
    assert page.run(
        f"const text = {text}, it = make('div'), whole = make('div'); renderMarkdown(whole, text);"
        "for (let end = 1; end <= text.length; end += 1) renderMarkdown(it, text.slice(0, end));"
        "return it.innerHTML === whole.innerHTML;"
    )


HOSTILE = """<img src=x onerror="hit()"><script>hit()</script> ![a](http://evil.example/x.png)
[a](javascript:hit()) [b](data:text/html,<script>hit()</script>) <javascript:hit()>
[c](//evil.example) [d](vbscript:x) <iframe src="http://evil.example"></iframe>

```"><img src=x onerror=hit()>
</code></pre><script>hit()</script>
```

| <svg onload=hit()> | b |
|---|---|
| <style>*{display:none}</style> | <a href="javascript:hit()">x</a> |

<think><img src=x onerror=hit()></think>
"""


def test_nothing_of_the_model_is_run_or_loaded(page):
    page.run("window.hits = 0; window.hit = () => { hits += 1; }")
    page.answer_with(*re.findall(r"(?s).{1,7}", HOSTILE))
    page.say(HOSTILE.replace("\n", " "), 2)
    tags = page.evaluate(
        "[...new Set([...document.querySelectorAll('article *')].map(node => node.tagName))]"
    )
    allowed = "A BUTTON CODE DETAILS DIV P PRE SPAN SUMMARY TABLE TBODY TD TH THEAD TR"
    assert set(tags) <= set(allowed.split())
    links = page.evaluate("[...document.querySelectorAll('article a')].map(node => node.href)")
    assert links == ["http://evil.example/x.png", "http://evil.example/"]
    assert "<svg onload=hit()>" in page.texts("th")
    assert page.evaluate("hits") == 0


def test_history_is_kept_and_exported(page, tmp_path):
    page.answer_with("First *answer*")
    page.evaluate("at('system').focus()")
    page.type("Be brief")
    page.say("First question", 2)
    page.press("Alt+n")
    page.answer_with("Second answer")
    page.say("Second question", 2)
    assert page.texts("#list button:first-child") == ["Second question", "First question"]

    page.load()
    assert page.texts(".said") == ["Second question", "Reasoning" + "Second answer"]
    page.click("#list li:nth-child(2) button")
    assert page.texts("em") == ["answer"]
    assert page.evaluate("at('system').value") == "Be brief"

    with page.tab.expect_download() as download:
        page.click("#export")
    assert download.value.suggested_filename == "slotmoe-First-question.json"
    download.value.save_as(tmp_path / "talk.json")
    said = {"system": "Be brief", "user": "First question", "assistant": "First *answer*"}
    messages = [{"role": role, "content": text} for role, text in said.items()]
    assert json.loads((tmp_path / "talk.json").read_text()) == {"messages": messages}

    page.click("#list li[aria-current], #list li:nth-child(2) button:last-child")
    assert page.texts("#list button:first-child") == ["Second question"]


def test_failed_messages_leave_the_history_and_are_offered_again(page):
    page.settings(temperature=0, max_tokens=4)
    page.say("Hello", 2)
    long = "word " * 600
    page.say(long, 2)
    assert "(start with a larger --context, the model has 1024)" in page.texts("#notice")[0]
    assert page.evaluate("at('prompt').value") == long
    assert page.evaluate("request(chat).messages.length") == 2  # nothing was forgotten for it
    page.evaluate("at('prompt').value = ''")
    page.say("Hello again", 4)  # not a dead end
    assert page.evaluate("at('notice').hidden")
    before = page.contents()
    page.answer_with("Half an ans", "wer", False)
    page.press("Alt+r")
    page.wait("!at('notice').hidden && !stopper")
    assert "connection ended" in page.texts("#notice")[0]
    assert page.contents() == [*before[:3], "Half an answer"]


def test_small_screen(page):
    page.tab.set_viewport_size({"width": 320, "height": 568})
    page.answer_with("A `long` answer " * 60 + "\n\n```\n" + "x" * 400 + "\n```\n\n" + "y" * 400)
    page.say("A question", 2)
    root, talk = "document.documentElement", "at('talk')"
    assert page.evaluate(f"{root}.scrollWidth <= innerWidth && {root}.scrollHeight <= innerHeight")
    assert page.evaluate(f"{talk}.scrollWidth <= {talk}.clientWidth")
    for selector in ("#send", "#again", "#fresh", "#chats-opens", "#side-opens", "#state"):
        assert page.is_seen(selector), selector
    for name in ("chats", "side"):
        page.evaluate(f"at('{name}-opens').focus()")
        page.press("Enter")
        page.wait(f"at('{name}').classList.contains('open')")
        assert page.evaluate(f"{talk}.inert && document.activeElement.id") == name
        assert page.is_seen(f"#{name} h2") and not page.is_seen("#send")
        page.press("Escape")
        assert page.evaluate(f"!{talk}.inert && document.activeElement.id") == f"{name}-opens"
