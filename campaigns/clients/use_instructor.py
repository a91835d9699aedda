"""Instructor: objects of a class, by tools and by schemas, whole and as they come."""

import instructor
import openai
from cases import MODEL, QUESTION, URL, City, both, case

MESSAGES = [{"role": "user", "content": QUESTION}]
ASKED = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "response_model": City}
MODES = ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA")


def client(mode):
    return instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1"), mode=instructor.Mode[mode])


@both(**{mode.lower().replace("_", " "): client(mode) for mode in MODES})
def objects(client, stream):
    if not stream:
        return client.create(**ASKED, max_tokens=200, max_retries=0).city
    *_, last = client.create_partial(**ASKED, max_tokens=200, max_retries=0)
    return last.city


@case
def iterable():
    for found in client("TOOLS").create_iterable(**ASKED, max_tokens=2000):
        assert isinstance(found, City)
