"""A headless Chromium, if this machine has one, spoken to in its own protocol over a pipe: no
driver, no download."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
)
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page.  ``requests`` are the addresses it asked for, ``complaints`` what its console and
    its scripts said."""

    def __enter__(self):
        self._profile = tempfile.TemporaryDirectory()
        ours, theirs = os.pipe(), os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4.
        command = f'exec "$@" 3</dev/fd/{ours[0]} 4>/dev/fd/{theirs[1]}'
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--remote-debugging-pipe",
        ]
        self._process = subprocess.Popen(
            [
                "sh",
                "-c",
                command,
                "sh",
                BROWSER,
                *options,
                f"--user-data-dir={self._profile.name}",
                "about:blank",
            ],
            pass_fds=(ours[0], theirs[1]),
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._to, self._from = ours[1], theirs[0]
        self._number, self._session, self._unread = 0, None, b""
        self.requests, self.complaints, self._loaded = [], [], False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def emulate(self, width, height, colours="light"):
        """A window of that many pixels, and the system's colours, light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": colours}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def __exit__(self, *_):
        os.close(self._to)  # Chromium ends with its pipe
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)
        shutil.rmtree(self._profile.name, ignore_errors=True)
        self._profile.cleanup()

    def open(self, path):
        """Load a file, or an address, and wait until it and a second are over, so that what loads
        late is seen too."""
        self._loaded = False
        self.call(
            "Page.navigate", url=path if "://" in str(path) else Path(path).absolute().as_uri()
        )
        while not self._loaded:
            self._next()
        time.sleep(1)
        self.evaluate("0")  # read what has come meanwhile

    def evaluate(self, expression):
        """The value of an expression, or of what its promise gives."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression, seconds=10):
        """Wait until ``expression`` is true; its value."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)
        return value

    def type(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key, text="", modifiers=0):
        """One key, with the text that it types; ``modifiers`` 1 is Alt, 8 is Shift."""
        code = {"Enter": 13, "Escape": 27, "Tab": 9}.get(key, ord(key[0].upper()))
        for kind in ("keyDown", "keyUp"):
            about = {
                "type": kind,
                "key": key,
                "windowsVirtualKeyCode": code,
                "modifiers": modifiers,
            }
            self.call(
                "Input.dispatchKeyEvent",
                **about,
                **({"text": text} if kind == "keyDown" and text else {}),
            )

    def click(self, selector):
        """Press and release the mouse in the middle of an element, which is scrolled to."""
        box = self.evaluate(
            f"(() => {{ const it = document.querySelector({json.dumps(selector)});"
            "it.scrollIntoView({block: 'nearest'}); const box = it.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        where = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **where)

    def screenshot(self):
        """The whole page, PNG."""
        return base64.b64decode(
            self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        )

    def call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "result" in answer, answer
        return answer["result"]

    def _next(self):
        while b"\0" not in self._unread:
            data = os.read(self._from, 1 << 20)
            assert data, "the browser has ended"
            self._unread += data
        line, self._unread = self._unread.split(b"\0", 1)
        message = json.loads(line)
        method, parameters = message.get("method"), message.get("params")
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Log.entryAdded":
            self.complaints.append(parameters["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(parameters["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif method == "Page.loadEventFired":
            self._loaded = True
        return message
