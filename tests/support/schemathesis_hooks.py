"""What ``tests/test_serve_conformance.py`` has schemathesis check in place of
``positive_data_acceptance``."""

import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

ONLY_THE_SERVER_CAN_TELL = (
    b"the context holds",  # how many tokens a text has
    b"echo with logprobs would give",
    b"messages: ",  # which result belongs to which call
    b"a message of the",
    b"neither content nor tool_calls",
    b"tool_choice",  # whether it names one of the tools
    b"with tools",
    b"is there twice",
    b"the schema",  # a schema within the request
)


@schemathesis.check
def accepted_if_it_fits(ctx, response, case):
    """Valid requests are accepted, but for reasons that no schema can say."""
    if response.status_code != 400 or not any(
        reason in response.content for reason in ONLY_THE_SERVER_CAN_TELL
    ):
        positive_data_acceptance(ctx, response, case)
