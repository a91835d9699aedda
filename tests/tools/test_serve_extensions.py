"""``slotmoe serve``: the fields and routes of vLLM and llama.cpp beyond OpenAI's API."""

import pytest

from tests.support.served import GREEDY, USER

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def test_a_rule_leaves_calls_possible(served):
    tool = {"type": "function", "function": {"name": "f"}}
    options = {"tools": [tool], "structured_outputs": {"choice": ["yes", "no"]}, "max_tokens": 60}
    assert served.choice(**options)["message"]["content"] in ("yes", "no", None)
    called = served.choice(**options, tool_choice="required")["message"]
    assert called["tool_calls"][0]["function"]["name"] == "f"


def test_a_stop_token_ends_an_answer(served, runtime):
    ids = [token.id for token in runtime.generate("Call me", 30)]
    at = next(n for n in range(3, 30) if ids[n] not in ids[:n])
    before = runtime.tokenizer.decode(ids[:at])
    for more in ({}, {"ignore_eos": True}):
        stopped = served.complete("Call me", max_tokens=30, stop_token_ids=[ids[at]], **more)
        choice = stopped["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (before, "stop")
    longer = served.complete("Call me", max_tokens=30, stop_token_ids=[ids[at]], min_tokens=at + 1)
    assert longer["usage"]["completion_tokens"] > at


@pytest.mark.parametrize("route", [CHAT, TEXT])
def test_log_probabilities_of_the_prompt(served, runtime, route):
    prompt = {"messages": USER} if route == CHAT else {"prompt": "Call me Ishmael."}
    body = {**GREEDY, **prompt, "max_tokens": 1, "prompt_logprobs": 2}
    status, answer = served.post(route, **body, logprobs=True if route == CHAT else 0)
    choice = answer["choices"][0]
    rows = (answer if route == CHAT else choice)["prompt_logprobs"]
    assert status == 200 and rows[0] is None and len(rows) == answer["usage"]["prompt_tokens"]
    for row in rows[1:]:
        best = [one for one in row.values() if one["rank"] in (1, 2)]
        own = next(iter(row.values()))
        assert len(row) in (2, 3) and len(best) == 2
        assert (
            own["rank"] in (1, 2, None) and own["logprob"] <= best[-1]["logprob"]
        ) or own in best
        for id_, one in row.items():
            spelled = runtime.tokenizer.token_bytes(int(id_)).decode(errors="ignore")
            assert spelled in (one["decoded_token"], "")
    if route == CHAT:
        assert choice["logprobs"]["content"][0]["top_logprobs"] == []
    else:
        echoed = served.complete("Call me Ishmael.", max_tokens=0, echo=True, logprobs=0)
        told = echoed["choices"][0]["logprobs"]["token_logprobs"][1:]
        assert [next(iter(row.values()))["logprob"] for row in rows[1:]] == pytest.approx(told)
        assert len(choice["logprobs"]["top_logprobs"][0]) == 1
        assert served.complete("Call me", max_tokens=0, prompt_logprobs=0)
    status, answer = served.post(route, **body, stream=True)
    assert status == 400 and answer["error"]["param"] == "prompt_logprobs"


BEGUN = [*USER, {"role": "assistant", "content": "The king is"}]
CONTINUED = {"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": False}


def test_an_answer_goes_on_with_the_last_message(served):
    text = served.choice(**CONTINUED)["message"]["content"]
    prompt = served.post("/apply-template", **CONTINUED)[1]["prompt"]
    assert prompt.endswith("The king is")
    assert text == served.text(prompt, max_tokens=8)
    for wrong, problem in (
        ({"add_generation_prompt": True}, "not both"),
        ({"messages": USER}, "the last message is no text of the assistant"),
    ):
        status, answer, _ = served.chat(**{**CONTINUED, **wrong})
        assert status == 400 and problem in answer["error"]["message"]


def test_templates_are_applied_and_get_variables(served, runtime, monkeypatch):
    whole = served.post("/apply-template", messages=BEGUN)[1]["prompt"]
    bare = served.post("/apply-template", messages=BEGUN, add_generation_prompt=False)[1]["prompt"]
    assert whole.startswith(bare) and whole != bare
    source = "{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(runtime.tokenizer, "template", source)
    extra = {"messages": USER, "chat_template_kwargs": {"mood": "Sad: "}}
    text = "Sad: Tell me of the king."
    assert served.post("/apply-template", **extra)[1] == {"prompt": text}
    assert served.choice(**extra)["message"]["content"] == served.text(text, max_tokens=8)
    assert served.post("/tokenize", **extra)[1]["tokens"] == runtime.tokenizer.encode(text)
    status, answer, _ = served.chat(chat_template_kwargs={"messages": []})
    assert status == 400 and "chat_template_kwargs: messages" in answer["error"]["message"]


def test_ids_become_text_again(served, runtime):
    text = "Call me \U0001f600"
    ids = served.post("/tokenize", prompt=text)[1]["tokens"]
    spelled = served.post("/tokenize", prompt="Call me", return_token_strs=True)[1]["token_strs"]
    bos = runtime.tokenizer.decode(ids[:1], special=True)
    assert "".join(spelled) == bos + "Call\u0120me"
    assert bos and served.post("/detokenize", tokens=ids[1:])[1] == {
        "prompt": text,
        "content": text,
    }
    assert served.post("/detokenize", tokens=ids)[1]["content"] == bos + text
    assert served.post("/detokenize", tokens=[], model="sample")[1]["prompt"] == ""
    for wrong in ({"tokens": [runtime.tokenizer.size]}, {"tokens": [-1]}, {}):
        status, answer = served.post("/detokenize", **wrong)
        assert status == 400 and answer["error"]["param"] == "tokens"
