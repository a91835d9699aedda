"""A few clients for a minute; a hundred for half an hour by ``python -m tests.faults.clients``."""

import json

import pytest

from tests.faults import clients


@pytest.mark.slow
def test_some_clients(sample_export):
    found = clients.attacked(sample_export, 12, 60)
    print(json.dumps(found))
    assert found["wrong"] == [] and found["requests"] > 200


def test_a_wrong_answer_is_noticed(served):
    """An answer, a stream and a missing one, whose wanted text has another first letter."""
    body = {**clients.GREEDY, "prompt": "Call me", "max_tokens": 3, "n": 2}
    right = served.complete("Call me", max_tokens=clients.LENGTH)["choices"][0]["text"]
    for wanted, problems in ((right, 0), (f"~{right[1:]}", 4)):
        found = clients.Clients(served.port, {"Call me": wanted})
        assert found.answer(None, body) == found.stream(None, body) == 200
        assert len(found.wrong) == problems, found.wrong
    found.check({**body, "n": 3}, [f"~{right[1:]}"] * 2)
    assert "2 answers" in found.wrong[-1]
