"""The page of ``slotmoe serve`` in a headless Chromium: answers, Markdown, history, figures,
errors, small screens, and that nothing of the model's is run or loaded."""

import json
import re
from itertools import pairwise

import pytest

from slotmoe.model.generate import Sampling
from slotmoe.tools.chat.conversation import Conversation
from tests.support.browser import BROWSER, Browser
from tests.support.served import Served

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine: apt-get install chromium-headless-shell"
)

ANSWERED = "chat.messages.length === {} && !stopper"
# Answers with the given deltas, piece by piece, in place of the server; null never comes.
SCRIPT = """
window.serverFetch ??= window.fetch;
window.fetch = (address, options) => {
  if (!address.startsWith("/v1/")) return serverFetch(address, options);
  window.sent = JSON.parse(options.body);
  const deltas = DELTAS, stream = new ReadableStream({async start(controller) {
    const put = text => controller.enqueue(new TextEncoder().encode(text));
    for (const delta of deltas) {
      if (delta === null) {
        while (!options.signal.aborted) await new Promise(done => setTimeout(done, 5));
        return controller.error(options.signal.reason);
      }
      put(": ping\\n\\n");
      put("data: " + JSON.stringify({choices: [{delta: {content: delta}}]}) + "\\n\\n");
      await new Promise(done => setTimeout(done, 5));
    }
    put('data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\\n\\ndata: [DONE]\\n\\n');
    controller.close();
  }});
  return Promise.resolve(new Response(stream));
};
"""


class Page(Browser):
    """The page, with the server's first figures on it."""

    def __init__(self, port):
        self.origin = f"http://127.0.0.1:{port}"

    def start(self, width=1280, height=800, colours="light"):
        self.emulate(width, height, colours)
        self.open(self.origin)
        self.wait("now !== null")
        return self

    def answer_with(self, *deltas):
        self.evaluate(SCRIPT.replace("DELTAS", json.dumps(deltas)))

    def settings(self, **values):
        for name, value in values.items():
            self.evaluate(f"at('{name}').value = {value}")

    def say(self, text, messages):
        """Send a message with the keyboard, and wait until the conversation has so many."""
        self.evaluate("at('prompt').focus()")
        self.type(text)
        self.press("Enter", "\r")
        self.wait(ANSWERED.format(messages))

    def texts(self, selector):
        return self.evaluate(
            f"[...document.querySelectorAll('{selector}')].map(node => node.textContent)"
        )

    def is_seen(self, selector):
        """Whether the element is inside the window and nothing lies over its middle."""
        return self.evaluate(
            f"(() => {{ const it = document.querySelector('{selector}');"
            "const box = it.getBoundingClientRect(), x = box.x + box.width / 2;"
            "const top = document.elementFromPoint(x, box.y + box.height / 2);"
            "return box.width > 0 && (it === top || it.contains(top)); })()"
        )


@pytest.fixture
def page(served):
    with Page(served.port) as page:
        yield page.start()
        # Nothing else was loaded, and no script complained, also of the page's content policy.
        addresses = page.requests
        assert all(address.startswith((page.origin, "data:", "blob:")) for address in addresses)
        assert [text for text in page.complaints if "status of 4" not in text] == []


def test_talk_by_keys(page, served):
    """An answer, another one, one that is stopped, dark colours, a new chat."""
    page.settings(temperature=0, max_tokens=12)
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.say("Tell me of the king.", 2)
    expected = served.chat(max_tokens=12)[1]["choices"][0]["message"]["content"]
    assert page.evaluate("chat.messages[1].content") == expected
    assert page.texts(".user .said") == ["Tell me of the king."]
    assert "".join(page.texts(".said > .text")[0].split()) == "".join(expected.split())
    note = page.texts(".assistant .note")[0]
    assert re.match(
        r"12 tokens · [\d.]+ tokens/s · first token [\d.]+ s · context \d+ of 512", note
    )
    assert "stopped by Most tokens" in note
    page.settings(temperature=2)
    page.press("r", modifiers=1)
    page.wait(ANSWERED.format(2) + " && at('notice').hidden")
    assert page.evaluate("chat.messages[1].content") != expected
    page.settings(max_tokens=400)
    page.type("x")
    page.press("Enter", "\r")
    page.wait("stopper && chat.messages[3]?.content.length > 3")
    assert page.texts("#send") == ["Stop"]
    page.press("Escape")
    page.wait(ANSWERED.format(4))
    served.idle()
    assert "stopped" in page.texts(".assistant .note")[1]
    page.evaluate("at('theme').click(); at('theme').click()")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 27)"
    page.press("n", modifiers=1)
    page.wait("!document.querySelector('.said') && chat.messages.length === 0")


