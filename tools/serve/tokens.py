"""``/tokenize``: the tokens of a text or a conversation, in vLLM's form."""

import asyncio

from fastapi import APIRouter, Response
from starlette.responses import JSONResponse

from slotmoe.tools.serve import requests
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.service import Serving

router = APIRouter()


class TokenizeRequest(requests.Model):
    """Of ``prompt``, or of ``messages`` as the model reads them."""

    model: requests.Label | None = None
    prompt: requests.Text | None = None
    add_special_tokens: bool | None = None
    messages: requests.Messages | None = None
    tools: requests.Tools | None = None


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: Serving) -> Response:
    if body.model is not None:
        service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RefusedError("give either prompt or messages", "prompt")
    if body.messages is not None:
        policy = requests.tool_policy([tool.function for tool in body.tools or ()], None)
        ids = await service.chat_ids(requests.Conversation(body.messages, policy))
    else:
        add_bos = body.add_special_tokens is not False
        ids = await asyncio.to_thread(service.encode, body.prompt or "", add_bos)
    about = {"count": len(ids), "max_model_len": service.runtime.context}
    return JSONResponse({**about, "tokens": ids})
