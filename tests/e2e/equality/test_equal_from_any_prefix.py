"""Full and partial prefix hits on either side, or on both, change no bit.

Each request has a salt of its own, under which a related prompt was asked before. The workers where
that left something are the *side*; how the two prompts are related is the *relation*.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from bitwise import KINDS, Ask, Lab, Shape, ask_of, prompt_of

from pdserve.core.events import LifeName

SPLITS = (
    Shape("split-one-shot", prefill=1, decode=1),
    Shape("split-by-layer", prefill=1, decode=1, max_step_tokens=32, one_shot_tokens=0),
    Shape("split-chunks-16", prefill=1, decode=1, max_step_tokens=16, one_shot_tokens=49),
)
MIXED = Shape("mixed", mixed=1, max_step_tokens=256, mixed_chunk_tokens=16)
LENGTHS = (16, 17, 31, 32, 33, 48, 49, 65, 80)
RELATIONS = ("same", "head", "diverging", "longer", "other-salt")
ASKED = ("greedy", "seeded", "two", "penalties", "stops-first", "top_p", "three", "one-token")
BLOCK = 16


def clusters(*shapes: Shape) -> list[object]:
    return [
        pytest.param((dtype, shape), id=f"{dtype}-{shape.name}")
        for dtype in ("fp32", "bf16")
        for shape in shapes
    ]


def earlier_prompt(relation: str, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """What was asked before ``prompt``."""
    cut = len(prompt) * 2 // 3
    return {
        "same": prompt,
        "head": prompt[:cut],
        "diverging": prompt[:cut] + prompt_of(40, seed=1),
        "longer": prompt + prompt_of(21, seed=1),
        "other-salt": prompt,
    }[relation]


def common_blocks(ask: Ask, earlier: Ask) -> int:
    """Full blocks in which the two prompts are the same."""
    if ask.salt != earlier.salt:
        return 0
    same = [a == b for a, b in zip(ask.prompt, earlier.prompt, strict=False)]
    return [*same, False].index(False) // BLOCK


def pairs(lab: Lab, side: str) -> list[tuple[Ask, Ask]]:
    """(request, the one before it) for every length and relation. With only a first token to give,
    the earlier one stays on the prefill worker."""
    made = []
    for number, relation in enumerate(RELATIONS):
        for at, length in enumerate(LENGTHS):
            kind = ASKED[(at + number) % len(ASKED)]
            ask = ask_of(kind, prompt_of(length), lab.reference)
            ask = replace(ask, name=f"{ask.name} {relation}", salt=f"{side} {relation} {length}")
            earlier = ask_of("greedy", earlier_prompt(relation, ask.prompt), lab.reference)
            params = replace(
                earlier.params, max_tokens=1 if side == "prefill" else 2, ignore_eos=True
            )
            salt = "" if relation == "other-salt" else ask.salt
            made.append((ask, replace(earlier, params=params, salt=salt)))
    return made


@pytest.mark.parametrize("side", ["prefill", "decode", "both"])
@pytest.mark.parametrize("tiny_lab", clusters(*SPLITS), indirect=True)
def test_split(tiny_lab: Lab, side: str) -> None:
    lab = tiny_lab
    asked = pairs(lab, side)
    lab.forget_prefixes("prefill-0")
    lab.forget_prefixes("decode-0")
    lab.warm([earlier for _, earlier in asked])
    if side == "decode":
        lab.forget_prefixes("prefill-0")
    heard = lab.answer_all([ask for ask, _ in asked])
    lab.assert_clean()
    num_hits = 0
    for (ask, earlier), one in zip(asked, heard, strict=True):
        blocks = common_blocks(ask, earlier)
        # The last token is always computed, for its logits.
        here = min(blocks, (len(ask.prompt) - 1) // BLOCK) if side != "decode" else 0
        there = blocks if side != "prefill" else 0
        (started,) = lab.details(one, LifeName.PREFILL_STARTED)
        assert started["cached_tokens"] == here * BLOCK, ask.name
        for granted in lab.details(one, LifeName.HANDOFF_GRANTED):
            assert granted["reused_blocks"] == there, ask.name
            num_hits += there > 0
    assert num_hits >= (20 if side != "prefill" else 0)


@pytest.mark.parametrize("tiny_lab", clusters(MIXED), indirect=True)
def test_mixed(tiny_lab: Lab) -> None:
    lab = tiny_lab
    asked = pairs(lab, "mixed")
    lab.warm([earlier for _, earlier in asked])
    heard = lab.answer_all([ask for ask, _ in asked], waves=2)
    for (ask, earlier), one in zip(asked, heard, strict=True):
        (started,) = lab.details(one, LifeName.PREFILL_STARTED)
        blocks = min(common_blocks(ask, earlier), (len(ask.prompt) - 1) // BLOCK)
        assert started["cached_tokens"] == blocks * BLOCK, ask.name


@pytest.mark.parametrize("tiny_lab", clusters(*SPLITS, MIXED), indirect=True)
def test_next_turn(tiny_lab: Lab) -> None:
    """The next prompt begins with the last one and its answer, whose blocks were made by decoding,
    token by token: only the worker that decoded has them."""
    lab = tiny_lab
    kinds = [kind for kind in KINDS if KINDS[kind][1] == 1]
    firsts, nexts = [], []
    for kind, length in zip(kinds, (9, 15, 16, 17, 30, 31, 32, 33, 47, 50), strict=False):
        first = ask_of("seeded", prompt_of(length, seed=2), lab.reference, salt=f"turns {length}")
        params = replace(first.params, max_tokens=20, ignore_eos=True)
        firsts.append(replace(first, params=params))
        answer = lab.reference.answer(first.prompt, params)
        said = first.prompt + tuple(token.token_id for token in answer)
        turn = said + prompt_of(7, seed=3)
        nexts.append(ask_of(kind, turn, lab.reference, salt=first.salt))
    lab.answer_all(firsts)
    lab.assert_clean()
    heard = lab.answer_all(nexts)
    for first, one in zip(firsts, heard, strict=True):
        asked_blocks = len(first.prompt) // BLOCK
        said_blocks = (len(first.prompt) + 19) // BLOCK  # the last token's KV was never needed
        (started,) = lab.details(one, LifeName.PREFILL_STARTED)
        here = asked_blocks if lab.shape.splits else said_blocks
        assert started["cached_tokens"] == here * BLOCK
        for granted in lab.details(one, LifeName.HANDOFF_GRANTED):
            assert granted["reused_blocks"] == said_blocks