# Markdown

RENDER = "(() => {{ const it = make('div'); renderMarkdown(it, {}); return it.innerHTML; }})()"
MARKDOWN = {
    "plain & <b>": "<p>plain &amp; &lt;b&gt;</p>",
    "two\nlines\n\nmore": "<p>two\nlines</p><p>more</p>",
    "# A `b`\n####### c": "<h3>A <code>b</code></h3><p>####### c</p>",
    "**a *b* c** __d__ _e_ ~~f~~": "<p><strong>a <em>b</em> c</strong> <strong>d</strong>"
    " <em>e</em> <del>f</del></p>",
    "***a*** *a **b***": "<p><strong><em>a</em></strong> <em>a <strong>b</strong></em></p>",
    "snake_case_name 5 * 3 * 2 **open \\*a\\*": "<p>snake_case_name 5 * 3 * 2 **open *a*</p>",
    "`` a`b `` `**x**` `open": "<p><code>a`b</code> <code>**x**</code> `open</p>",
    "- a\n- b\n  - c\n\n  d\n- e": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul>"
    "<p>d</p></li><li><p>e</p></li></ul>",
    "3. a\n4. b\ntext": '<ol start="3"><li><p>a</p></li><li><p>b\ntext</p></li></ol>',
    "in\n1986. no list": "<p>in\n1986. no list</p>",
    "> a\n> - b\n\nc": "<blockquote><p>a</p><ul><li><p>b</p></li></ul></blockquote><p>c</p>",
    "a\n---\n***": "<p>a</p><hr><hr>",
    "[a](https://b.org/c_(d)) <http://e.org> see http://f.org/g.": '<p><a href="https://b.org/c_(d)"'
    ' target="_blank" rel="noopener noreferrer nofollow">a (https://b.org/c_(d))</a>'
    ' <a href="http://e.org/" target="_blank" rel="noopener noreferrer nofollow">http://e.org</a>'
    ' see <a href="http://f.org/g" target="_blank" rel="noopener noreferrer nofollow">'
    "http://f.org/g</a>.</p>",
    "a [b] ![c] http:// [d](javascript:e) <f": "<p>a [b] ![c] http:// [d](javascript:e) &lt;f</p>",
    "a\u202eb\x07": "<p>a\\u202eb\\u0007</p>",
}


def test_markdown(page):
    for source, expected in MARKDOWN.items():
        assert page.evaluate(RENDER.format(json.dumps(source))) == expected, source


def test_markdown_code_and_tables(page):
    def render(source, expression):
        return page.evaluate(
            f"(() => {{ const it = make('div'); renderMarkdown(it, {json.dumps(source)});"
            f"return {expression}; }})()"
        )

    codes = "[...it.querySelectorAll('.code')].map(n => [n.querySelector('span').textContent,"
    codes += "n.querySelector('code').textContent])"
    source = "```py x\ndef f():\n\tif 1:\n\n    # a\n```\nb\n~~~\n```\n~~~~\n    in\n    side\n"
    source += "- c\n  ```\n  d\n   e\n  ```\n\n```\nopen"
    expected = [["py", "def f():\n\tif 1:\n\n    # a"], ["", "```"], ["", "in\nside"]]
    assert render(source, codes) == [*expected, ["", "d\n e"], ["", "open"]]
    rows = "[...it.querySelectorAll('tr')].map(n => [...n.children].map(c => c.textContent))"
    table = "| a | b |\n|---|:-:|\n| 1 | x\\|y |\n| **2** | |\n\nend"
    assert render(table, rows) == [["a", "b"], ["1", "x|y"], ["2", ""]]
    assert render("a | b\n--|", rows) == []


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
    page.evaluate("window.hits = 0; window.hit = () => { hits += 1; }")
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


