"""``/tokenize``: the tokens of a text or a conversation, in vLLM's form."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.responses import JSONResponse

from slotmoe.tools.serve import requests
from slotmoe.tools.serve.answers import chat_prompt, check_length
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.service import Service

router = APIRouter()


class TokenizeRequest(requests.Model):
    """Of ``prompt``, or of ``messages`` as the model reads them."""

    model: requests.Label | None = None
    prompt: requests.Text | None = None
    add_special_tokens: bool | None = None
    messages: requests.Messages | None = None
    tools: Annotated[list[requests.FunctionTool], Field(max_length=requests.MAX_TOOLS)] | None = (
        None
    )

    def ids(self, service: Service) -> list[int]:
        """Raises ``RefusedError`` and ``ConfigError``."""
        if self.messages is not None:
            conversation = requests.ChatRequest.model_construct
            return chat_prompt(service, conversation(messages=self.messages, tools=self.tools))
        text = self.prompt or ""
        check_length(service, len(text))
        return service.tokenizer.encode(text, self.add_special_tokens is not False)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    service: Service = request.app.state.service
    if body.model is not None:
        service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RefusedError("give either prompt or messages", "prompt")
    ids = await asyncio.to_thread(body.ids, service)
    about = {"count": len(ids), "max_model_len": service.runtime.context}
    return JSONResponse({**about, "tokens": ids})
