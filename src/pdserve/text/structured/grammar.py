"""A constraint as llguidance reads it.

JSON is written with little white space at a time: a small model that may add as much as it likes is
apt to add nothing else. A schema can say otherwise under ``x-guidance``, as llguidance has it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from pdserve.core.errors import RequestError
from pdserve.core.request import Constraint, ConstraintKind

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

JSON_WHITE_SPACE = r"[ \t]?|\n[ \t]{0,32}"
"""Between two tokens of JSON: nothing, a space, or a new line and its indentation."""


def grammar_of(constraint: Constraint) -> str:
    """The grammar. Raises `RequestError` if the text cannot be read at all.

    That it can be read does not mean that it compiles.
    """
    text = constraint.text
    try:
        match constraint.kind:
            case ConstraintKind.JSON:
                defaults: JsonCompileOptions = {"whitespace_pattern": JSON_WHITE_SPACE}
                grammar = LLMatcher.grammar_from_json_schema(text, defaults=defaults)
            case ConstraintKind.REGEX:
                grammar = LLMatcher.grammar_from_regex(text)
            case ConstraintKind.CHOICE:
                grammar = LLMatcher.grammar_from_lark(_one_of(json.loads(text)))
            case ConstraintKind.GRAMMAR:
                grammar = LLMatcher.grammar_from_lark(any_to_lark(text))
    except Exception as error:  # the library's readers raise many kinds
        raise RequestError(str(error)) from None
    return grammar


def lark_text(text: str) -> str:
    """A literal of Lark for this text."""
    return json.dumps(text, ensure_ascii=False)


def _one_of(texts: list[str]) -> str:
    return "start: " + " | ".join(map(lark_text, texts))