def test_no_answer_hangs_the_page(page):
    bombs = ["*a ", "**a", "_a_b", "[", "[a](", "![", "`a``b```c", "> ", "- ", "# ", "<http://",
             "| a ", "~~a", "\\", "(", "http://a.,;", "***", "[a](b(c", " " * 9 + "x", "1. ",
             "-  -", "``` ", "</think>", "\n> - 1. "]  # fmt: skip
    slowest = page.evaluate(
        f"Math.max(...{json.dumps(bombs)}.map(bomb => {{ const start = performance.now();"
        "renderMarkdown(make('div'), bomb.repeat(1e5 / bomb.length));"
        "return performance.now() - start; }))"
    )
    assert slowest < 2000  # ms for 100,000 characters


def test_an_answer_in_pieces_looks_like_the_whole(page):
    text = "\n\n".join(MARKDOWN) + "\n\n```py\na\n\nb\n```\n\n| a |\n|---|\n| b |\n\n    x\n\nend"
    grown = page.evaluate(
        f"(() => {{ const text = {json.dumps(text)}, it = make('div');"
        "for (let end = 1; end <= text.length; end += 1) renderMarkdown(it, text.slice(0, end));"
        "return it.innerHTML; })()"
    )
    assert grown == page.evaluate(RENDER.format(json.dumps(text)))
    # What has not changed stays, with what is selected in it.
    assert page.evaluate(
        "(() => { const it = make('div'); renderMarkdown(it, 'a\\n\\nb'); "
        "const [a, b] = it.children;"
        "renderMarkdown(it, 'a\\n\\nbc'); return it.children[0] === a && it.children[1] !== b; })()"
    )


