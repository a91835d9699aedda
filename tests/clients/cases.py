"""What the clients' scripts share: where the server is, the questions, and a line for each case.

The scripts run in environments of their own, so only the standard library is imported here.  They
are called with the server's URL, the model's name and folder, and a Python that has slotmoe.
"""

import asyncio
import inspect
import os
import sys
import traceback
from contextlib import contextmanager

for _name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):  # clients want one; the server asks for none
    os.environ[_name] = "unused"
for _name in ("DO_NOT_TRACK", "OPENAI_AGENTS_DISABLE_TRACING"):
    os.environ[_name] = "1"

URL, MODEL, FOLDER, PYTHON = sys.argv[1:5]
SYSTEM, QUESTION = "Be brief.", "Tell me of the king."
CITIES = ["Paris", "Rome"]
# A function whose arguments are short whatever the model says, in OpenAI's words.
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": CITIES}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "description": "The weather of a city.", "parameters": PARAMETERS}
_cases = []


def weather(city):
    """The weather of a city."""
    assert city in CITIES, city
    return f"It rains in {city}."


@contextmanager
def refused(kind, word):
    """Expects an exception of that kind whose text has ``word``."""
    try:
        yield
    except kind as problem:
        if word not in str(problem):
            raise
    else:
        raise AssertionError("it was accepted")


def case(function):
    """Marks a case; its name is the table's."""
    _cases.append(function)
    return function


def main():
    """Run all cases; exit with 1 if one failed."""
    failed, loop = False, asyncio.new_event_loop()  # one: some clients keep connections in it
    for function in _cases:
        name = function.__name__.replace("_", " ")
        try:
            result = function()
            if inspect.iscoroutine(result):
                loop.run_until_complete(result)
        except BaseException:
            failed = True
            traceback.print_exc(file=sys.stdout)
            print(f"not ok - {name}", flush=True)
        else:
            print(f"ok - {name}", flush=True)
    sys.exit(failed)
