"""The files of docs/many-machines.md, with two replicas of the sample on this machine.

A session's requests go to one replica.  That is killed in the middle of an answer, and the session
goes on at the other, which takes from the shared folder what was computed of it.  Programs come
from the package index, into the folder of --environments, where one is given.
"""

import http.client
import json
import os
import re
import shutil
import signal
import site
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from campaigns.clients import OPTIONS, install_python
from campaigns.runner import Attack
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.sessions.blocks import BLOCK_TOKENS
from tests.support.tiny import SAMPLE

ROOT = Path(__file__).parents[1]
FILES = ROOT / "docs" / "many-machines"
PACKAGES = {"litellm": ["litellm[proxy]==1.108.7"], "ray": ["ray[serve]==2.60.0"]}
SECONDS = 300  # for a program to be ready
BROKEN = (OSError, http.client.HTTPException)
TEXT = "The people of the United States have a government of laws and not of men. " * 8
USER = {"role": "user", "content": TEXT}
QUIET = {"DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
QUIET["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
KEYS = {"LITELLM_MASTER_KEY": "sk-of-clients", "SLOTMOE_API_KEY": "sk-of-servers"}


class Front:
    """What clients call: ``model`` at ``url``.  ``stats`` gives what the replicas of sessions have
    counted.  What is in front of several also gets a ``kill``, of the one that is answering."""

    def __init__(self, url, model, key):
        self.url, self.model = url, model
        self._headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}

    def open(self, path, session, body=None):
        headers = self._headers | {"x-session-id": session}
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers))

    def ask(self, session, messages, tokens=4, stream=False):
        asked = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": tokens}
        asked |= {"stream": stream, "logit_bias": {"1": -100}}  # never the end
        return self.open("/v1/chat/completions", session, asked)

    def cached(self, session, messages):
        """Tokens of the prompt, and how many of them were not computed."""
        with self.ask(session, messages) as response:
            usage = json.load(response)["usage"]
        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]

    def text(self, session, then=None):
        """A long answer, as far as it comes; ``then`` is called in the middle."""
        text = ""
        with self.ask(session, [USER], 2400, stream=True) as response, suppress(*BROKEN):
            for line in map(bytes.decode, response):
                if line.startswith("data: {") and "choices" in (data := json.loads(line[6:])):
                    text += data["choices"][0]["delta"].get("content") or ""
                if then is not None and len(text) > 400:
                    then()
                    then = None
        return text

    def stats(self, sessions):
        for session in sessions:
            with self.open("/stats", session) as response:
                yield json.load(response)


def until(happens, what):
    end = time.monotonic() + SECONDS
    while not (found := happens()):
        assert time.monotonic() < end, f"{what} takes longer than {SECONDS} s"
        time.sleep(0.5)
    return found