def test_code_is_copied_by_a_click(page):
    page.call(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    page.answer_with("Here:\n\n```py\ndef f():\n\treturn 1\n```\n")
    page.say("Code", 2)
    page.click(".code button")
    page.wait("document.querySelector('.code button').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == "def f():\n\treturn 1"
    page.evaluate("navigator.clipboard.writeText('')")
    # Without TLS there is no clipboard interface.
    page.evaluate("navigator.clipboard.writeText = () => Promise.reject(new Error('no'))")
    page.click(".code button")
    page.wait("document.querySelector('.code button').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == "def f():\n\treturn 1"


@pytest.mark.parametrize(
    "deltas",
    [
        ["<thi", "nk>\nLet me ", "see.</think>\n\nIt is ", "4."],
        ["Let me see.\n", "</think>\n\nIt is 4."],  # where the template opens it
    ],
)
def test_reasoning_is_folded_and_not_sent_again(page, deltas):
    page.answer_with(*deltas, None)
    page.evaluate("at('prompt').focus()")
    page.type("2 + 2?")
    page.press("Enter", "\r")
    page.wait("document.querySelector('.assistant .said > .text')?.textContent === 'It is 4.'")
    assert page.texts("details .text") == ["Let me see."]
    assert page.evaluate("document.querySelector('details').open") is False
    page.press("Escape")
    page.wait(ANSWERED.format(2))
    page.answer_with("Yes.")
    page.say("Sure?", 4)
    assert page.evaluate("sent.messages[1]") == {"role": "assistant", "content": "It is 4."}
    assert page.evaluate("document.querySelectorAll('details')[1].hidden")


def test_open_reasoning_and_code_about_it(page):
    page.answer_with("<think>Hm", None)
    page.evaluate("at('prompt').focus()")
    page.type("Think")
    page.press("Enter", "\r")
    page.wait("document.querySelector('summary')?.textContent === 'Reasoning…'")
    page.press("Escape")
    page.wait(ANSWERED.format(2))
    parts = page.evaluate("splitReasoning('Write `<think>` and `</think>`.')")
    assert parts == {"reasoning": "", "text": "Write `<think>` and `</think>`.", "open": False}


# History


def test_history_is_kept_and_exported(page, runtime, tmp_path):
    page.answer_with("First *answer*")
    page.evaluate("at('system').value = 'Be brief'; at('system').dispatchEvent(new Event('input'))")
    page.say("First question", 2)
    page.press("n", modifiers=1)
    page.answer_with("Second answer")
    page.say("Second question", 2)
    assert page.texts("#list button:first-child") == ["Second question", "First question"]
    page.settings(top_k=7)
    page.evaluate("at('settings').dispatchEvent(new Event('input'))")

    page.open(page.origin)
    page.wait("now !== null")
    assert page.texts(".said") == ["Second question", "Reasoning" + "Second answer"]
    assert page.evaluate("at('top_k').value") == "7"
    page.click("#list li:nth-child(2) button")
    assert page.texts("em") == ["answer"]
    assert page.evaluate("at('system').value") == "Be brief"

    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.click("#export")
    path = tmp_path / "slotmoe-First-question.json"
    page.wait("true")
    for _ in range(100):
        if path.exists():
            break
        page.evaluate("new Promise(done => setTimeout(done, 50))")
    talk = Conversation(runtime, 8, Sampling())
    talk.load(path)  # as in slotmoe chat
    assert (talk.system, talk.exchanges) == ("Be brief", [("First question", "First *answer*")])

    page.click("#list li[aria-current], #list li:nth-child(2) button:last-child")
    assert page.texts("#list button:first-child") == ["Second question"]
    assert page.evaluate("chat.messages.length") == 0
    page.click("#notice button")
    assert sorted(page.texts("#list button:first-child")) == ["First question", "Second question"]
    assert page.texts(".user .said") == ["First question"]
    page.click("#list li:nth-child(1) button:last-child")
    page.open(page.origin)
    assert page.texts("#list button:first-child") == ["Second question"]


def test_damaged_and_full_storage(page):
    page.evaluate(
        "localStorage.setItem('slotmoe chat a', '{');"
        "localStorage.setItem('slotmoe settings', '3');"
        'localStorage.setItem(\'slotmoe chat b\', \'{"id": "b", "messages": 3}\');'
        "localStorage.setItem('slotmoe chat c', JSON.stringify({id: 'c', system: '', changed: 1,"
        "forgotten: 8, messages: []}))"
    )
    page.open(page.origin)
    page.wait("now !== null")
    assert page.texts("#list button") == []
    page.evaluate("Storage.prototype.setItem = () => { throw new Error('full'); }")
    page.answer_with("An answer")
    page.say("A question", 2)
    assert "storage is full" in page.texts("#notice")[0]


def test_answer_goes_on_from_what_was_there_when_the_page_was_left(page):
    page.answer_with("Half", None)
    page.evaluate("at('prompt').focus()")
    page.type("A question")
    page.press("Enter", "\r")
    page.wait("chat.messages.length === 2")
    page.open(page.origin)
    page.wait("now !== null")
    assert page.evaluate("chat.messages.map(message => message.content)") == ["A question", "Half"]
    page.answer_with(None)
    page.press("r", modifiers=1)
    page.wait("!!stopper")
    page.open(page.origin)  # the answer that was to be replaced is still there
    page.wait("now !== null")
    assert page.evaluate("chat.messages.map(message => message.content)") == ["A question", "Half"]
    page.answer_with(None)
    page.type("Another")
    page.press("Enter", "\r")
    page.wait("!!stopper")
    page.open(page.origin)
    page.wait("now !== null")
    assert page.evaluate("chat.messages.length") == 2
    assert page.evaluate("at('prompt').value") == "Another"


# A full context, and errors


def test_full_context_loses_the_oldest_exchanges(page, served):
    page.settings(temperature=0, max_tokens=30)
    long = "Tell me of the king, of his wars, and of the peace that came after them. "
    forgotten = []
    for count in range(1, 10):
        page.say(f"{count}. {long * 3}", 2 * count)
        forgotten.append(page.evaluate("chat.forgotten"))
    assert 0 < forgotten[-1] < 18
    # Rarely, and then half of the context: whatever follows is read anew.
    assert all(after - before in (0, 4, 6, 8) for before, after in pairwise(forgotten)), forgotten
    assert page.evaluate("document.querySelectorAll('.divider').length") == 1
    assert (
        page.evaluate("document.querySelector('.divider').previousElementSibling.className")
        == "assistant"
    )
    assert page.evaluate("chat.messages.length") == 18
    assert page.complaints == []  # it was known before the server had to refuse
    # Also where the page could not know it: the server refuses, and the page goes on.
    page.evaluate("tokensPerSign = 0; chat.forgotten = 0")
    page.say("10. Go on.", 20)
    assert page.evaluate("chat.forgotten") > 0
    assert "no longer seen" in page.texts("#notice")[0]
    # The setting of an answer's length is room that is kept.
    assert "stopped by Most tokens" in page.texts(".assistant .note")[-1]


def test_failed_messages_leave_the_history_and_are_offered_again(page, served):
    page.settings(temperature=0, max_tokens=4)
    page.say("Hello", 2)
    long = "word " * 600
    page.say(long, 2)
    assert "the context holds 512 tokens" in page.texts("#notice")[0]
    assert page.is_seen("#notice")
    assert page.evaluate("at('prompt').value") == long
    assert len(page.texts(".said")) == 2
    page.evaluate("at('prompt').value = ''")
    page.say("Hello again", 4)  # not a dead end
    assert page.evaluate("at('notice').hidden")
    before = page.evaluate("chat.messages[3].content")
    page.evaluate("at('model').textContent; now.model = 'gone'")
    page.press("r", modifiers=1)
    page.wait("!at('notice').hidden && !stopper")
    assert "'gone' is not here" in page.texts("#notice")[0]
    assert page.evaluate("chat.messages[3].content") == before  # the answer before it stays
    page.settings(top_p=7)
    page.type("x")
    page.press("Enter", "\r")
    page.wait("!at('notice').hidden")
    assert page.texts("#notice span")[0].startswith("Top-p: ")
    assert page.evaluate("chat.messages.length") == 4


def test_an_answer_that_breaks_off_is_kept(page):
    page.answer_with("Half an ans", "wer")
    page.evaluate(
        "const whole = window.fetch; window.fetch = (...given) => given[0] === '/stats'"
        "? whole(...given) : whole(...given).then(async answer =>"
        'new Response((await answer.text()).split(\'data: {"choices": [{"delta": {},\')[0]))'
    )
    page.say("A question", 2)
    assert page.evaluate("chat.messages[1].content") == "Half an answer"
    assert "connection ended" in page.texts("#notice")[0]


def test_waiting_is_never_blank(page):
    page.answer_with(None)
    page.evaluate("at('prompt').focus()")
    page.type("x")
    page.press("Enter", "\r")
    page.wait("/^reading the prompt, [1-9]/.test(document.querySelector('.waiting')?.textContent)")
    page.press("Escape")
    page.wait("!stopper")


def test_figures_of_a_prompt_that_is_read(page):
    text = page.evaluate(
        "(() => { const before = now, said = []; for (const change of [{running: 1},"
        "{queued: 2, running: 1}, {answer_tokens: 20, running: 1}]) { now = {...before};"
        "for (const name in change) now[name] += change[name]; drawFigures(before, 2);"
        "said.push(at('state').textContent); } now = {...before, running: 1,"
        "prompt_tokens: before.prompt_tokens + 128}; tokensPerSign = 0.5;"
        "const messages = [{role: 'user', content: 'x'.repeat(1204)}];"
        "const asking = {...newChat(), messages};"
        "said.push(waitingText(asking, performance.now(), before)); now = before; return said; })()"
    )
    assert text[0].startswith("reading the prompt · ")
    assert text[1].endswith("2 waiting")
    assert text[2].startswith("10.0 tokens/s · ")
    assert text[3] == "reading the prompt: 128 of about 602 tokens, 0 s"


def test_figures_and_charts(page):
    page.settings(temperature=1, max_tokens=200)
    page.say("Tell me of the king.", 2)
    page.wait("/tokens.s|idle/.test(at('speed').textContent)")
    page.wait("/ of 2.0 GiB RAM/.test(at('memory').textContent)")
    page.wait("at('speed-chart').querySelector('path').getAttribute('d').length > 30")
    for name, text in (("speed", "at most"), ("hits", "%"), ("memory", "2.0 GiB")):
        assert text in page.evaluate(f"at('{name}-chart').getAttribute('aria-label')")
        assert page.evaluate(f"at('{name}-chart').querySelector('path').getBBox().width") > 0
    assert "2.0 GiB" in page.texts("#state")[0]
    assert page.evaluate("at('all-hits').textContent").endswith("%")
    assert "expert slots" in page.texts("#parts dt")


def test_server_that_has_ended(runtime):
    with Served(runtime) as served, Page(served.port) as page:
        page.start()
        served.server.should_exit = True
        served.thread.join(20)
        page.wait("at('state').textContent.startsWith('The server can')", 20)
        page.evaluate("at('prompt').focus()")
        page.type("x")
        page.press("Enter", "\r")
        page.wait("!at('notice').hidden")
        assert "can't be reached" in page.texts("#notice")[0]
        assert page.evaluate("at('prompt').value") == "x"


# Small screens, keys, contrast


@pytest.mark.parametrize(("width", "height"), [(360, 640), (320, 568)])
def test_small_screens(page, width, height):
    page.emulate(width, height)
    page.answer_with("A `long` answer " * 60 + "\n\n```\n" + "x" * 400 + "\n```\n\n" + "y" * 400)
    page.say("A question", 2)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("at('talk').scrollWidth <= at('talk').clientWidth")
    assert page.evaluate("at('talk').clientHeight / innerHeight") > 0.7
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    for selector in ("#send", "#again", "#fresh", "#chats-opens", "#side-opens", "#state"):
        assert page.is_seen(selector), selector
    small = page.evaluate(
        "[...document.querySelectorAll('button, input, summary')].filter(it => it.offsetParent"
        "&& Math.min(it.offsetWidth, it.offsetHeight) < 24).map(it => it.outerHTML)"
    )
    assert small == []
    for name in ("chats", "side"):
        page.evaluate(f"at('{name}-opens').focus()")
        page.press("Enter", "\r")
        page.wait(f"at('{name}').classList.contains('open')")
        assert page.evaluate(f"at('{name}-opens').getAttribute('aria-expanded')") == "true"
        assert page.evaluate("at('talk').inert")
        assert page.evaluate(f"at('{name}').clientHeight / innerHeight") > 0.8
        assert page.is_seen(f"#{name} h2")
        assert page.evaluate("document.activeElement.id") == name
        assert not page.is_seen("#send")
        assert page.evaluate(f"at('{name}').scrollWidth <= at('{name}').clientWidth")
        page.press("Escape")
        assert page.evaluate(f"!at('talk').inert && document.activeElement.id === '{name}-opens'")


def test_every_control_is_reached_by_tab(page):
    page.answer_with("```\ncode\n```\n\n[a](https://b.org)\n\n<think>x")
    page.say("A question", 2)
    expected = page.evaluate(
        "document.querySelectorAll('a, input, textarea, button:not(:disabled), pre, #talk').length"
        "- document.querySelectorAll('[hidden] button, .opens').length"
    )
    page.evaluate("document.activeElement.blur(); window.reached = new Set()")
    page.evaluate("document.addEventListener('focusin', event => reached.add(event.target))")
    for _ in range(expected + 4):
        page.press("Tab")
    assert page.evaluate("reached.size") == expected


CONTRASTS = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = colour => [0.2126, 0.7152, 0.0722].reduce((sum, weight, index) => {
    const value = rgba(colour)[index] / 255;
    return sum + weight * (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  }, 0);
  const contrast = (a, b) => {
    const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const behind = element => {
    const colour = getComputedStyle(element).backgroundColor;
    return rgba(colour)[3] === 255 ? colour : behind(element.parentElement);
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    if (!element.checkVisibility() || element.disabled) continue;
    const style = getComputedStyle(element);
    const hasText = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    const tell = ratio => low.push([element.outerHTML.slice(0, 80), ratio]);
    const text = contrast(style.color, behind(element));
    if ((hasText || element.matches("input, textarea")) && text < 4.5) tell(text);
    if (element.matches("input, textarea")) {
      const placeholder = getComputedStyle(element, "::placeholder").color;
      if (contrast(placeholder, behind(element)) < 4.5) tell("placeholder");
      const edge = contrast(style.borderTopColor, behind(element.parentElement));
      if (edge < 3) tell(edge);
    }
    if (element.matches("svg") && contrast(style.stroke, behind(element)) < 3) tell("chart");
    window.looked = (window.looked ?? 0) + hasText;
  }
  return low;
})()
"""


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_contrast(page, colours):
    page.emulate(1280, 800, colours)
    everything = "\n\n".join(["<think>Hm</think>", *MARKDOWN, "```\ncode\n```", "|a|\n|-|\n|b|"])
    page.answer_with(everything)
    page.say("A question", 2)
    page.evaluate(
        "document.querySelector('details').open = true; chat.forgotten = 2; drawDivider()"
    )
    for kind in ("", "error"):
        page.evaluate(f"notice('Something', '{kind}')")
        assert page.evaluate(CONTRASTS) == []
    assert page.evaluate("looked") > 50
    page.evaluate("document.documentElement.style.setProperty('--quiet', '#888')")
    assert page.evaluate(CONTRASTS) != []
