"""The syntaxes that are known, by the names that vLLM's ``--tool-call-parser`` has for them."""

from __future__ import annotations

from pdserve.core.errors import ConfigError
from pdserve.text.tools.syntax import ToolSyntax

HERMES = ToolSyntax(
    name="hermes",
    opener="<tool_call>",
    closer="</tool_call>",
    before="<tool_call>\n",
    between="\n",
    after="\n</tool_call>",
    arguments_key="arguments",
)
"""Hermes 2 Pro and later, Qwen 2.5, Qwen 3, SmolLM3 (Hermes-Function-Calling, README)."""

LLAMA3 = ToolSyntax(
    name="llama3_json",
    opener="<|python_tag|>",
    bare=True,
    separators=";",
    before="",
    between="; ",
    after="",
    arguments_key="parameters",
)
"""Llama 3.1, 3.2 and 3.3 (llama-models, models/llama3_1/prompt_format.md)."""

SYNTAXES = {syntax.name: syntax for syntax in (HERMES, LLAMA3)}


def syntax_named(name: str) -> ToolSyntax:
    """Raises `ConfigError` for a name that is not known."""
    try:
        return SYNTAXES[name]
    except KeyError:
        known = ", ".join(SYNTAXES)
        raise ConfigError(f"--tool-call-parser is {name!r}; it is one of {known}") from None


def syntax_of_template(source: str) -> ToolSyntax | None:
    """The syntax that a chat template asks a model to use; None if it is none of ours."""
    if HERMES.opener in source:
        return HERMES
    if LLAMA3.opener in source or ("ipython" in source and '"parameters"' in source):
        return LLAMA3
    return None
