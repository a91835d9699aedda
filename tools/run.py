"""``slotmoe run``: a prompt in, its continuation out."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slotmoe.jsonfile import Json
from slotmoe.model.chat import render_chat
from slotmoe.model.reasoning import Splitter
from slotmoe.signals import Stopping
from slotmoe.sizes import format_size
from slotmoe.tools import options
from slotmoe.tools.screen import is_terminal, json_of, print_dimmed

if TYPE_CHECKING:
    from slotmoe.offload.sessions.names import NamedSession

_MOST_ECHOED = 1000  # characters of a prompt, the last ones, before its continuation


@click.command(name="run", cls=options.Command)
@options.MODEL
@options.PROMPT
@options.option("--file", "FILE", "Take the prompt from a UTF-8 file.", type=options.EXISTING)
@options.SYSTEM
@options.generation_options
@options.session_options
@options.runtime_options
@options.VERBOSE
@options.JSON
def command(
    model: str, prompt: str | None, file: Path | None, verbose: bool, as_json: bool, **given: Any
) -> None:
    """Continue PROMPT with MODEL and stream the text to stdout; statistics go to stderr.

    MODEL is the path of an export, a Hugging Face checkpoint folder or a GGUF file; else a name
    that slotmoe list shows, or a part that no other has; else a hub id like
    deepseek-ai/DeepSeek-V2-Lite. What is no export is quantized once into a cache folder
    ($SLOTMOE_CACHE, default ~/.cache/slotmoe). PROMPT '-' reads the prompt from stdin. On a
    terminal a continuation begins with its prompt, dimmed.

    With --session the text, or with --chat the conversation, is kept on disk: the next PROMPT goes
    on where it ended, and nothing of it is computed again. See docs/sessions.md.

    \b
    Examples:
      slotmoe run sample "It is a truth universally acknowledged, that" --temperature 0.7
      slotmoe run lite --chat --temperature 0.7 --seed 1 "Write a haiku about disks."
      slotmoe run v2-chat --ram 16GiB --context 8192 - < prompt.txt
      slotmoe run v2-chat --ram 16GiB --file prompt.txt --json
      slotmoe run v2-chat --ram 16GiB --session novel --file chapter-1.txt
    """
    given["chat"] |= given["system"] is not None
    text = options.prompt_text(prompt, file)
    with (
        options.open_session(given, "chat" if given["chat"] else "text") as session,
        options.open_runtime(model, given, quiet=as_json) as runtime,
    ):
        runtime.warm(wait=False)
        options.go_on(session, runtime, given["session_limit"], options.notifier(as_json))
        if given["trace"] is not None:
            runtime.trace(given["trace"])
        continuation = Continuation(runtime, text, session, given, as_json)
        continuation.run()
        report = continuation.report()
    if not as_json:
        print(flush=True)
        lines = [summary(report)] if verbose else []
        print(*lines, continuation.line(report), sep="\n", file=sys.stderr)
    continuation.stopping.check()
    if as_json:
        print(json_of(report))


class Continuation:
    """The ``tokens`` so far, printed as they come, unless ``quiet``, by the options that are
    ``given``.  What is generated goes on with ``session``, and is kept in it."""

    def __init__(
        self, runtime: Any, prompt: str, session: "NamedSession | None", given: Json, quiet: bool
    ):
        self._runtime, self._prompt, self._quiet = runtime, prompt, quiet
        self._arguments, self.tokens = options.generation_arguments(given), list[Any]()
        self._first_seconds: float | None = None
        self._thoughts, self._texts = list[str](), list[str]()  # of the answer
        self._session, self._chat = session, self._arguments.pop("chat")
        self._saved = None if session is None else session.saved
        earlier, system = [] if self._saved is None else self._saved.messages, given["system"]
        if self._chat:
            if system is not None:
                rest = earlier[1:] if earlier and earlier[0]["role"] == "system" else earlier
                earlier = [_message("system", system), *rest]
            self._messages = [*earlier, _message("user", prompt)]
        else:
            before = earlier[0]["content"] if earlier else ""
            self._messages = [_message("text", before + prompt)]

    def run(self) -> None:
        """Generate until it ends, or a signal ends it."""
        from slotmoe.tools.tables import wait_reading  # rich

        on_terminal, started = not self._quiet and is_terminal(sys.stdout), time.perf_counter()
        ids, tokenizer = self._ids(), self._runtime.tokenizer
        splitter = tokenizer.splitter(ids) if self._chat else Splitter(None, False)
        stream = self._runtime.generate(ids, **self._arguments)
        with Stopping(lambda _: stream.close()) as self.stopping:
            try:
                if not self._quiet:
                    wait_reading(stream)
                for token in stream:
                    if not self.tokens:
                        self._first_seconds = time.perf_counter() - started
                        if on_terminal and not self._chat:
                            is_long = len(self._prompt) > _MOST_ECHOED
                            print_dimmed("…" * is_long + self._prompt[-_MOST_ECHOED:])
                    self.tokens.append(token)
                    self._show(on_terminal, *splitter.feed(token.text))
                self._show(on_terminal, *splitter.feed("", is_last=True))
            finally:
                stream.close()
                self._keep(ids)

    def _ids(self) -> list[int]:
        """The prompt's tokens, behind those of the session; another model has other tokens."""
        tokenizer, saved, ids = self._runtime.tokenizer, self._saved, list[int]()
        self._runtime.check_length(sum(len(message["content"]) for message in self._messages))
        if self._chat:
            ids += tokenizer.encode(render_chat(tokenizer, self._messages))
        elif saved is not None and saved.root == self._runtime.sessions.root():
            ids += [*saved.tokens, *tokenizer.encode(self._prompt, add_bos=False)]
        else:
            ids += tokenizer.encode(self._messages[0]["content"])
        return ids

    def _keep(self, ids: list[int]) -> None:
        """Keep the text, if some of it is new; what was computed is kept by the engine."""
        if self._session is None or not self.tokens:
            return
        from slotmoe.offload.sessions.names import Saved

        text, kind = "".join(self._texts), "chat" if self._chat else "text"
        messages = [*self._messages, _message("assistant", text.strip())]
        if not self._chat:
            messages = [_message("text", self._messages[0]["content"] + text)]
        tokens = [*ids, *(token.id for token in self.tokens)]
        self._session.save(Saved(self._runtime.sessions.root(), tokens, kind, messages))

    def _show(self, on_terminal: bool, thought: str, text: str) -> None:
        """Print what has come: reasoning dimmed, or on stderr where stdout is no terminal."""
        if thought and not self._quiet:
            if on_terminal:
                print_dimmed(thought)
            else:
                print(thought, end="", flush=True, file=sys.stderr)
        if text and not self._quiet:
            if self._thoughts and not self._texts:
                print("\n", file=sys.stdout if on_terminal else sys.stderr)
            print(text, end="", flush=True)
        self._thoughts += [thought] if thought else []
        self._texts += [text] if text else []

    def report(self) -> Json:
        """One JSON-able object.  ``finish_reason`` is ``stop`` (the model ended the text),
        ``length`` (so many tokens were asked for), ``context`` (it is full) or ``interrupted``."""
        stats = self._runtime.stats()
        limit = self.tokens[-1].finish if self.tokens else None
        return {
            "text": "".join(self._texts),
            **({"reasoning": "".join(self._thoughts)} if self._thoughts else {}),
            "ids": [token.id for token in self.tokens],
            "logprobs": [token.logprob for token in self.tokens],
            "finish_reason": "interrupted" if self.stopping.number else limit or "stop",
            "first_token_seconds": self._first_seconds,
            "context": self._runtime.context,
            **speeds(stats),
            **stats,
        }

    def line(self, report: Json) -> str:
        """``37 tokens · 12.4 tokens/s · first token 0.8 s · 4.1 of 5.0 GiB``, and why it ended."""
        count = len(self.tokens)
        tokens = f"{count} token{'s' * (count != 1)}"
        ends = {
            "length": f"stopped at {tokens} (-n)",
            "context": f"stopped at {tokens}: the context of {report['context']} is full",
        }
        facts = [ends.get(report["finish_reason"], tokens)]
        if (speed := report["decode_tokens_per_second"]) is not None:
            facts.append(f"{speed:.1f} tokens/s")
        if self._first_seconds is not None:
            facts.append(f"first token {self._first_seconds:.1f} s")
        return " · ".join([*facts, of_budget(report["memory"])])


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def of_budget(memory: Json) -> str:
    """Peak and budget of the device's memory, as in ``4.1 of 5.0 GiB``."""
    peak = format_size(memory["peak_vram" if memory["tier"] == "vram" else "peak_rss"])
    budget = format_size(memory["budget"])
    return f"{peak.removesuffix(budget[budget.index(' ') :])} of {budget}"


