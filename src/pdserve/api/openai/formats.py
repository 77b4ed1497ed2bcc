"""The fields by which a client asks for an answer of a given form, and the constraint they mean.

OpenAI's ``response_format``, vLLM's ``structured_outputs``, and the ``guided_`` fields that vLLM
had before that. One request can have one of them.
"""

from __future__ import annotations

import contextlib
import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from pdserve.api.constraint_check import MAX_CHARS
from pdserve.api.openai.body_model import Body, Items
from pdserve.api.openai.closed_schema import closed
from pdserve.core.errors import RequestError
from pdserve.core.request import Constraint, ConstraintKind

Schema = dict[str, Any] | bool
Choices = Annotated[Items[str], Field(min_length=1)]


class JsonSchemaFormat(Body):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, populate_by_name=True)

    name: str = ""
    json_schema: Schema = Field(
        alias="schema", description="What the answer's JSON must look like."
    )


class ResponseFormat(Body):
    """OpenAI's: ``json_object`` is any JSON object, ``json_schema`` one that fits the schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body):
    """vLLM's: exactly one of ``json``, ``json_object``, ``regex``, ``choice`` and ``grammar``."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, populate_by_name=True)

    json_schema: Schema | str | None = Field(None, alias="json", description="A JSON schema.")
    json_object: bool = False
    regex: str | None = Field(None, description="Matches the whole answer; Rust's syntax.")
    choice: Choices | None = Field(None, description="The answer is one of these.")
    grammar: str | None = Field(None, description="A grammar in Lark's syntax or in GBNF.")
    disable_any_whitespace: bool = Field(False, description="JSON without white space.")
    whitespace_pattern: str | None = Field(
        None, description="A regular expression for the white space in JSON."
    )
    disable_additional_properties: bool = Field(
        False, description="So it is anyway, where a schema lists properties and says no other."
    )
    structural_tag: Any = None


class FormatFields(Body):
    """What both endpoints take."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = Field(None, description="As structured_outputs.json.")
    guided_regex: str | None = Field(None, description="As structured_outputs.regex.")
    guided_choice: Choices | None = Field(None, description="As structured_outputs.choice.")
    guided_grammar: str | None = Field(None, description="As structured_outputs.grammar.")

    def asked_form(self) -> tuple[Constraint, str] | None:
        """What the answer is to be held to, and the field that says so; None for free text.

        Raises `RequestError`.
        """
        forms = [
            (constraint, field)
            for field, constraint in (
                ("response_format", _of_response_format(self.response_format)),
                ("structured_outputs", _of_structured_outputs(self.structured_outputs)),
                ("guided_json", _json(self.guided_json, "guided_json")),
                ("guided_regex", _text(ConstraintKind.REGEX, self.guided_regex)),
                ("guided_choice", _choice(self.guided_choice)),
                ("guided_grammar", _text(ConstraintKind.GRAMMAR, self.guided_grammar)),
            )
            if constraint is not None
        ]
        if len(forms) > 1:
            names = " and ".join(field for _, field in forms)
            raise RequestError(f"{names} exclude each other: send one of them", forms[-1][1])
        return forms[0] if forms else None


def _of_response_format(asked: ResponseFormat | None) -> Constraint | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return _any_object()
    if asked.json_schema is None:
        raise RequestError(
            "response_format: the type json_schema needs json_schema with name and schema",
            "response_format",
        )
    return _json(asked.json_schema.json_schema, "response_format")


def _of_structured_outputs(asked: StructuredOutputs | None) -> Constraint | None:
    if asked is None:
        return None
    field = "structured_outputs"
    if asked.structural_tag:
        raise RequestError(
            f"{field}.structural_tag is not served: send json, json_object, regex, choice or "
            "grammar",
            field,
        )
    kinds = [
        constraint
        for constraint in (
            _json(_spaced(asked), field),
            _any_object() if asked.json_object else None,
            _text(ConstraintKind.REGEX, asked.regex),
            _choice(asked.choice),
            _text(ConstraintKind.GRAMMAR, asked.grammar),
        )
        if constraint is not None
    ]
    if len(kinds) != 1:
        raise RequestError(
            f"{field} needs exactly one of json, json_object, regex, choice and grammar", field
        )
    return kinds[0]


def _spaced(asked: StructuredOutputs) -> Schema | str | None:
    """The schema, with what is said of white space in it."""
    schema = asked.json_schema
    options: dict[str, Any] = {}
    if asked.disable_any_whitespace:
        options["whitespace_flexible"] = False
    if asked.whitespace_pattern is not None:
        options["whitespace_pattern"] = asked.whitespace_pattern
    if schema is None or not options:
        return schema
    schema = _parsed(schema, "structured_outputs")
    if not isinstance(schema, dict):
        return schema
    return {**schema, "x-guidance": options}


def _any_object() -> Constraint:
    return Constraint(ConstraintKind.JSON, '{"type":"object"}')


def _json(schema: Schema | str | None, field: str) -> Constraint | None:
    if schema is None:
        return None
    parsed = _parsed(schema, field)
    text = _compact(parsed)
    if isinstance(parsed, dict) and len(text) <= MAX_CHARS:
        # What is no schema is told to be none when it is tried.
        with contextlib.suppress(TypeError, AttributeError, RecursionError):
            text = _compact(closed(parsed))
    return Constraint(ConstraintKind.JSON, text)


def _compact(schema: Schema) -> str:
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def _parsed(schema: Schema | str, field: str) -> Schema:
    if not isinstance(schema, str):
        return schema
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{field}: the schema is not JSON: {error}", field) from None
    if not isinstance(parsed, dict | bool):
        raise RequestError(f"{field}: a JSON schema is an object", field)
    return parsed


def _choice(choices: list[str] | None) -> Constraint | None:
    if choices is None:
        return None
    return Constraint(ConstraintKind.CHOICE, json.dumps(choices, ensure_ascii=False))


def _text(kind: ConstraintKind, text: str | None) -> Constraint | None:
    return None if text is None else Constraint(kind, text)
