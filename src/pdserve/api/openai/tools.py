"""Tools in a chat: what a client offers and asks for, and what that means for its answer.

Who lets the model choose (``auto``) gets what the model writes, in the syntax that its chat
template asks for; with a ``strict`` tool, what it begins as a call goes on as a valid one. Who
requires a call, or names its tool, gets an answer that can be nothing else:
it is held to a grammar of calls, whether or not the model knows of tools.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field

from pdserve.api.edge import Edge
from pdserve.api.openai.body_model import Body, Items
from pdserve.api.openai.formats import FormatFields
from pdserve.core.errors import RequestError
from pdserve.core.request import Constraint, ConstraintKind
from pdserve.text.tools.forced import Tool, forced_calls, free_calls
from pdserve.text.tools.registry import HERMES, SYNTAXES, syntax_named, syntax_of_template
from pdserve.text.tools.stream import CallStream
from pdserve.text.tools.syntax import ToolSyntax


class FunctionTool(Body):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="JSON schema of the arguments."
    )
    strict: bool = Field(
        False,
        description="Hold calls to the schema also where the model chooses, and refuse a schema "
        "that cannot be enforced.",
    )


class OfferedTool(Body):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    type: Literal["function"] = "function"
    function: FunctionTool


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"] = "function"
    function: NamedFunction


class OfferFields(Body):
    """Tools as the model reads them; shared with ``/tokenize``."""

    tools: Items[OfferedTool] = Field(default_factory=list)

    def tools_for_template(self) -> list[dict[str, Any]]:
        """As the client wrote them."""
        return [tool.model_dump(exclude_unset=True) | {"type": tool.type} for tool in self.tools]


class ToolFields(Body):
    """What is to be done with the tools."""

    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="Default: auto if there are tools."
    )
    parallel_tool_calls: bool = Field(True, description="False: at most one call.")


class ToolBody(OfferFields, ToolFields, FormatFields):
    """Everything that decides about calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """How calls are found in an answer. ``shown_ids`` are special tokens that mark them, ``named``
    says that the client has chosen the tool."""

    syntax: ToolSyntax
    tools: frozenset[str]
    only_one: bool = False
    named: bool = False
    shown_ids: frozenset[int] = frozenset()

    def reader(self) -> CallStream:
        """For one answer."""
        return CallStream(self.syntax, self.tools, only_one=self.only_one)


async def tool_use(edge: Edge, body: ToolBody) -> tuple[ToolUse | None, Constraint | None]:
    """How calls are found in the answer (None: there are none), and what it is held to.

    Raises `RequestError`.
    """
    choice = body.tool_choice or ("auto" if body.tools else "none")
    if choice == "none" or (choice == "auto" and not body.tools):
        return None, await edge.constraint_of(body)
    wanted = _wanted(body, choice)
    form, constraint = body.asked_form(), None
    if choice == "auto":
        syntax = _syntax_of_model(edge)
        if form is not None:
            constraint = _calls_or(edge, body, syntax, *form)
        elif any(tool.strict for tool in wanted):
            constraint = free_calls(
                wanted, syntax, only_one=_only_one(body), is_special=edge.tokenizer.is_special
            )
    else:
        if form is not None and form[1] != "response_format":
            raise RequestError(f"{form[1]} and tool_choice exclude each other", form[1])
        syntax = _syntax_known(edge) or HERMES
        constraint = forced_calls(
            wanted, syntax, only_one=_only_one(body), is_special=edge.tokenizer.is_special
        )
    if constraint is not None:
        await edge.try_constraint(constraint, "tools" if form is None else form[1])
    use = ToolUse(
        syntax=syntax,
        tools=frozenset(tool.name for tool in wanted),
        only_one=_only_one(body),
        named=isinstance(choice, NamedTool),
        shown_ids=edge.tokenizer.special_ids_of(syntax.markers),
    )
    return use, constraint


def calls_for_template(calls: Any) -> list[dict[str, Any]]:
    """Calls of an assistant's message as chat templates expect them: arguments as objects.

    Raises `RequestError`.
    """
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError("messages: tool_calls must be a list", "messages")
    return [_call_for_template(call) for call in calls]


def _call_for_template(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError("messages: a tool call needs a function with a name", "messages")
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise RequestError(
            f"messages: the arguments of the call of {function['name']!r} must be a JSON object, "
            "written as a string",
            "messages",
        )
    return {**call, "function": {**function, "arguments": dict(arguments)}}


def _wanted(body: ToolBody, choice: str | NamedTool) -> list[Tool]:
    """The tools that may be called. Raises `RequestError` if there are none."""
    tools = [
        Tool(tool.function.name, tool.function.parameters, tool.function.strict)
        for tool in body.tools
    ]
    if not tools:
        raise RequestError("tool_choice needs tools to choose from: send tools", "tool_choice")
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.name == choice.function.name]
        if not tools:
            raise RequestError(
                f"tool_choice names {choice.function.name!r}, which is not among the tools",
                "tool_choice",
            )
    return tools


def _only_one(body: ToolBody) -> bool:
    return isinstance(body.tool_choice, NamedTool) or not body.parallel_tool_calls


def _syntax_known(edge: Edge) -> ToolSyntax | None:
    name = edge.settings.tool_call_parser
    return syntax_of_template(edge.chat_template.source) if name is None else syntax_named(name)


def _syntax_of_model(edge: Edge) -> ToolSyntax:
    """Of a model that knows of tools. Raises `RequestError` for others."""
    if not edge.chat_template.takes_tools:
        raise RequestError(
            "tools with tool_choice 'auto' are not served: this model's chat template does not "
            "tell it of tools. Send tool_choice 'required' or name a tool, which any model can do, "
            "or serve a model that has learned to call tools",
            "tools",
        )
    syntax = _syntax_known(edge)
    if syntax is None:
        raise RequestError(
            "tools with tool_choice 'auto' are not served: it is not known how this model writes "
            f"its calls. Start the server with --tool-call-parser ({' or '.join(SYNTAXES)}), or "
            "send tool_choice 'required'",
            "tools",
        )
    return syntax


def _calls_or(
    edge: Edge, body: ToolBody, syntax: ToolSyntax, constraint: Constraint, field: str
) -> Constraint:
    """Calls, or an answer of the form that was asked for."""
    if constraint.kind is not ConstraintKind.JSON:
        raise RequestError(
            f"{field} and tools exclude each other unless it asks for JSON; send tool_choice "
            "'none', or response_format",
            field,
        )
    return forced_calls(
        _wanted(body, "auto"),
        syntax,
        only_one=_only_one(body),
        is_special=edge.tokenizer.is_special,
        or_json=constraint.text,
    )
