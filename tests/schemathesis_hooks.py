"""What ``tests/test_serve_conformance.py`` has schemathesis check in place of ``positive_data_acceptance``."""

import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance


@schemathesis.check
def accepted_if_it_fits(ctx, response, case):
    """Valid requests are accepted.  How many tokens a text has is nothing that a schema can say, so only the server can refuse it."""
    if response.status_code != 400 or b"the context holds" not in response.content:
        positive_data_acceptance(ctx, response, case)