def is_there(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@contextmanager
def process(command, **options):
    with subprocess.Popen([*map(str, command)], text=True, start_new_session=True, **options) as it:
        try:
            yield it
        finally:
            with suppress(ProcessLookupError):
                os.killpg(it.pid, signal.SIGTERM)


@contextmanager
def litellm(place, programs, environment):
    """Two servers behind LiteLLM."""
    serve = [sys.executable, "-m", "slotmoe", "serve", place / "export", "--port", "0"]
    serve += ["--session-dir", place / "sessions", "--ram", "1GiB", "--no-log"]
    serve += ["--served-model-name", "lite"]
    with ExitStack() as stack:
        servers, config = {}, (FILES / "litellm.yaml").read_text()
        for box in ("box-1", "box-2"):
            options = {"stderr": subprocess.PIPE, "env": environment}
            server = stack.enter_context(process(serve, **options))
            url = re.search(r"http://[\d.:]+", server.stderr.readline())[0]
            servers[Front(url, "lite", KEYS["SLOTMOE_API_KEY"])] = server
            config = config.replace(f"http://{box}:8000", url)
        (place / "litellm.yaml").write_text(config)

        def stats(sessions):
            alive = (server for server, it in servers.items() if it.poll() is None)
            return (one for server in alive for one in Front.stats(server, [""]))

        def kill():
            running = [one["running"] for one in stats(())]
            server = list(servers.values())[running.index(1)]
            server.kill()
            server.wait()

        command = [programs / "litellm", "--config", place / "litellm.yaml", "--port", "4123"]
        output = stack.enter_context(open(place / "litellm.log", "w"))
        streams = {"stdout": output, "stderr": output}
        with process([*command, "--host", "127.0.0.1"], env=environment, **streams):
            front = Front("http://127.0.0.1:4123", "lite", KEYS["LITELLM_MASTER_KEY"])
            front.stats, front.kill = stats, kill
            until(lambda: is_there(f"{front.url}/health/liveliness"), "LiteLLM's start")
            yield front


@contextmanager
def ray(place, programs, environment):
    """Two replicas of a deployment."""
    paths = [str(FILES), str(ROOT), *site.getsitepackages()]
    command = [programs / "python", ROOT / "campaigns" / "on_ray.py", place]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    pipes["env"] = {**environment, "PYTHONPATH": os.pathsep.join(paths), "RAY_TMPDIR": str(place)}
    pipes["stderr"] = open(place / "ray.log", "w")
    with pipes["stderr"], process(command, **pipes) as driver:

        def tell(word):
            print(word, file=driver.stdin, flush=True)
            for line in driver.stdout:
                if line.startswith("done "):
                    return int(line[5:])
            raise AssertionError(f"{word}: {(place / 'ray.log').read_text()[-2000:]}")

        front = Front("http://127.0.0.1:4124", "slotmoe", KEYS["SLOTMOE_API_KEY"])
        front.kill, front.tell = (lambda: tell("kill")), tell
        tell("two")
        yield front
        tell("end")


# What must hold


def sticks(front):
    """What a session's second request needs is in its replica's memory, not on the disk; and there
    are sessions on each replica."""
    sessions = [f"session-number-{number}" for number in range(10)]

    def restored():
        return [one["sessions"]["restored_tokens"] for one in front.stats(sessions)]

    for number, session in enumerate(sessions):  # of lengths whose sums are never the same
        messages = [{**USER, "content": f"{session}: {TEXT}{'and ' * 2**number}"}]
        front.cached(session, messages)
        before = restored()
        length, cached = front.cached(session, messages)
        if cached < length - 1 or restored() != before:
            yield f"{session} has changed its replica; {cached} of {length} tokens were there"
    counted = [*front.stats(sessions)]
    if len({one["prompt_tokens"] for one in counted} - {0}) < 2:
        yield "all sessions are at one replica"
    if len({one["sessions"]["bits"] for one in counted}) > 1:
        yield "the replicas do not use each other's latents"


def goes_on(front):
    """The session of a replica that is killed: its blocks are on the disk."""
    text = front.text("session-that-goes-on", front.kill)
    messages = [USER, {"role": "assistant", "content": text.strip()}, {**USER, "content": "And?"}]

    def asked():
        with suppress(urllib.error.HTTPError):
            return front.cached("session-that-goes-on", messages)
        return None

    length, cached = until(asked, "the next request")
    if cached < 3 * BLOCK_TOKENS:
        yield f"{cached} of {length} tokens were there, with {len(text)} characters of an answer"


def heals(front):
    """There is a new replica for the one that was killed."""
    until(lambda: front.tell("count") == 2, "a new replica")
    return ()


def grows_and_drains(front):
    """By the length of the queue; and running answers are not cut off."""
    if front.tell("auto") != 1:
        yield "more than one replica without a request"
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(front.text, f"session-{number}") for number in range(12)]
        until(lambda: front.tell("count") == 2, "the second replica")
        lengths = {len(answer.result()) for answer in answers}
        if len(lengths) > 1:
            yield f"answers of {lengths} characters"
        ending = []
        text = front.text("session-0", lambda: ending.append(pool.submit(front.tell, "end")))
        if {len(text)} != lengths:
            yield f"an answer was cut off after {len(text)} characters"
        ending[0].result()


@contextmanager
def prepare(folder, given):
    """The sample with a longer context, for answers that last seconds."""
    config = json.loads((SAMPLE / "config.json").read_text())
    shutil.copytree(SAMPLE, folder / "source")
    text = json.dumps(config | {"max_position_embeddings": 4096})
    (folder / "source" / "config.json").write_text(text)
    quantize(folder / "source", folder / "export")
    yield folder, (given.environments or folder / "environments").resolve()


PARTS = {"litellm": (litellm, sticks, goes_on)}
PARTS["ray"] = ray, sticks, goes_on, heals, grows_and_drains


def run(place, name, aim):
    folder, environments = place
    environments.mkdir(parents=True, exist_ok=True)
    programs = install_python(environments / f"machines-{name}", PACKAGES[name])
    (begin, *checks), wrong, done = PARTS[name], [], []
    with begin(folder, programs, {**os.environ, **QUIET, **KEYS}) as front:
        for check in checks:
            wrong += [f"{check.__name__}: {problem}" for problem in check(front)]
            done.append(check.__name__)
    return {"done": done, "wrong": wrong}


ATTACK = Attack(run, PARTS, prepare=prepare, options=OPTIONS)
