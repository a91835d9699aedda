"""``slotmoe serve``: a model behind OpenAI's, Anthropic's and Ollama's APIs, and a page to chat."""

import asyncio
import gc
import ipaddress
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import click

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import Json
from slotmoe.offload.model_cache import SAMPLE, locate, short_name
from slotmoe.signals import Stopping, leave, leave_after
from slotmoe.sizes import parse_size
from slotmoe.system import allow_open_files
from slotmoe.tools import options
from slotmoe.tools.options import flag, open_runtime, option

if TYPE_CHECKING:
    import uvicorn

    from slotmoe.offload.runtime import Runtime
    from slotmoe.tools.serve.service import Service

_GRACE_SECONDS = 3  # for answers to be delivered once the server has to end
_LAST_SECONDS = 2  # more, in which threads and sessions end
_FAILED_SECONDS = 1  # for errors to be delivered once the model has failed
_MAX_DIGITS = 640  # of an integer; Python allows no lower bound
_SPARE_CONNECTIONS = 256  # besides those of answers: idle ones, and requests without an answer

_NAMES_HELP = (
    "The model's name for clients; more may be given, answers have the first. '*' is any. "
    "[default: the folder's, or the hub id]"
)
# Forms of what may be given, and words for them.
_HOST = r"[a-zA-Z0-9_.-]+(:[0-9]+)?"
_HOST_FORM = "name of a host; expected NAME or NAME:PORT, without a scheme or a path"
_ORIGIN = r"\*|[a-zA-Z][a-zA-Z0-9+.-]*://[!-.0-~]+"
_ORIGIN_FORM = "origin; expected SCHEME://HOST, with :PORT where there is one, and no path"
# Of ``slotmoe launch``: a first prompt may have 29,000 tokens, and a history has pictures.
_LAUNCHED = {"port": 0, "context": 65536, "max_sequences": 2, "max_body": "32MiB", "no_log": True}
_GIVE_KEY = "give --api-key, --api-key-file or $SLOTMOE_API_KEY"
_READY = "a page to chat; the API is under /v1; Ctrl-C ends it"
_SEQUENCES, _QUEUE = click.IntRange(1, 256), click.IntRange(0, 10_000)
_HOST_HELP = "Address to listen on; others than loopback need a key."
_HOSTS_HELP = "A name by which clients may call, at any port; may be repeated."
_CORS_HELP = (
    "Let web pages of this origin use the API, like http://localhost:3000; may be repeated. '*' is "
    "any page, and needs a key."
)
_SESSIONS_HELP = (
    "Keep what was computed of finished conversations in this folder, also for a next start; this "
    "user can read them there."
)
_KEYS_HELP = "Ask for this key; may be repeated. Seen by others in ps."


@click.command(name="serve", cls=options.Command)
@options.MODEL
@option("--host", None, _HOST_HELP, default="127.0.0.1")
@option("--port", None, "Port; 0 takes a free one.", type=click.IntRange(0, 65535), default=8000)
@option("--api-key api_keys", "KEY", _KEYS_HELP, multiple=True)
@option("--api-key-file", "FILE", "Keys, one a line. [or: $SLOTMOE_API_KEY]")
@option("--allow-host hosts", "NAME", _HOSTS_HELP, multiple=True)
@option("--cors-origin origins", "ORIGIN", _CORS_HELP, multiple=True)
@option("--max-sequences", None, "Answers that decode together.", type=_SEQUENCES, default=4)
@option("--max-queue", None, "Answers that may wait; then 429.", type=_QUEUE, default=32)
@option("--max-body", "SIZE", "Largest request body.", default="4MiB")
@option("--served-model-name names", "NAME", _NAMES_HELP, multiple=True)
@option("--session-dir", "DIR", _SESSIONS_HELP)
@options.SESSION_LIMIT
@options.sampling_options
@flag("--no-log", "Write no line about each request.")
@options.runtime_options
def command(model: str, **given: Any) -> int:
    """Serve MODEL over HTTP: /v1/chat/completions, /v1/responses, /v1/completions, /v1/models
    (OpenAI), /v1/messages (Anthropic), /api/chat, /api/generate (Ollama), /tokenize, /health,
    /metrics (Prometheus), and at / a page to chat with it.

    Answers decode together, so an expert that is read for one serves all. Each has a latent cache
    of --context positions; all --max-sequences of them count against --ram. With --session-dir a
    conversation that goes on after a restart is not computed again (docs/sessions.md).

    \b
    Examples:
      slotmoe serve sample
      curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
           -d '{"model": "sample", "prompt": "Call me", "temperature": 0}'
      slotmoe serve lite --ram 8GiB --context 8192 --max-sequences 8
      slotmoe serve lite --session-dir sessions --session-limit 20GiB
      SLOTMOE_API_KEY=secret slotmoe serve lite --host 0.0.0.0 --allow-host box.local
    """
    return _serve(model, **given)


