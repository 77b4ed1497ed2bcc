"""Write the reference pages beside this script from the code: cli, configuration, http.

    python docs/reference/generate.py            write them
    python docs/reference/generate.py --check    say which are stale; status 1 if any is

The command line is read off its parser, the configuration off its fields, and HTTP off the schema
that the server publishes. A test fails when a page is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from pdserve.api.app import create_app
from pdserve.api.callers import CLASS_HEADER
from pdserve.api.fake import FakeGateway
from pdserve.api.gateway import ModelCard
from pdserve.api.middleware import REQUEST_ID_HEADER
from pdserve.api.openai.requests import ROUTE_HEADER
from pdserve.api.settings import ApiSettings
from pdserve.api.time_limits import TIMEOUT_HEADER
from pdserve.cli import whole_parser
from pdserve.config import EDGE_OPTIONS, ENVIRONMENT_PREFIX, OPTIONS
from pdserve.options import flag_of
from pdserve.text.chat import ChatTemplate
from pdserve.text.tokenizer import Tokenizer

HERE = Path(__file__).parent
MADE = "<!-- Made by docs/reference/generate.py. Change the code instead, and run it again. -->"
METHODS = ("get", "post", "put", "delete")
HEADERS = (
    (REQUEST_ID_HEADER, "the client's name for the request; every answer has one"),
    ("Authorization", "`Bearer KEY`, if the server takes keys ([secure](../secure.md#keys))"),
    (ROUTE_HEADER, "`auto`, `split` or `local`: whether two workers or one are to serve it"),
    (CLASS_HEADER, "the class of service ([overload](../overload.md#classes))"),
    (TIMEOUT_HEADER, "seconds that the answer may take in all ([secure](../secure.md#deadlines))"),
    ("traceparent", "W3C Trace Context, handed on to the workers"),
)


def pages() -> dict[str, str]:
    """File name to text of each page."""
    return {
        name: re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"
        for name, lines in (
            ("cli.md", _cli()),
            ("configuration.md", _configuration()),
            ("http.md", _http()),
        )
    }


def stale(folder: Path = HERE) -> list[str]:
    """Names of the pages that the code no longer says."""
    return [
        name
        for name, text in pages().items()
        if not (folder / name).exists() or (folder / name).read_text(encoding="utf-8") != text
    ]


# --- the command line ---------------------------------------------------------------------------


def _cli() -> Iterator[str]:
    parser = whole_parser()
    yield from ("# The command line", "", MADE, "", str(parser.description), "")
    [commands] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    summaries = {action.dest: action.help for action in commands._choices_actions}
    yield from ("| command | |", "| --- | --- |")
    for name in summaries:
        yield f"| [`pdserve {name}`](#pdserve-{name}) | {_cell(summaries[name] or '')} |"
    for name in summaries:
        yield from ("", f"## pdserve {name}", "")
        yield from _command(commands.choices[name])


def _command(parser: argparse.ArgumentParser) -> Iterator[str]:
    for text in (parser.description, parser.epilog):
        if text:
            yield from (_cell(text), "")
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if not _is_hidden(a)]
        if not actions:
            continue
        if group.title not in ("options", "positional arguments"):
            yield from (f"**{str(group.title).capitalize()}**", "")
        yield from ("| | |", "| --- | --- |")
        for action in actions:
            yield f"| {_typed(action)} | {_cell(_help(action, parser.prog))} |"
        yield ""


def _is_hidden(action: argparse.Action) -> bool:
    return action.help == argparse.SUPPRESS or action.dest == "help"


def _typed(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else _value(action)
    if not action.option_strings:
        return f"`{value}`"
    return ", ".join(f"`{flag} {value}`".replace(" `", "`") for flag in action.option_strings)


def _value(action: argparse.Action) -> str:
    name = action.metavar or action.dest.upper()
    if action.choices is not None and action.metavar is None:
        name = "\\|".join(map(str, action.choices))
    text = " ".join(name) if isinstance(name, tuple) else str(name)
    if action.nargs in ("?", "*"):
        return f"[{text}]"
    return f"{text} ..." if action.nargs == "+" else text


def _help(action: argparse.Action, prog: str) -> str:
    values: Mapping[str, Any] = {**vars(action), "prog": prog}
    return (action.help or "") % values


# --- the configuration --------------------------------------------------------------------------


def _configuration() -> Iterator[str]:
    yield from (
        "# The configuration of `pdserve serve`",
        "",
        MADE,
        "",
        "Each option is a flag, an environment variable, and a key in the `[serve]` table of the "
        "TOML file that `--config` names. A flag wins over the variable, the variable over the "
        "file, the file over the default; at start the server prints what it has resolved, and "
        "from where.",
        "",
        "```toml",
        "[serve]",
        'model = "smollm2-135m"',
        "decode = 2",
        "max_model_len = 4096",
        "```",
        "",
    )
    own = [name for name in OPTIONS if name not in EDGE_OPTIONS]
    for title, names in (("Options", own), ("Options of the HTTP edge", EDGE_OPTIONS)):
        yield from (f"## {title}", "")
        yield from ("| key | flag | default | |", "| --- | --- | --- | --- |")
        for name in names:
            option = OPTIONS[name]
            default = "" if option.default in (None, ()) else f"`{option.default}`"
            text = _cell(option.metadata["help"])
            yield f"| `{name}` | `{flag_of(name)}` | {default} | {text} |"
        yield ""
    yield (
        f"The variable is the key in capitals after `{ENVIRONMENT_PREFIX}`: "
        f"`{ENVIRONMENT_PREFIX}MAX_MODEL_LEN=4096`. Classes of service can be tables in the file "
        "([overload](../overload.md#classes)); API keys have a file of their own "
        "([secure](../secure.md#keys))."
    )


# --- HTTP ---------------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    """The document that a server publishes as ``/openapi.json``."""
    card = ModelCard(
        name="model", max_model_tokens=4096, vocab_size=256, eos_token_ids=(2,), created=0
    )
    # Nobody asks it anything, so that it has no words.
    tokenizer = cast(Tokenizer, None)
    app = create_app(FakeGateway(card), tokenizer, ChatTemplate(None), ApiSettings())
    return cast(dict[str, Any], app.openapi())


def _http() -> Iterator[str]:
    document = schema()
    yield from ("# HTTP", "", MADE, "")
    yield (
        "The same as a schema is at `/openapi.json`, and to try at `/docs`. Errors have OpenAI's "
        'shape, `{"error": {"message", "type", "param", "code"}}`. A field that is `null` counts '
        "as left out; unknown fields are ignored."
    )
    yield from ("", "## Headers of a request", "", "| header | |", "| --- | --- |")
    yield from (f"| `{name}` | {text} |" for name, text in HEADERS)
    bodies: list[str] = []
    for path, operations in document["paths"].items():
        for method in METHODS:
            if method in operations:
                yield from _operation(path, method, operations[method], bodies)
    for name in bodies:
        yield from ("", f"## {name}", "")
        yield from _body(document["components"]["schemas"], name)


def _operation(
    path: str, method: str, operation: Mapping[str, Any], bodies: list[str]
) -> Iterator[str]:
    yield from ("", f"## {method.upper()} {path}", "")
    yield _prose(operation.get("description") or operation["summary"])
    body = operation.get("requestBody")
    if body is not None:
        [content] = body["content"].values()
        name = content["schema"]["$ref"].rpartition("/")[2]
        if name not in bodies:
            bodies.append(name)
        yield from ("", f"Body: [{name}](#{name.lower()}).")
    yield from ("", "| status | |", "| --- | --- |")
    for status, answer in sorted(operation["responses"].items()):
        kinds = ", ".join(f"`{kind}`" for kind in answer.get("content", {}))
        text = kinds if status == "200" else _cell(answer["description"])
        yield f"| {status} | {text} |"


def _body(schemas: Mapping[str, Any], name: str) -> Iterator[str]:
    found = schemas[name]
    if found.get("description"):
        yield from (_prose(found["description"]), "")
    variants = [each["$ref"].rpartition("/")[2] for each in found.get("oneOf", ())]
    for variant in variants:
        yield from (f"### {variant}", "")
        yield from _body(schemas, variant)
    if not variants:
        required = found.get("required", ())
        yield from ("| field | type | default | |", "| --- | --- | --- | --- |")
        for field, value in found.get("properties", {}).items():
            default = "required" if field in required else _default(value)
            text = _cell(value.get("description", ""))
            yield f"| `{field}` | {_type(value)} | {default} | {text} |"
        yield ""


def _default(value: Mapping[str, Any]) -> str:
    default = value.get("default")
    return "" if default in (None, "", [], {}) else f"`{default}`"


def _type(value: Mapping[str, Any]) -> str:
    """In a word or a few, with its bounds."""
    if "$ref" in value:
        return str(value["$ref"].rpartition("/")[2])
    several = value.get("anyOf") or value.get("oneOf")
    if several:
        kinds = [_type(each) for each in several if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in value or "const" in value:
        return " or ".join(f"`{each}`" for each in value.get("enum", [value.get("const")]))
    kind = str(value.get("type", "any"))
    if kind == "array":
        return f"list of {_type(value.get('items', {}))}"
    if kind == "object" and isinstance(value.get("additionalProperties"), dict):
        return f"object of {_type(value['additionalProperties'])}"
    return kind + _bounds(value)


def _bounds(value: Mapping[str, Any]) -> str:
    signs = {
        "minimum": "≥",
        "exclusiveMinimum": ">",
        "maximum": "≤",
        "exclusiveMaximum": "<",
        "minLength": "length ≥",
        "maxLength": "length ≤",
    }
    bounds = [f"{sign} {value[key]:g}" for key, sign in signs.items() if key in value]
    shown = [bound for bound in bounds if "e+" not in bound]  # the ends of 64 bits tell nothing
    return f" {', '.join(shown)}" if shown else ""


# --- text ---------------------------------------------------------------------------------------


def _cell(text: str) -> str:
    """On one line, for a table."""
    return _prose(text).replace("\n", " ").replace("|", "\\|")


def _prose(text: str) -> str:
    """Of a docstring or a help text: its names in Markdown's quotes, and no tags."""
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    quoted = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else part.replace("<", "&lt;").replace("*", "\\*")
        for part in quoted
    )


def main(arguments: Iterable[str]) -> int:
    if "--check" in arguments:
        names = stale()
        for name in names:
            print(f"docs/reference/{name} is stale: python docs/reference/generate.py")
        return 1 if names else 0
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
        print(f"docs/reference/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
