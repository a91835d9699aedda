"""What the programs' scripts share: where the server is, the questions, and a line for each case.

The scripts run in environments of their own, so only the standard library is imported here, and
pydantic where it is.  They are called with the server's URL, the model's name and folder, and a
Python that has slotmoe.
"""

import asyncio
import inspect
import os
import sys
import traceback
from contextlib import suppress
from typing import Literal

for _name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):  # clients want one; the server asks for none
    os.environ[_name] = "unused"
for _name in ("DO_NOT_TRACK", "OPENAI_AGENTS_DISABLE_TRACING"):
    os.environ[_name] = "1"

URL, MODEL, FOLDER, PYTHON = sys.argv[1:5]
SYSTEM, QUESTION = "Be brief.", "Tell me of the king."
CHAT = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
CITIES = ["Paris", "Rome"]
# A function whose arguments are short whatever the model says, in OpenAI's words.
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": CITIES}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "description": "The weather of a city.", "parameters": PARAMETERS}
LOOP = asyncio.new_event_loop()  # one: some clients keep connections in it
CASES = {}

with suppress(ImportError):
    from pydantic import BaseModel

    class City(BaseModel, extra="forbid"):
        """A city."""

        city: Literal["Paris", "Rome"]


def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    assert city in CITIES, city
    return f"It rains in {city}."


def result(value):
    return LOOP.run_until_complete(value) if inspect.iscoroutine(value) else value


def case(function):
    """Marks a case; its name is the table's."""
    CASES[function.__name__.replace("_", " ")] = lambda: result(function())


def both(**ways):
    """Marks a case that is done whole and then streamed, in each of the ``ways`` if there are any.
    What it returns must be the same, and not nothing."""

    def mark(function):
        def check(*way):
            whole, streamed = (result(function(*way, stream)) for stream in (False, True))
            assert whole == streamed and whole, (whole, streamed)

        name = function.__name__.replace("_", " ")
        for way, value in ways.items():
            CASES[f"{way}: {name} whole and streamed"] = lambda value=value: check(value)
        if not ways:
            CASES[f"{name} whole and streamed"] = check

    return mark


def main():
    """Run all cases; exit with 1 if one failed."""
    failed = False
    for name, check in CASES.items():
        try:
            check()
        except BaseException:
            failed = True
            traceback.print_exc(file=sys.stdout)
            print(f"not ok - {name}", flush=True)
        else:
            print(f"ok - {name}", flush=True)
    sys.exit(failed)
