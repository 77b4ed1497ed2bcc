"""What a constraint allows: masks from tokens alone, whatever the matchers have kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from pdserve.core.errors import ModelError, RequestError
from pdserve.core.ids import AttemptId, BlockId, Epoch, RequestId, StepId
from pdserve.core.request import Constraint, ConstraintKind, SamplingParams
from pdserve.core.step import SampleSpec, StepPlan, StepRow
from pdserve.text.structured import masks as masks_module
from pdserve.text.structured.grammar import grammar_of, lark_text
from pdserve.text.structured.masks import TokenMasks
from pdserve.text.structured.vocabulary import make_vocabulary
from pdserve.text.tokenizer import Tokenizer

PERSON = Constraint(
    ConstraintKind.JSON,
    json.dumps(
        {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    ),
)
EOS = 2
"""The tiny model's <|im_end|>."""
PADDING = 37
"""Ids of the model beyond those of its tokenizer."""


@pytest.fixture(scope="module")
def eos(tiny_tokenizer: Tokenizer) -> int:
    assert tiny_tokenizer.encode("<|im_end|>", add_special_tokens=False) == [EOS]
    return EOS


@pytest.fixture(scope="module")
def make_masks(tiny_tokenizer: Tokenizer, eos: int) -> Callable[[], TokenMasks]:
    vocab_size = tiny_tokenizer.vocab_size + PADDING
    vocabulary = make_vocabulary(tiny_tokenizer, vocab_size, (eos,))
    return lambda: TokenMasks(lambda: vocabulary, vocab_size)


def plan_of(
    constraint: Constraint | None, output: Sequence[int], *, name: str = "a", **params: Any
) -> StepPlan:
    """A step of one row that is to draw the next token after ``output``."""
    given = {"max_tokens": 100, "seed": 0, "eos_token_ids": (EOS,), **params}
    spec = SampleSpec(
        params=SamplingParams(constraint=constraint, **given),
        choices=(0,),
        index=len(output),
        history=None if constraint is None else tuple(output),
    )
    row = StepRow(
        attempt=AttemptId(RequestId(name), Epoch(1)),
        token_ids=(1,),
        start=0,
        block_ids=(BlockId(0),),
        sample=spec,
    )
    return StepPlan(step_id=StepId(1), rows=(row,))


def allowed(masks: TokenMasks, plan: StepPlan) -> list[int]:
    found = masks.of(plan)
    assert found is not None
    assert found.rows == [0]
    assert not found.failed
    ids: list[int] = np.flatnonzero(found.allowed[0]).tolist()
    return ids


def walk(
    masks: TokenMasks, constraint: Constraint, eos: int, seed: int, **params: Any
) -> list[int]:
    """Output tokens of an answer in which every allowed token is as likely, without its end."""
    rng = np.random.default_rng(seed)
    output: list[int] = []
    while True:
        token = int(rng.choice(allowed(masks, plan_of(constraint, output, **params))))
        if token == eos:
            return output
        output.append(token)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_drawn_under_a_schema_is_json_that_fits_it(
    make_masks: Callable[[], TokenMasks], tiny_tokenizer: Tokenizer, eos: int, seed: int
) -> None:
    document = json.loads(tiny_tokenizer.decode(walk(make_masks(), PERSON, eos, seed)))
    assert list(document) == ["name", "age"]
    assert len(document["name"]) <= 12
    assert type(document["age"]) is int


def test_each_kind_of_constraint_gives_its_own_answers(
    make_masks: Callable[[], TokenMasks], tiny_tokenizer: Tokenizer, eos: int
) -> None:
    masks = make_masks()
    odd = ['say "hi"', "back\\slash", "new\nline", "caf\u00e9 \U0001f600", "<|im_start|>x"]
    cases = {
        Constraint(ConstraintKind.REGEX, r"[ab]{3}-\d+"): r"[ab]{3}-\d+",
        Constraint(ConstraintKind.CHOICE, json.dumps(odd)): "|".join(map(re.escape, odd)),
        Constraint(ConstraintKind.GRAMMAR, 'root ::= ("x" | "y")+ "!"'): r"[xy]+!",
        Constraint(ConstraintKind.GRAMMAR, 'start: "<" /[0-9]{2}/ ">"'): r"<[0-9]{2}>",
    }
    for constraint, pattern in cases.items():
        for seed in range(4):
            output = walk(masks, constraint, eos, seed, name=f"{constraint}{seed}")
            text = tiny_tokenizer.decode(output, skip_special_tokens=False)
            assert re.fullmatch(pattern, text), (constraint, text)
            assert not set(output) & tiny_tokenizer.special_ids


def test_a_mask_depends_on_the_tokens_and_not_on_what_was_kept(
    make_masks: Callable[[], TokenMasks], eos: int
) -> None:
    kept = make_masks()
    output = walk(kept, PERSON, eos, seed=3)
    step_by_step = [
        allowed(kept, plan_of(PERSON, output[:i], name="b")) for i in range(len(output))
    ]
    for i, ids in enumerate(step_by_step):
        assert allowed(make_masks(), plan_of(PERSON, output[:i])) == ids  # on another worker
    # Back again, as after a resume; another answer under the same name; and a fork.
    assert allowed(kept, plan_of(PERSON, output[:2], name="b")) == step_by_step[2]
    other = walk(kept, PERSON, eos, seed=4, name="c")
    expected = allowed(make_masks(), plan_of(PERSON, other[:3]))
    assert allowed(kept, plan_of(PERSON, other[:3], name="b")) == expected


