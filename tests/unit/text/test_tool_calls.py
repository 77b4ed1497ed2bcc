"""Calls of tools in an answer: found whatever the pieces, streamed as they come, never made up."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.errors import ConfigError
from pdserve.text.tools.json_object import JsonObject
from pdserve.text.tools.registry import HERMES, LLAMA3, syntax_named, syntax_of_template
from pdserve.text.tools.stream import CallPart, CallStream
from pdserve.text.tools.syntax import ToolSyntax

TOOLS = ("get_weather", "now")
WEATHER = '{"name": "get_weather", "arguments": {"city": "Ulm", "days": [1, 2.5e1]}}'
NOW = '{"name": "now", "arguments": {}}'
Calls = list[tuple[str, str]]


def stream_of(syntax: ToolSyntax, *, only_one: bool = False) -> CallStream:
    numbers = itertools.count()
    return CallStream(syntax, TOOLS, only_one=only_one, make_id=lambda: f"id {next(numbers)}")


def read(
    syntax: ToolSyntax, pieces: Iterable[str], *, only_one: bool = False
) -> tuple[str, Calls, int]:
    """Content, the calls that are not broken, and how many are."""
    stream = stream_of(syntax, only_one=only_one)
    content = ""
    parts: list[CallPart] = []
    for piece in pieces:
        news = stream.feed(piece)
        content += news.content
        parts += news.parts
    last = stream.finish()
    parts += last.parts
    content += last.content
    calls: dict[int, list[str]] = {}
    broken = set()
    for part in parts:
        if part.is_broken:
            broken.add(part.index)
            continue
        if part.name is not None:
            assert part.index == len(calls), "a call has its name once, and calls come in order"
            assert part.call_id == f"id {part.index}"
            calls[part.index] = [part.name, ""]
        calls[part.index][1] += part.arguments
    whole = [(name, text) for index, (name, text) in calls.items() if index not in broken]
    assert len(whole) == stream.num_complete
    return content + "", whole, len(broken)


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


W = ("get_weather", '{"city": "Ulm", "days": [1, 2.5e1]}')
N = ("now", "{}")

HERMES_CASES: list[tuple[str, str, Calls]] = [
    ("just words", "just words", []),
    ("", "", []),
    ("  spaces stay \n", "  spaces stay \n", []),
    (hermes(WEATHER), "", [W]),
    (hermes(WEATHER, NOW), "", [W, N]),
    ("Let me look.\n\n" + hermes(WEATHER) + "\n", "Let me look.", [W]),
    (f"<tool_call>{WEATHER}</tool_call>  <tool_call>{NOW}</tool_call>", "", [W, N]),
    (f"<tool_call>{WEATHER}<tool_call>{NOW}", "", [W, N]),
    (hermes(WEATHER) + "\nThat is all.", "\nThat is all.", [W]),
    (
        '<tool_call>{"arguments": {"city": "Ulm", "days": [1, 2.5e1]}, "name": "get_weather"}',
        "",
        [W],
    ),
    ('<tool_call>{"name": "now"}</tool_call>', "", [N]),
    ('<tool_call>{"type": "function", "name": "now", "parameters": {}}</tool_call>', "", [N]),
    # What is no call is content, to the last character.
    (hermes('{"name": "unknown", "arguments": {}}'), None, []),  # type: ignore[list-item]
    (hermes('{"name": "now", "arguments": {"a": }}'), None, []),  # type: ignore[list-item]
    (hermes('{"name": "now", "arguments": "{}"}'), None, []),  # type: ignore[list-item]
    (hermes('{"name": "now", "arguments": {}, "extra": 1}'), None, []),  # type: ignore[list-item]
    ("<tool_call>\nget_weather(Ulm)\n</tool_call>", None, []),  # type: ignore[list-item]
    ('<tool_call>{"name": "now", "arguments": {"a": "b', None, []),  # type: ignore[list-item]
    ("a <tool_call", None, []),  # type: ignore[list-item]
    ("<tool_call> \n", None, []),  # type: ignore[list-item]
    ("a <tool_call><tool_call>" + NOW, "a <tool_call>", [N]),
    ('<tool_call>{"name": <tool_call>' + NOW, '<tool_call>{"name": ', [N]),
]

LLAMA_CASES: list[tuple[str, str, Calls]] = [
    (WEATHER.replace("arguments", "parameters"), "", [W]),
    ("\n" + WEATHER + "; " + NOW, "", [W, N]),
    ("<|python_tag|>" + WEATHER + ";" + NOW, "", [W, N]),
    ("Sure: <|python_tag|>" + NOW, "Sure:", [N]),
    ('{"answer": 42}', '{"answer": 42}', []),
    (' {"name": "Ulm"} ', ' {"name": "Ulm"} ', []),
    ("{ and }", "{ and }", []),
    ("The JSON is " + NOW, "The JSON is " + NOW, []),
    (NOW + "; then rest", "; then rest", [N]),
]


@pytest.mark.parametrize(
    ("syntax", "case"),
    [*((HERMES, case) for case in HERMES_CASES), *((LLAMA3, case) for case in LLAMA_CASES)],
)
def test_calls_and_content_are_told_apart(
    syntax: ToolSyntax, case: tuple[str, str | None, Calls]
) -> None:
    text, content, calls = case
    expected = (text if content is None else content, calls)
    assert read(syntax, [text])[:2] == expected
    assert read(syntax, text)[:2] == expected  # a character at a time
    for cut in range(len(text)):
        assert read(syntax, [text[:cut], text[cut:]])[:2] == expected


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<|python_tag|>", "<tool", "\n", " ", ";", "{", "}"),
        *(WEATHER, NOW, WEATHER[:30], WEATHER[30:], '"name": "now"', "words", '"', "\\", "\u00e9"),
    ]
)


@given(
    syntax=st.sampled_from([HERMES, LLAMA3]),
    fragments=st.lists(FRAGMENTS, max_size=12),
    cuts=st.lists(st.integers(0, 400), max_size=8),
    only_one=st.booleans(),
)
def test_the_pieces_do_not_matter(
    syntax: ToolSyntax, fragments: list[str], cuts: list[int], only_one: bool
) -> None:
    text = "".join(fragments)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    whole = read(syntax, [text], only_one=only_one)
    assert read(syntax, pieces, only_one=only_one) == whole
    assert read(syntax, text, only_one=only_one) == whole
    content, calls, _ = whole
    for name, arguments in calls:
        assert name in TOOLS
        assert isinstance(json.loads(arguments), dict)
    if not calls:
        assert content == text


def test_arguments_come_as_they_are_written() -> None:
    stream = stream_of(HERMES)
    told = [stream.feed(character).parts for character in f"<tool_call>{WEATHER}"]
    parts = [part for parts in told for part in parts]
    assert parts[0] == CallPart(0, "id 0", "get_weather", "{")
    assert all(part.name is None and part.call_id is None for part in parts[1:])
    assert parts.pop() == CallPart(0, is_complete=True)
    assert len(parts) == len(W[1])
    # The name and the first arguments in one piece are one part.
    [part] = stream_of(HERMES).feed(f"<tool_call>{WEATHER}").parts
    assert part == CallPart(0, "id 0", *W, is_complete=True)


def test_a_call_that_breaks_after_it_was_told_of_is_taken_back() -> None:
    stream = stream_of(HERMES)
    assert stream.feed('<tool_call>{"name": "now", "arguments": {"a": ').parts[0].name == "now"
    news = stream.feed("oops}}")
    assert news.parts == [CallPart(0, is_broken=True)]
    assert news.content == '<tool_call>{"name": "now", "arguments": {"a": oops}}'
    assert stream.feed(hermes(NOW)).parts[0].index == 1


def test_one_call_may_be_all_that_is_wanted() -> None:
    assert read(HERMES, [hermes(WEATHER, NOW) + " and more"], only_one=True) == ("", [W], 0)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(document=st.dictionaries(st.text(), JSON, max_size=4), indent=st.sampled_from([None, 2]))
def test_every_json_object_is_one(document: dict[str, object], indent: int | None) -> None:
    text = json.dumps(document, indent=indent)
    found = JsonObject()
    assert all(map(found.feed, text))
    assert found.is_complete
    assert not found.feed(" ")
    values = {key: json.loads(found.text(*span)) for key, span in found.members.items()}
    assert values == document


@given(text=st.text(alphabet='{}[]:,"\\ue0129.-+ truefalsn\n', max_size=30))
def test_what_python_does_not_read_is_no_object(text: str) -> None:
    text = "{" + text.rstrip()  # what follows an object is not of it
    found = JsonObject()
    taken = all(map(found.feed, text)) and found.is_complete
    try:
        pairs = json.loads(text, object_pairs_hook=lambda pairs: pairs, parse_constant=_refuse)
        is_object = len({key for key, _ in pairs}) == len(pairs)
    except ValueError:
        is_object = False
    assert taken == is_object


def _refuse(name: str) -> None:
    raise ValueError(name)


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 2}', "{" + '"a":' + "[" * 200, '{"a": 01}', '{"a": "\n"}', '["a"]', '{"a":1,}'],
)
def test_what_is_refused(text: str) -> None:
    assert not all(map(JsonObject().feed, text))


def test_syntaxes_are_known_by_name_and_by_template() -> None:
    assert syntax_named("hermes") is HERMES
    with pytest.raises(ConfigError, match="--tool-call-parser is 'x'; it is one of hermes, llama3"):
        syntax_named("x")
    assert syntax_of_template("... <tool_call></tool_call> ...") is HERMES
    assert syntax_of_template('Environment: ipython {"name": .., "parameters": ..}') is LLAMA3
    assert syntax_of_template("{{ messages }}") is None
