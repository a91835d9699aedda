"""Instructor: objects of a class, by tools and by schemas, whole and as they come."""

from typing import Literal

import instructor
import openai
from cases import MODEL, QUESTION, URL, case, main
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": QUESTION}]
ASKED = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 200}


class City(BaseModel, extra="forbid"):
    city: Literal["Paris", "Rome"]


def client(mode):
    return instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1"), mode=mode)


def both_ways(mode):
    whole = client(mode).create(**ASKED, response_model=City, max_retries=0)
    *_, last = client(mode).create_partial(**ASKED, response_model=City, max_retries=0)
    assert isinstance(whole, City) and last.city == whole.city


@case
def tools_whole_and_streamed():
    both_ways(instructor.Mode.TOOLS)


@case
def strict_tools_whole_and_streamed():
    both_ways(instructor.Mode.TOOLS_STRICT)


@case
def schema_whole_and_streamed():
    both_ways(instructor.Mode.JSON_SCHEMA)


@case
def iterable():
    asked = {**ASKED, "max_tokens": 2000, "response_model": City}
    for found in client(instructor.Mode.TOOLS).create_iterable(**asked):
        assert isinstance(found, City)


main()
