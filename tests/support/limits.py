"""Each field that a client can set, at its limits: read off the models of the requests, so that a
new field is among them."""

import json

from slotmoe.tools.serve.guard import MAX_KEYS, MAX_VALUES


def routes(*routers):
    """The path of each route that takes a body, and the model of that."""
    for router in routers:
        for route in router.routes:
            if getattr(route, "body_field", None) is not None:
                yield route.path, route.body_field.field_info.annotation


class Limits:
    """Values of at most ``most`` bytes for each field of models.  What models share comes once."""

    def __init__(self, most):
        self._most, self._done, self._defs = most, set(), {}

    def of(self, model):
        """Each field, by its way and what is at its limit, and the part of a body that has it."""
        schema = model.model_json_schema()
        self._defs = schema.get("$defs", {})
        yield from self._fields(schema)

    def _fields(self, schema):
        for name, field in schema.get("properties", {}).items():
            for way, value in self._values(field):
                yield f"{name}{way}", {name: value}

    def _values(self, schema):
        if "$ref" in schema:
            inner = self._defs[schema["$ref"].rpartition("/")[2]]
            if (key := json.dumps(inner)) not in self._done:
                self._done.add(key)
                whole = self._least(inner)
                for way, part in self._fields(inner):
                    yield f".{way}", {**whole, **part}
            return
        for kind in schema.get("anyOf", schema.get("oneOf", ())):
            yield from self._values(kind)
        if not {"enum", "const", "anyOf", "oneOf"} & schema.keys():
            yield from self._plain(schema)

    def _plain(self, schema):
        match schema.get("type", "any"):
            case "string":
                most = 128 if "pattern" in schema else self._most
                size = min(schema.get("maxLength", most), most)
                yield ":longest", "x" * size
                if "pattern" not in schema:
                    yield ":marks", '"\\\n' * (size // 6)
                    yield ":bytes", "\U0001f600" * (size // 12)
            case "integer" | "number":
                names = "minimum", "maximum", "exclusiveMaximum"
                bounds = [schema[name] - (len(name) > 7) for name in names if name in schema]
                is_whole = schema["type"] == "integer"
                yield from ((f":{bound}", bound) for bound in bounds)
                yield ":huge", 10**630 if is_whole else 1e308
            case "array":
                item, most = schema.get("items", {}), schema.get("maxItems", MAX_VALUES)
                whole = self._least(item)
                fits = self._most // (len(json.dumps(whole)) + 1)
                yield ":most", [whole] * min(most, fits, MAX_VALUES - 100)
                for way, value in self._values(item):
                    size = len(json.dumps(value)) + 1
                    yield f"[]{way}", [value] * max(1, min(most, self._most // size, 64))
            case "object":
                of = schema.get("additionalProperties")
                of = of if isinstance(of, dict) else {}
                value, most = self._least(of), schema.get("maxProperties", MAX_KEYS)
                most = min(most, MAX_KEYS - 99, self._most // 16)
                yield ":widest", {str(n): value for n in range(most)}
                yield from ((f"{{}}{way}", {"1": v}) for way, v in self._values(of) if of)
                yield from free(self._most)
            case "any":
                yield from free(self._most)

    def _least(self, schema):
        """The smallest value."""
        if "$ref" in schema:
            return self._least(self._defs[schema["$ref"].rpartition("/")[2]])
        for kind in schema.get("anyOf", schema.get("oneOf", ())):
            return self._least(kind)
        if "const" in schema or "enum" in schema:
            return schema.get("const", schema.get("enum", [None])[0])
        match schema.get("type"):
            case "string":
                return "x"
            case "integer" | "number":
                return schema.get("minimum", 0)
            case "array":
                return [self._least(schema["items"])] * schema.get("minItems", 0)
            case "object":
                needed = schema.get("required", ())
                return {name: self._least(schema["properties"][name]) for name in needed}
        return None


def nested(depth, wrap, inner):
    for _ in range(depth):
        inner = wrap(inner)
    return inner


def _schema(**words):
    return {"type": "object", "properties": {"a": words}, "required": ["a"]}


def free(most):
    """Objects with any keys, which may be a schema."""
    names = {f"k{n}": {} for n in range(min(most, 60_000) // 14)}
    yield ":deepest", nested(min(most, 1800) // 6, lambda inner: {"a": [inner]}, 0)
    yield ":long key", {"x" * most: 1}
    yield ":many", {"type": "object", "properties": names}
    yield ":all of many", {"type": "object", "properties": names, "required": [*names]}
    yield ":deep", nested(40, lambda inner: _schema(**inner), {"type": "string"})
    yield ":texts", _schema(enum=[f"{n:09d}" for n in range(min(most, 60_000) // 14)])
    yield ":others", _schema(anyOf=[{"const": n} for n in range(min(most, 60_000) // 20)])
    yield ":pattern", _schema(type="string", pattern="(a?){200}" + "a" * 200)
    yield ":length", _schema(type="string", minLength=50_000, maxLength=60_000)
    yield ":items", _schema(type="array", items={"type": "integer"}, minItems=9000)
    yield ":number", _schema(type="integer", minimum=-(10**15), maximum=10**15)
    yield ":multiples", _schema(type="integer", multipleOf=1048578)
