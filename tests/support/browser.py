"""A headless Chromium, if this machine has one, spoken to in its own protocol over a pipe: no
driver, no download."""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

NAMES = "chromium-headless-shell chromium chromium-browser google-chrome chrome"
BROWSER = next(filter(None, map(shutil.which, NAMES.split())), None)
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking"
    " --no-first-run --remote-debugging-pipe"
)
# Chromium reads commands from descriptor 3 and answers on 4.
START = 'exec "$@" 3</dev/fd/{} 4>/dev/fd/{}'
DEADLINE = 60  # seconds, for anything that is waited for; it says that a test has failed, no more


class Browser:
    """The process.  Its tabs share nothing."""

    def __enter__(self):
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs, self._to = os.pipe()
        self._from, answers = os.pipe()
        command = ["sh", "-c", START.format(theirs, answers), "sh", BROWSER, *OPTIONS.split()]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={self._profile.name}", "about:blank"],
            pass_fds=(theirs, answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(answers)
        self._number, self._unread, self.tabs = 0, b"", {}
        return self

    def __exit__(self, *_):
        os.close(self._to)  # Chromium ends with its pipe
        try:
            self._process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)
        self._profile.cleanup()

    def call(self, method, session=None, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self.next()).get("id") != self._number:
            pass
        assert "result" in answer, answer
        return answer["result"]

    def next(self):
        """The next message of the browser's; a tab hears what is about it."""
        while b"\0" not in self._unread:
            assert select.select([self._from], [], [], DEADLINE)[0], "the browser says nothing"
            data = os.read(self._from, 1 << 20)
            assert data, "the browser has ended"
            self._unread += data
        line, self._unread = self._unread.split(b"\0", 1)
        message = json.loads(line)
        if tab := self.tabs.get(message.get("sessionId")):
            tab.hear(message.get("method"), message.get("params"))
        return message


class Tab:
    """One page, with a storage of its own.  ``requests`` are the addresses that it asked for,
    ``complaints`` what its console and its scripts said, ``files`` the downloads that are done."""

    def __init__(self, browser):
        self._browser = browser

    def __enter__(self):
        browser, self._loaded = self._browser, None
        self.requests, self.complaints, self.files = [], [], []
        self.context = browser.call("Target.createBrowserContext")
        target = browser.call("Target.createTarget", url="about:blank", **self.context)
        session = browser.call("Target.attachToTarget", **target, flatten=True)["sessionId"]
        browser.tabs[session] = self
        self.call = partial(browser.call, session=session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)
        return self

    def __exit__(self, *_):
        self._browser.call("Target.disposeBrowserContext", **self.context)
        self._browser.tabs.clear()

    def emulate(self, width, height):
        """A window of that many pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def open(self, path):
        """Load a file, or an address, with all that it names."""
        address = path if "://" in str(path) else Path(path).absolute().as_uri()
        loader = self.call("Page.navigate", url=address)["loaderId"]
        while self._loaded != loader:
            self._browser.next()

    def evaluate(self, expression):
        """The value of an expression, or of what its promise gives."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression):
        """Wait until ``expression`` is true; its value."""
        end = time.monotonic() + DEADLINE
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.01)
        return value

    def wait_for_file(self):
        """Wait until a download is done."""
        while not self.files:
            self._browser.next()

    def type(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key, text="", modifiers=0):
        """One key, with the text that it types; ``modifiers`` 1 is Alt, 8 is Shift."""
        code = {"Enter": 13, "Escape": 27, "Tab": 9}.get(key, ord(key[0].upper()))
        about = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def click(self, selector):
        """Press and release the mouse in the middle of an element, which is scrolled to."""
        x, y = self.evaluate(
            f"(() => {{ const it = document.querySelector({json.dumps(selector)});"
            "it.scrollIntoView({block: 'nearest'}); const box = it.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        where = {"x": x, "y": y, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **where)

    def hear(self, method, about):
        if method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif method == "Log.entryAdded":
            self.complaints.append(about["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(about["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(about["exceptionDetails"]))
        elif method == "Browser.downloadProgress" and about["state"] == "completed":
            self.files.append(about["guid"])
        elif method == "Page.lifecycleEvent" and about["name"] == "load":
            self._loaded = about["loaderId"]
