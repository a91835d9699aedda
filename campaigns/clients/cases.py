"""What the programs' scripts share: where the server is, the questions, and a line for each case.

The scripts run in environments of their own, so only the standard library is imported here.  They
are called with the server's URL, the model's name and folder, and a Python that has slotmoe.
"""

import os
import sys
import traceback
from functools import partial

for _name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):  # clients want one; the server asks for none
    os.environ[_name] = "unused"
os.environ["DO_NOT_TRACK"] = "1"

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
CASES = {}


def weather(city: str) -> str:
    """The weather of a city."""
    assert city in CITIES, city
    return f"It rains in {city}."


def case(function):
    """Marks a case; its name is the table's."""
    CASES[function.__name__.replace("_", " ")] = function


def both(**ways):
    """Marks a case that is done whole and then streamed, in each of the ``ways`` if there are any.
    What it returns must be the same, and not nothing."""

    def mark(function):
        def check(*way):
            whole, streamed = (function(*way, stream) for stream in (False, True))
            assert whole == streamed and whole, (whole, streamed)

        name = function.__name__.replace("_", " ")
        for way, value in ways.items():
            CASES[f"{way}: {name} whole and streamed"] = partial(check, value)
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
