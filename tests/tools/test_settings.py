"""What a command offers, and a user's own defaults in ``slotmoe.toml``."""

import json
import re

import pytest


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Write the user's file; its path."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / "slotmoe" / "slotmoe.toml"
    path.parent.mkdir()

    def write(text):
        path.write_text(text)
        return path

    return write


def shown(text):
    return re.findall(r"(?m)^  .*?(--[a-z-]+)", text.partition("Examples:")[2].partition("\n\n")[2])


def test_help_shows_what_is_used_often_and_help_all_the_rest(slotmoe):
    some, rest = (shown(slotmoe("run", name)[1]) for name in ("--help", "--help-all"))
    assert {"--ram", "--max-new-tokens"} <= set(some) < set(rest)
    assert {"--slots", "--misses", "--session-limit"} <= set(rest) - set(some)
    assert len(some) < 20


def test_no_command_offers_what_does_not_act_there(small_export, slotmoe):
    for line in (["bench", "--draft"], ["eval", "--draft"], ["run", "--route-budget"]):
        code, _, err = slotmoe(line[0], small_export, *line[1:])
        assert code == 2 and f"No such option '{line[1]}'" in err


def test_defaults_of_a_user(small_export, settings, slotmoe):
    """Those of all commands, those of one, and what is typed, each before the one before."""
    settings('context = 64\nseed = 5\nram = "3GiB"\n[run]\nseed = 6\nmax-new-tokens = 2\n')
    run = ["run", small_export, "x", "--json", "--temperature", 2]
    report = json.loads(slotmoe(*run)[1])
    assert (report["context"], len(report["ids"])) == (64, 2)
    assert report["memory"]["budget"] == 3 << 30
    assert report["ids"] == json.loads(slotmoe(*run, "--seed", 6)[1])["ids"]
    assert json.loads(slotmoe(*run, "--context", 32)[1])["context"] == 32
    for command, seed in (("run", 6), ("chat", 5)):
        text = " ".join(slotmoe(command, "--help")[1].split())
        assert f"[default: {seed}, by slotmoe.toml]" in text
    assert slotmoe("list")[0] == 0  # which has none of these options


REFUSED = {
    "contxt = 3": "contxt is unknown; did you mean context?",
    "[chta]\nseed = 1": "[chta] is unknown; did you mean chat?",
    "[run]\nmax_new_tokens = 1": "[run] max_new_tokens is unknown; did you mean max-new-tokens?",
    "context = 'x'": "context for run: 'x' is not a valid integer",
    "no-prefetch = 1": "no-prefetch for run: is 1, expected true or false",
    "seed = [1]": "seed for run: is [1], expected text or a number",
    "ram = 'lots'": "ram for run: 'lots' is not a size",
    "context =": "is no TOML",
    "context = " + "[" * 50_000: "is no TOML",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_wrong_in_the_file_is_one_line(text, settings, slotmoe):
    path = settings(text)
    code, out, err = slotmoe("run", "sample", "x")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"slotmoe: {path}: ") and REFUSED[text] in err