def _serve(
    model: str,
    host: str,
    port: int,
    names: tuple[str, ...],
    start: "Callable[..., subprocess.Popen[bytes]] | None" = None,
    **given: Any,
) -> int:
    """The exit code, of the client that ``start`` starts if there is one: it ends the server."""
    options.require_extra("serve")
    sequences, queue = given["max_sequences"], given["max_queue"]
    keys = _keys(given["api_keys"], given["api_key_file"])
    hosts = (host, *_checked("--allow-host", given["hosts"], _HOST, _HOST_FORM))
    origins = _checked("--cors-origin", given["origins"], _ORIGIN, _ORIGIN_FORM)
    if "*" in origins and not keys:
        advice = f"{_GIVE_KEY}, or name the origin"
        raise ConfigError(f"--cors-origin '*': any page could use this server; {advice}")
    allow_open_files(sequences + queue + 2 * _SPARE_CONNECTIONS)
    folder, limit = given["session_dir"], parse_size(given["session_limit"])
    rows = max(sequences, 16)  # of logits: one of each answer, or of a prompt's scored tokens
    with (
        _listen(host, port, bool(keys)) as listener,
        open_runtime(model, given, logits_rows=rows, sequences=sequences) as runtime,
    ):
        runtime.warm(wait=False)
        if folder is not None:
            runtime.keep_in(folder, limit, options.say)
        names = names if {*names} - {"*"} else (_name(model), *names)
        sampling = {name: given[name] for name in options.OWN}
        edge = keys, hosts, parse_size(given["max_body"]), not given["no_log"], origins, sampling
        server, service = make_server(runtime, names, sequences, queue, *edge)
        address, port = listener.getsockname()[:2]
        url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
        options.say(f"{service.name} is ready at {url}, {_READY}")
        client: subprocess.Popen[bytes] | None = None

        def stop(number: int) -> None:
            if start is not None and number == signal.SIGINT:
                return  # its client gets the same signal, and may go on
            if client is not None:  # now, for the end may not wait for its server's
                client.terminate()
            leave_after(_GRACE_SECONDS + _LAST_SECONDS, number)
            service.stop()
            server.should_exit = True

        with Stopping(stop, once=start is None) as stopping:
            if start is not None:
                client = start(url=url, model=service.name, context=runtime.context)
                Thread(target=_end_behind, args=(client, server), daemon=True).start()
            server.run(sockets=[listener])
        problem = service.engine.problem
    if client is not None:
        return _ended(client)
    if stopping.number:
        leave(stopping.number)  # all is closed, and Python's own end takes longer
    if problem is not None:
        options.say(f"the model failed, so the server ended: {problem!r:.400}")
    return int(problem is not None)


def _ended(client: "subprocess.Popen[bytes]") -> int:
    """The exit code of a client that has ended, or must now."""
    client.terminate()
    with suppress(subprocess.TimeoutExpired):
        client.wait(_FAILED_SECONDS)
    client.kill()
    return client.wait() if client.wait() >= 0 else 128 - client.wait()


def _end_behind(client: "subprocess.Popen[bytes]", server: "uvicorn.Server") -> None:
    client.wait()
    server.should_exit = True


@click.command(
    name="launch",
    cls=options.Command,
    params=[
        click.Argument(["client"], type=click.Choice(["claude", "codex"])),
        *command.params,
        click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED),
    ],
    context_settings={"default_map": _LAUNCHED},
)
def launch(client: str, model: str, arguments: tuple[str, ...], **given: Any) -> int:
    """Serve MODEL on this machine to CLIENT, Claude Code (claude) or Codex (codex), and start it
    with ARGUMENTS. When it ends, the server ends; the exit code is the client's.

    \b
    Examples:
      slotmoe launch claude v2-chat --ram 16GiB
      slotmoe launch codex v2-chat --ram 16GiB --session-dir sessions -- exec "Fix the test."
    """
    told = json.loads((Path(__file__).parent / "clients.json").read_text(encoding="utf-8"))[client]
    if (program := shutil.which(client)) is None:
        raise ConfigError(f"{client} is not installed here: npm install -g {told['package']}")
    key = (given["api_keys"] or (secrets.token_urlsafe(),))[0]

    def start(**about: object) -> "subprocess.Popen[bytes]":
        added = {name: text.format(key=key, **about) for name, text in told["variables"].items()}
        pairs = [f"{name}={text.format(**about)}" for name, text in told["settings"].items()]
        settings = [word for pair in pairs for word in ("-c", pair)]
        return subprocess.Popen([program, *settings, *arguments], env={**os.environ, **added})

    return _serve(model, **given | {"api_keys": (key,), "start": start})


