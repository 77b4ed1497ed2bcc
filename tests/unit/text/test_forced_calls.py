"""Whatever is drawn under a grammar of calls is calls, to the reader that finds them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from llguidance import LLMatcher

from pdserve.core.request import Constraint
from pdserve.text.structured.grammar import grammar_of
from pdserve.text.structured.vocabulary import make_vocabulary
from pdserve.text.tokenizer import Tokenizer
from pdserve.text.tools.forced import Tool, forced_calls, free_calls
from pdserve.text.tools.registry import HERMES, LLAMA3
from pdserve.text.tools.stream import CallStream, whole_calls
from pdserve.text.tools.syntax import ToolSyntax

EOS = 2
TOOLS = [
    Tool(
        'say "hi"',
        {
            "$defs": {"word": {"type": "string", "maxLength": 5}},
            "properties": {"word": {"$ref": "#/$defs/word"}, "twice": {"type": "boolean"}},
            "required": ["word"],
            "not": {"required": ["never"]},  # cannot be enforced, and is passed over
        },
    ),
    Tool("now"),
]


def drawn(tokenizer: Tokenizer, constraint: Constraint, seed: int, begun: str = "") -> str:
    """An answer in which every allowed token is as likely, after what is ``begun``."""
    vocabulary = make_vocabulary(tokenizer, tokenizer.vocab_size, (EOS,))
    matcher = LLMatcher(vocabulary, grammar_of(constraint), log_level=0)
    rng = np.random.default_rng(seed)
    output = tokenizer.encode(begun, add_special_tokens=False)
    assert matcher.consume_tokens(output)
    while True:
        assert not matcher.is_error(), matcher.get_error()
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        token = int(rng.choice(np.flatnonzero(np.unpackbits(mask, bitorder="little"))))
        if token == EOS:
            return tokenizer.decode(output, skip_special_tokens=False)
        output.append(token)
        matcher.consume_token(token)


@pytest.mark.parametrize("only_one", [True, False])
@pytest.mark.parametrize("syntax", [HERMES, LLAMA3])
def test_forced_answers_are_calls_that_fit(
    tiny_tokenizer: Tokenizer, syntax: ToolSyntax, only_one: bool
) -> None:
    numbers = set()
    for seed in range(8):
        constraint = forced_calls(
            TOOLS, syntax, only_one=only_one, is_special=tiny_tokenizer.is_special
        )
        text = drawn(tiny_tokenizer, constraint, seed)
        stream = CallStream(syntax, [tool.name for tool in TOOLS])
        news, last = stream.feed(text), stream.finish()
        assert news.content + last.content == ""
        calls = whole_calls(news.parts + last.parts)
        numbers.add(len(calls))
        for call in calls:
            arguments = json.loads(call.arguments)
            if call.name == "now":
                assert arguments == {}
            else:
                assert call.name == 'say "hi"'
                assert len(arguments["word"]) <= 5
                assert set(arguments) <= {"word", "twice"}
    assert (numbers == {1}) is only_one
    assert max(numbers) <= 16


def test_markers_that_are_special_tokens_are_written_as_such(tiny_tokenizer: Tokenizer) -> None:
    syntax = ToolSyntax(
        name="special",
        opener="<|im_start|>",
        before="<|im_start|>\n",
        between="",
        after="",
        arguments_key="arguments",
    )
    constraint = forced_calls(
        TOOLS[1:], syntax, only_one=True, is_special=tiny_tokenizer.is_special
    )
    text = drawn(tiny_tokenizer, constraint, 0)
    assert text == '<|im_start|>\n{"name": "now", "arguments": {}}'
    [marker] = tiny_tokenizer.special_ids_of(syntax.markers)
    assert tiny_tokenizer.encode("<|im_start|>", add_special_tokens=False) == [marker]


def test_an_answer_may_be_calls_or_json(tiny_tokenizer: Tokenizer) -> None:
    constraint = forced_calls(
        TOOLS[1:],
        HERMES,
        only_one=True,
        is_special=tiny_tokenizer.is_special,
        or_json='{"enum": ["fine"]}',
    )
    texts = {drawn(tiny_tokenizer, constraint, seed) for seed in range(12)}
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert texts == {'"fine"', call}


MARKED = ToolSyntax(
    name="special", opener="<|im_start|>", before="<|im_start|>", between="", after="",
    arguments_key="arguments",
)  # fmt: skip


@pytest.mark.parametrize(
    ("syntax", "begun"),
    [
        (HERMES, "Well </tool_call> <tool_c\n<tool_call>"),
        (HERMES, "<tool_call>\n{"),
        (LLAMA3, ' \n{"name'),
        (LLAMA3, "One {moment} <|python_tag|>"),
        (MARKED, "Well <|im_start|>"),
    ],
)
def test_what_begins_as_a_call_goes_on_as_one(
    tiny_tokenizer: Tokenizer, syntax: ToolSyntax, begun: str
) -> None:
    constraint = free_calls(TOOLS, syntax, only_one=True, is_special=tiny_tokenizer.is_special)
    for seed in range(3):
        text = drawn(tiny_tokenizer, constraint, seed, begun)
        stream = CallStream(syntax, [tool.name for tool in TOOLS], only_one=True)
        news, last = stream.feed(text), stream.finish()
        [call] = whole_calls(news.parts + last.parts)
        assert news.content + last.content == begun.partition(syntax.opener)[0].strip(' \n{name"')
        assert call.name == "now" or len(json.loads(call.arguments)["word"]) <= 5


@pytest.mark.parametrize("syntax", [HERMES, LLAMA3, MARKED])
def test_text_without_calls_is_free_and_so_is_their_number(
    tiny_tokenizer: Tokenizer, syntax: ToolSyntax
) -> None:
    constraint = free_calls(TOOLS, syntax, only_one=False, is_special=tiny_tokenizer.is_special)
    vocabulary = make_vocabulary(tiny_tokenizer, tiny_tokenizer.vocab_size, (EOS,))
    matcher = LLMatcher(vocabulary, grammar_of(constraint), log_level=0)
    now = f'{{"name": "now", "{syntax.arguments_key}": {{}}}}'
    around = f"{syntax.before}{now}{syntax.after}"
    after = [] if syntax.bare else ["and", around, "\n\U0001f600 } {"]
    calls = [around, syntax.between, around] if syntax.bare else [around]
    for texts in (["caf\u00e9, <tool ca\n", *after], calls, [*calls, *after]):
        ids = tiny_tokenizer.encode("".join(texts), add_special_tokens=False)
        assert matcher.try_consume_tokens(ids) == len(ids), texts
        assert matcher.is_accepting()
        matcher.reset()