def test_matchers_are_few_and_those_that_were_dropped_are_made_again(
    make_masks: Callable[[], TokenMasks], eos: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks_module, "KEPT_MATCHERS", 3)
    masks = make_masks()
    output = walk(masks, PERSON, eos, seed=1)
    first = allowed(masks, plan_of(PERSON, output[:4]))
    for other in range(5):
        allowed(masks, plan_of(PERSON, [], name=f"other {other}"))
    assert len(masks._kept) == 3
    assert allowed(masks, plan_of(PERSON, output[:4])) == first


def test_an_answer_may_end_where_its_form_is_complete_and_must_where_nothing_can_follow(
    make_masks: Callable[[], TokenMasks], tiny_tokenizer: Tokenizer, eos: int
) -> None:
    masks = make_masks()
    digits = Constraint(ConstraintKind.REGEX, "[0-9]+")
    [one] = tiny_tokenizer.encode("1", add_special_tokens=False)
    assert eos not in allowed(masks, plan_of(digits, []))
    assert eos in allowed(masks, plan_of(digits, [one]))
    # Where it may go on it does, for as long as the request says.
    assert eos not in allowed(masks, plan_of(digits, [one], min_tokens=2))
    assert eos in allowed(masks, plan_of(digits, [one, one], min_tokens=2))
    assert eos not in allowed(masks, plan_of(digits, [one], ignore_eos=True))
    assert one not in allowed(masks, plan_of(digits, [one], min_tokens=2, stop_token_ids=(one,)))
    yes = Constraint(ConstraintKind.CHOICE, '["1"]')
    for params in ({"min_tokens": 9}, {"ignore_eos": True}, {"min_tokens": 9, "ignore_eos": True}):
        assert allowed(masks, plan_of(yes, [one], **params)) == [eos]


def test_rows_without_a_constraint_have_no_mask_and_a_bad_row_fails_alone(
    make_masks: Callable[[], TokenMasks], eos: int
) -> None:
    masks = make_masks()
    assert masks.of(plan_of(None, [])) is None
    output = walk(masks, PERSON, eos, seed=0)
    [good] = plan_of(PERSON, output[:3], name="good").rows
    [free] = plan_of(None, [], name="free").rows
    [bad] = plan_of(PERSON, [*output[:3], eos], name="bad").rows
    [worse] = plan_of(Constraint(ConstraintKind.REGEX, "(["), [], name="worse").rows
    found = masks.of(StepPlan(step_id=StepId(2), rows=(free, bad, good, worse)))
    assert found is not None
    assert found.rows == [1, 2, 3]
    assert sorted(found.failed) == [1, 3]
    assert "regex" in found.failed[3]
    assert "\n<state>" not in found.failed[1]
    assert np.flatnonzero(found.allowed[1]).tolist() == allowed(masks, plan_of(PERSON, output[:3]))


def test_ids_beyond_the_tokenizer_are_never_allowed(
    make_masks: Callable[[], TokenMasks], tiny_tokenizer: Tokenizer
) -> None:
    anything = Constraint(ConstraintKind.REGEX, r"(.|\n)*")
    ids = allowed(make_masks(), plan_of(anything, []))
    assert len(ids) > tiny_tokenizer.vocab_size // 2
    assert max(ids) < tiny_tokenizer.vocab_size


def test_a_sentencepiece_model_can_spell_words_in_the_middle_of_an_answer(
    sentencepiece_path: Any,
) -> None:
    tokenizer = Tokenizer.from_folder(sentencepiece_path)
    [eos] = tokenizer.encode("</s>", add_special_tokens=False)[-1:]
    masks = TokenMasks(
        lambda: make_vocabulary(tokenizer, tokenizer.vocab_size, (eos,)), tokenizer.vocab_size
    )
    texts = ["hello the", "the hello", "th\u00e9"]
    for seed in range(6):
        constraint = Constraint(ConstraintKind.CHOICE, json.dumps(texts))
        output = walk(masks, constraint, eos, seed, name=str(seed))
        assert b"".join(map(tokenizer.token_bytes, output)).decode() in texts


def test_a_model_without_an_end_and_a_text_that_cannot_be_read_are_refused(
    tiny_tokenizer: Tokenizer,
) -> None:
    with pytest.raises(ModelError, match="eos_token_id"):
        make_vocabulary(tiny_tokenizer, tiny_tokenizer.vocab_size, ())
    for kind, text in ((ConstraintKind.GRAMMAR, "a {{"), (ConstraintKind.JSON, "[1]")):
        with pytest.raises(RequestError):
            grammar_of(Constraint(kind, text))
    assert lark_text('a"\n') == '"a\\"\\n"'
