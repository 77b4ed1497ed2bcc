"""Grammars in which calls of tools are held to the tools' schemas.

`forced_calls`: nothing can be written but calls. `free_calls`: text, or calls, or both; what looks
like the beginning of a call to the reader (``stream``) goes on as one.

The calls are written as the model has learned to write them, with JSON spaced as chat templates
space it. The arguments fit the tool's schema; of a schema that is not ``strict``, keywords that
cannot be enforced are passed over. Arguments that a schema does not name are left out unless it
allows them in so many words: a small model would go on inventing them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdserve.core.request import Constraint, ConstraintKind
from pdserve.text.tools.syntax import NAME_KEY, ToolSyntax

MAX_FORCED_CALLS = 16
_SPACE = r" \t\r\n"


@dataclass(frozen=True, slots=True)
class Tool:
    """What can be called. ``parameters`` is the JSON schema of its arguments, an object."""

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    strict: bool = False


def forced_calls(
    tools: Sequence[Tool],
    syntax: ToolSyntax,
    *,
    only_one: bool,
    is_special: Callable[[str], bool],
    or_json: str | None = None,
) -> Constraint:
    """Calls of ``tools``, at least one. ``is_special`` says whether a text is a special token of
    the model. ``or_json``: a JSON schema that the whole answer may fit instead."""
    around = [_marked(text, syntax, is_special) for text in (syntax.before, syntax.after)]
    rules = [
        "start: calls" if or_json is None else "start: calls | answer",
        _several("calls", "one", syntax, only_one=only_one),
        f"one: {around[0]} call {around[1]}",
        *_call_rules(tools, syntax),
    ]
    if or_json is not None:
        rules.append(f"answer: %json {or_json}")
    return _grammar(rules)


def free_calls(
    tools: Sequence[Tool],
    syntax: ToolSyntax,
    *,
    only_one: bool,
    is_special: Callable[[str], bool],
) -> Constraint:
    """Text with calls of ``tools`` in it, or without; the rest as in `forced_calls`.

    The text never has an opener that no call follows. In a bare syntax it does not begin with a
    brace, and nothing follows calls but calls.
    """
    opener = re.escape(syntax.opener).replace("/", r"\/")
    text = rf"[{_SPACE}]*([^{_SPACE}{{](.|\n)*)?" if syntax.bare else r"(.|\n)*"
    rules = [f"TEXT: /{text}/ & ~/(.|\\n)*{opener}(.|\\n)*/"]
    if is_special(syntax.opener):
        rules.append(f"opened: TEXT {syntax.opener}")
    else:
        rules.append(f"opened[lazy]: /{text}{opener}/")
    inside = syntax.before.partition(syntax.opener)[2]
    block = f"{_literal(inside)} call {_marked(syntax.after, syntax, is_special)}"
    if syntax.bare:
        rules += [
            "start: TEXT | opened calls | calls",
            _several("calls", "spaced", syntax, only_one=only_one),
            f"spaced: SPACE {block}",
            f"SPACE: /[{_SPACE}]*/",
        ]
    else:
        rules += [
            f"start: {'TEXT | opened block' if only_one else '(opened block)* TEXT'}",
            f"block: {block}",
        ]
    return _grammar([*rules, *_call_rules(tools, syntax)])


def _several(name: str, one: str, syntax: ToolSyntax, *, only_one: bool) -> str:
    more = f" ({_literal(syntax.between)} {one}){{0,{MAX_FORCED_CALLS - 1}}}"
    return f"{name}: {one}{'' if only_one else more}"


def _call_rules(tools: Sequence[Tool], syntax: ToolSyntax) -> list[str]:
    """Of the rule ``call``: one call, without what stands around it."""
    rules = ["call: " + " | ".join(f"call_{number}" for number in range(len(tools)))]
    for number, tool in enumerate(tools):
        head = f'{{"{NAME_KEY}": {_json(tool.name)}, "{syntax.arguments_key}": '
        rules.append(f'call_{number}: {_literal(head)} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json {_json(_schema(tool))}")
    return rules


def _grammar(rules: Sequence[str]) -> Constraint:
    return Constraint(ConstraintKind.GRAMMAR, "\n".join(rules) + "\n")


def _schema(tool: Tool) -> dict[str, Any]:
    schema = {"type": "object", **tool.parameters}
    if isinstance(schema.get("properties", {}), dict):
        schema.setdefault("properties", {})
        schema.setdefault("additionalProperties", False)
    spacing = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return {**schema, "x-guidance": {**spacing, "lenient": not tool.strict}}


def _marked(text: str, syntax: ToolSyntax, is_special: Callable[[str], bool]) -> str:
    """The text, with its marker as a token of its own if it is one to the model."""
    for marker in syntax.markers:
        if marker in text and is_special(marker):
            before, _, after = text.partition(marker)
            return " ".join(filter(None, (_literal(before), marker, _literal(after))))
    return _literal(text)


def _literal(text: str) -> str:
    return _json(text) if text else ""


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