def _name(model: str) -> str:
    """What clients call it: the folder's or the export's name, or the hub id."""
    path = locate(model)
    if path is None or path == SAMPLE:
        return model
    return path.resolve().name if Path(model).exists() else short_name(path)


def make_server(
    runtime: "Runtime",
    names: Sequence[str],
    sequences: int,
    queue: int,
    keys: Iterable[str] = (),
    hosts: Iterable[str] = (),
    max_body: int = 4 << 20,
    is_logged: bool = False,
    origins: Iterable[str] = (),
    sampling: Json | None = None,
) -> tuple["uvicorn.Server", "Service"]:
    """A uvicorn server, to ``run`` on a socket, and its ``Service``; ``max_body`` is in bytes.
    If it ``is_logged``, each request is a line on stderr.  Settings of ``sampling`` go before the
    model's own."""
    import uvicorn

    from slotmoe.tools.serve.app import make_app
    from slotmoe.tools.serve.guard import Guard, Log
    from slotmoe.tools.serve.service import Service

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """``command`` has taken them."""
            with bounded():
                yield
            # Nobody waits for what threads still compute, so the loop's end must not either.
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))

    def ended() -> None:
        settings.timeout_graceful_shutdown = _FAILED_SECONDS
        server.should_exit = True

    own = runtime.sampling.with_given(**sampling or {})
    service = Service(runtime, names, sequences, queue, own, ended)
    app = make_app(service, bool(keys))
    guarded = Guard(app, keys, hosts, max_body, origins)
    how: Json = {"http": "h11", "ws": "none", "lifespan": "off", "log_level": "warning"}
    how |= dict.fromkeys(("access_log", "use_colors", "server_header", "proxy_headers"), False)
    settings = uvicorn.Config(
        Log(guarded, is_logged),
        limit_concurrency=sequences + queue + _SPARE_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        **how,
    )
    server = Server(settings)
    return server, service


@contextmanager
def bounded() -> Iterator[None]:
    """Objects of a large request would make Python look through all of torch's for garbage.
    Without those it can look often; before, it waits for a quarter as many again.  And to read a
    number takes time that grows with the square of its digits."""
    usual, digits = gc.get_threshold(), sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(_MAX_DIGITS)
    gc.freeze()
    gc.collect()
    gc.set_threshold(*usual[:2], 1)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()
        sys.set_int_max_str_digits(digits)


def _keys(given: tuple[str, ...], file: str | None) -> tuple[str, ...]:
    """All API keys: of the options, the file and the environment.  Raises ``ConfigError``."""
    keys = [*given]
    if file is not None:
        lines = options.decoded(Path(file).read_bytes(), f"{file}:").splitlines()
        keys += [line.strip() for line in lines if line.strip()]
        if len(keys) == len(given):
            raise ConfigError(f"{file}: holds no API key, expected one a line")
    keys += filter(None, [os.environ.get("SLOTMOE_API_KEY")])
    if not all(key and key.isascii() and key.isprintable() and " " not in key for key in keys):
        problem = "is empty or holds characters that no HTTP header can"
        raise ConfigError(f"an API key {problem}; use letters, digits and signs")
    return tuple(dict.fromkeys(keys))


def _checked(option: str, given: tuple[str, ...], form: str, what: str) -> tuple[str, ...]:
    """What is ``given`` for an option.  Raises ``ConfigError`` for what has not this ``form``."""
    for text in given:
        if not re.fullmatch(form, text):
            raise ConfigError(f"{option} {text!r:.80}: is no {what}")
    return given


def _listen(host: str, port: int, has_keys: bool) -> socket.socket:
    """A socket that listens there, before anything large is loaded.  Raises ``ConfigError``, also
    where others could connect and nothing asks for a key."""
    try:
        kind = 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE
        family, _, _, _, address = socket.getaddrinfo(host, port, *kind)[0]
        if not has_keys and not ipaddress.ip_address(address[0]).is_loopback:
            raise ConfigError(f"--host {host}: others could use this server; {_GIVE_KEY}")
        if exclusive := getattr(socket, "SO_EXCLUSIVEADDRUSE", 0):
            listener = socket.socket(family)
            listener.setsockopt(socket.SOL_SOCKET, exclusive, 1)  # Windows lets others share it
            listener.bind(address[:2])
            listener.listen()
        else:
            listener = socket.create_server(address[:2], family=family)
        # Its connections have it too.  Else a body waits until its headers are acknowledged.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as problem:
        reason = f"can't listen there ({problem.strerror}); give another --host or --port"
        raise ConfigError(f"{host}:{port}: {reason}") from None
