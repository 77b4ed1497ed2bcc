"""What is asked: prompts of chosen lengths, and a kind of sampling for each thing that can differ.

Kinds whose stop tokens must be among the tokens that the model would draw look them up in the
reference.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from bitwise.reference import Reference
from pdserve.core.request import Constraint, ConstraintKind, RoutePreference, SamplingParams

LENGTHS = (1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 129)
"""Prompt lengths around the borders of blocks (16), of chunks and of one-shot transfers (32, 48,
64), and of the attention's tiles (64); the last is more than the feed-forward part takes at once.
"""

NUM_WORDS = 380
"""Prompts are made of ids below this: every model of these tests has them."""

EOS = 2
WORDS = Constraint(ConstraintKind.REGEX, "([a-z]+ )*[a-z]+")
"""An answer that can end after any word."""
LIST = Constraint(
    ConstraintKind.JSON, '{"type": "array", "minItems": 40, "items": {"enum": ["up", "a", 17]}}'
)
"""An answer that no test is long enough to see the end of."""
NUM_TOKENS = 5


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, by all that its answer depends on, and what must not change it: salt and route."""

    name: str
    prompt: tuple[int, ...]
    params: SamplingParams
    num_choices: int = 1
    salt: str = ""
    route: RoutePreference | None = None

    @property
    def may_hand_off(self) -> bool:
        """Whether there is anything to decode after the first token."""
        return self.params.max_tokens > 1


def prompt_of(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    """A prompt; prompts of different lengths or seeds have nothing in common."""
    words = random.Random(f"{num_tokens} {seed}")
    return tuple(words.randrange(3, NUM_WORDS) for _ in range(num_tokens))


def _params(seed: int, **changes: object) -> SamplingParams:
    base = SamplingParams(
        max_tokens=NUM_TOKENS, seed=seed, temperature=0.0, eos_token_ids=(EOS,), logprobs=2
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def _first_tokens(
    reference: Reference, prompt: tuple[int, ...], params: SamplingParams, num_choices: int
) -> tuple[int, ...]:
    """Token 0 of each choice, if nothing stops it."""
    alone = replace(params, max_tokens=1)
    return tuple(reference.answer(prompt, alone, c)[0].token_id for c in range(num_choices))


def _stops_first(reference: Reference, prompt: tuple[int, ...], seed: int) -> SamplingParams:
    params = _params(seed)
    return replace(params, stop_token_ids=_first_tokens(reference, prompt, params, 1))


def _stops_first_too_early(
    reference: Reference, prompt: tuple[int, ...], seed: int
) -> SamplingParams:
    """Token 0 would stop it, and so would half the vocabulary, but not before token 3."""
    stops = _stops_first(reference, prompt, seed).stop_token_ids + tuple(range(NUM_WORDS // 2))
    return _params(seed, stop_token_ids=stops, min_tokens=3)


def _some_stop_first(reference: Reference, prompt: tuple[int, ...], seed: int) -> SamplingParams:
    """Of three choices one (or more, if they agree) ends with its first token."""
    params = _params(seed, temperature=1.5)
    return replace(params, stop_token_ids=_first_tokens(reference, prompt, params, 3)[1:2])


def _all_stop_first(reference: Reference, prompt: tuple[int, ...], seed: int) -> SamplingParams:
    params = _params(seed, temperature=1.5)
    return replace(params, stop_token_ids=_first_tokens(reference, prompt, params, 3))


def _stops_later(reference: Reference, prompt: tuple[int, ...], seed: int) -> SamplingParams:
    params = _params(seed, temperature=0.9)
    later = reference.answer(prompt, replace(params, max_tokens=4, ignore_eos=True))[-1]
    return replace(params, stop_token_ids=(later.token_id,))


_Made = Callable[[Reference, tuple[int, ...], int], SamplingParams]


def _fixed(**changes: object) -> _Made:
    return lambda reference, prompt, seed: _params(seed, **changes)


KINDS: Mapping[str, tuple[_Made, int]] = {
    "greedy": (_fixed(), 1),
    "seeded": (_fixed(temperature=1.0), 1),
    "top_p": (_fixed(temperature=0.9, top_p=0.7), 1),
    "filters": (_fixed(temperature=1.3, top_k=20, min_p=0.02, logit_bias=((7, 4.0),)), 1),
    "penalties": (
        _fixed(
            temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.3
        ),
        1,
    ),
    "greedy-penalties": (_fixed(repetition_penalty=1.5, presence_penalty=1.0), 1),
    "two": (_fixed(temperature=1.0, frequency_penalty=0.5), 2),
    "three": (_fixed(temperature=1.0, top_p=0.9, ignore_eos=True), 3),
    "one-token": (_fixed(temperature=1.0, max_tokens=1), 1),
    "one-token-each": (_fixed(temperature=1.0, max_tokens=1), 2),
    "stops-first": (_stops_first, 1),
    "stops-first-too-early": (_stops_first_too_early, 1),
    "some-stop-first": (_some_stop_first, 3),
    "all-stop-first": (_all_stop_first, 3),
    "stops-later": (_stops_later, 1),
    "pattern": (_fixed(constraint=WORDS), 1),
    "schema-two": (_fixed(temperature=1.5, presence_penalty=0.6, constraint=LIST), 2),
}
"""What each kind of sampling asks for, and of how many choices."""

FIRST_TOKEN_KINDS = ("one-token", "one-token-each", "stops-first", "all-stop-first")
"""Kinds whose answer is over with its first token: nothing is decoded elsewhere."""


def ask_of(kind: str, prompt: tuple[int, ...], reference: Reference, **changes: object) -> Ask:
    """The prompt with a kind of sampling, and a salt that nobody else has."""
    make, num_choices = KINDS[kind]
    name = f"{len(prompt)}-{kind}"
    params = make(reference, prompt, 1000 + len(prompt))
    ask = Ask(name, prompt, params, num_choices, salt=name)
    return replace(ask, **changes)  # type: ignore[arg-type]