def speeds(stats: Json) -> dict[str, float | None]:
    tokens, speeds = stats["tokens"], dict[str, float | None]()
    for kind in ("prefill", "decode"):
        count = tokens[f"{kind}_tokens"]
        speeds[f"{kind}_tokens_per_second"] = count / tokens[f"{kind}_seconds"] if count else None
    return speeds


def drafted(drafts: Json) -> list[str]:
    """What ``Runtime.stats`` says of drafts, where there were any."""
    if not drafts.get("drafted"):
        return []
    rows = f"{drafts['rows'] / drafts['passes']:.1f} rows a pass"
    return [f"{drafts['accepted']} of {drafts['drafted']} drafted tokens accepted, {rows}"]


def by_drive(drives: list[Json]) -> str:
    """What was read from each drive, and how fast."""
    texts = []
    for drive in drives:
        rate = drive["bytes"] / drive["seconds"] / 1e9 if drive["seconds"] else 0.0
        failed = ", then failed" * drive["failed"]
        texts.append(f"{drive['folder']} {format_size(drive['bytes'])} at {rate:.2f} GB/s{failed}")
    return "; ".join(texts)


def summary(stats: Json) -> str:
    """All for a person about what ``Runtime.stats`` gives."""
    facts = [f"on {stats['device']['name']}, {stats['device']['why']}"]
    for kind, speed in zip(("prefill", "decode"), speeds(stats).values(), strict=True):
        if speed is not None:
            count, seconds = stats["tokens"][f"{kind}_tokens"], stats["tokens"][f"{kind}_seconds"]
            facts.append(f"{kind} {count} tokens in {seconds:.2f} s ({speed:.1f} tokens/s)")
    if "sessions" in stats:
        facts.append(f"{stats['sessions']['restored_tokens']} tokens from disk")
    facts += drafted(stats["drafts"])
    cache, disk, memory = stats["cache"], stats["io"]["disk"], stats["memory"]
    if cache["hit_rate"] is not None:
        read = f"{format_size(disk['bytes'])} read from disk"
        if cache["misses"] and "prefetch" in stats:
            ahead = cache["already_coming"] / cache["misses"]
            read += f", {ahead:.0%} of the missing ones ahead of the gate"
        if len(disk["drives"]) > 1:
            read += f" ({by_drive(disk['drives'])})"
        facts.append(f"experts {cache['hit_rate']:.1%} hits in {cache['slots']} slots, {read}")
    used = f"{memory['tier']} peak {of_budget(memory)}"
    if "beside_vram" in memory:
        beside = format_size(memory["beside_vram"])
        used += f" and {beside} of the CUDA context and other programs"
    return f"[{'; '.join([*facts, used])}]"
