"""What ``/openapi.json`` says of answers.

``answers.json`` has the shape of each: an object's names, of which one with ``?`` may be missing or
null, an array of some shapes, ``=`` and the words that a text may be, a type, or a shape's name.
"""

import json
from pathlib import Path

from fastapi import FastAPI

from slotmoe.jsonfile import Json
from slotmoe.tools.serve.errors import ANTHROPIC_PATH, OLLAMA_PATH

_ERRORS = {ANTHROPIC_PATH: "AnthropicError", OLLAMA_PATH: "OllamaError", "": "Error"}


class Application(FastAPI):
    def openapi(self) -> Json:
        if self.openapi_schema is not None:
            return self.openapi_schema
        known = json.loads((Path(__file__).parent / "answers.json").read_text(encoding="utf-8"))
        described: Json = super().openapi()  # which keeps it
        shapes = {name: _schema(shape) for name, shape in known["shapes"].items()}
        described["components"]["schemas"] |= shapes
        for path, methods in described["paths"].items():
            error = next(name for begin, name in _ERRORS.items() if path.startswith(begin))
            for method, route in methods.items():
                names = {"200": known["routes"].get(f"{method} {path}"), "4XX": error, "5XX": error}
                for status, name in names.items():
                    if name is not None:
                        content = route["responses"][status].setdefault("content", {})
                        content["application/json"] = {"schema": _schema(name)}
        return described


def _schema(shape: object) -> Json:
    if isinstance(shape, str):
        if shape.startswith("="):
            return {"enum": shape[1:].split("|")}
        return {"$ref": f"#/components/schemas/{shape}"} if shape[0].isupper() else {"type": shape}
    if isinstance(shape, list):
        return {"type": "array", "items": {"anyOf": [_schema(item) for item in shape]}}
    assert isinstance(shape, dict)
    schema: Json = {"type": "object", "required": [n for n in shape if not n.endswith("?")]}
    properties = {name.rstrip("?"): _schema(value) for name, value in shape.items()}
    for name in properties.keys() - schema["required"]:
        properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
    return {**schema, "properties": properties}
