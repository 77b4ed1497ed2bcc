"""Which tokens the constraints of a step's rows allow.

The mask of a row is a function of its constraint and of its output tokens. To compute it fast, a
`TokenMasks` keeps a matcher for each choice that it has seen, with the tokens that this has taken
in; one more token is a few microseconds. A choice that it has not seen (after a hand-off, a resume,
a fork, or since others took its place) gets a new matcher that takes in all of its tokens. So what
is kept is a cache, and never part of the state of a request.

Ending tokens are left out where the request does not want them yet (``min_tokens``,
``ignore_eos``), unless the answer cannot go on without: an answer that is complete ends.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from pdserve.core.errors import RequestError
from pdserve.core.ids import AttemptId
from pdserve.core.request import Constraint, SamplingParams
from pdserve.core.step import SampleSpec, StepPlan
from pdserve.text.structured.grammar import grammar_of

KEPT_MATCHERS = 512
KEPT_GRAMMARS = 64
MAX_MESSAGE_CHARS = 500
_BIASES_OF_BYTE = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf
).astype(np.float32)  # [byte of a mask, its eight tokens]


@dataclass(frozen=True, slots=True)
class Masks:
    """Of the constrained ones among a step's sampling rows.

    ``rows[i]``, each once and in order, may draw the tokens for which ``bias[i]`` is 0 and not
    minus infinity: to be added to its logits. ``failed`` names rows for which no token can be
    found, with the reason; they are in ``rows`` too, and all is allowed to them.
    """

    rows: list[int]
    bias: NDArray[np.float32]  # [constrained row, vocab]
    failed: dict[int, str]

    @property
    def allowed(self) -> NDArray[np.bool_]:
        """The same as ``[constrained row, vocab]`` of true and false."""
        allowed: NDArray[np.bool_] = self.bias == 0
        return allowed


@dataclass(slots=True)
class _Kept:
    constraint: Constraint
    matcher: LLMatcher
    tokens: tuple[int, ...]


class TokenMasks:
    """Of one engine. Not safe for several threads at once.

    ``load`` gives the vocabulary, at the latest when the first constraint comes: it takes a second
    or so.
    """

    def __init__(self, load: Callable[[], LLTokenizer], vocab_size: int) -> None:
        self._load = load
        self._vocab_size = vocab_size
        self._vocabulary: LLTokenizer | None = None
        self._grammars: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._kept: OrderedDict[tuple[AttemptId, int], _Kept] = OrderedDict()

    def of(self, plan: StepPlan) -> Masks | None:
        """The masks of a step; None if none of its rows is constrained."""
        sampling = [row for row in plan.rows if row.sample is not None]
        wanted = [
            (index, row.attempt, row.sample)
            for index, row in enumerate(sampling)
            if row.sample is not None and row.sample.params.constraint is not None
        ]
        if not wanted:
            return None
        num_bytes = -(-self._vocab_size // 8)
        whole = np.zeros((len(wanted), num_bytes, 8), dtype=np.float32)
        bias = whole.reshape(len(wanted), -1)[:, : self._vocab_size]
        failed: dict[int, str] = {}
        for place, (index, attempt, spec) in enumerate(wanted):
            try:
                packed = self._packed(attempt, spec)[:num_bytes]
                # Into its place at once, six times as fast as by an index.
                np.take(_BIASES_OF_BYTE, packed, axis=0, out=whole[place], mode="clip")
                _leave_out(_unwanted_endings(spec.params, spec.index), bias[place])
            except RequestError as error:
                failed[index] = str(error)
        while len(self._kept) > max(KEPT_MATCHERS, 2 * len(wanted)):
            self._kept.popitem(last=False)
        return Masks([index for index, _, _ in wanted], bias, failed)

    def load(self) -> None:
        """Read the vocabulary now. Raises what ``load`` raises."""
        if self._vocabulary is None:
            self._vocabulary = self._load()

    def _packed(self, attempt: AttemptId, spec: SampleSpec) -> NDArray[np.uint8]:
        """The mask of a row, a bit for each token."""
        matcher = self._matcher(attempt, spec)
        packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        _check(matcher)
        if not packed.any():
            raise RequestError("the answer's form leaves no token to go on with")
        return packed

    def _matcher(self, attempt: AttemptId, spec: SampleSpec) -> LLMatcher:
        """The choice's matcher, which has taken in its output."""
        constraint = spec.params.constraint
        assert constraint is not None
        key, output = (attempt, spec.choices[0]), spec.output
        kept = self._kept.pop(key, None)
        if kept is None or kept.constraint != constraint or not _starts(output, kept.tokens):
            kept = _Kept(constraint, self._new_matcher(constraint), ())
        news = output[len(kept.tokens) :]
        if news and not kept.matcher.consume_tokens(list(news)):
            _check(kept.matcher)
            raise RequestError("the answer so far does not have its form")
        kept.tokens = output
        self._kept[key] = kept
        return kept.matcher

    def _new_matcher(self, constraint: Constraint) -> LLMatcher:
        grammar = self._grammars.pop(constraint, None)
        if grammar is None:
            self.load()
            assert self._vocabulary is not None
            grammar = LLMatcher(self._vocabulary, grammar_of(constraint), log_level=0)
            _check(grammar)
        self._grammars[constraint] = grammar
        if len(self._grammars) > KEPT_GRAMMARS:
            self._grammars.popitem(last=False)
        return grammar.deep_copy()


def _starts(output: Sequence[int], tokens: tuple[int, ...]) -> bool:
    return output[: len(tokens)] == tokens


def _unwanted_endings(params: SamplingParams, index: int) -> tuple[int, ...]:
    """Ending tokens that output token ``index`` should not be."""
    if index < params.min_tokens:
        return params.ending_token_ids
    return params.eos_token_ids if params.ignore_eos else ()


def _leave_out(tokens: Sequence[int], bias: NDArray[np.float32]) -> None:
    """Forbid these tokens in ``bias [vocab]``, unless no other is allowed."""
    unwanted = [token for token in tokens if 0 <= token < len(bias)]
    if unwanted:
        kept = bias[unwanted]
        bias[unwanted] = -np.inf
        if not np.isfinite(bias).any():
            bias[unwanted] = kept


def _check(matcher: LLMatcher) -> None:
    """Raises `RequestError` once the matcher has given up."""
    if matcher.is_error():
        raise RequestError(what_went_wrong(matcher.get_error()))


def what_went_wrong(message: str) -> str:
    """What went wrong, without the state of the parser that follows it, nor all of a long text."""
    said = message.partition("\n<state>")[0].strip()
    return said if len(said) <= MAX_MESSAGE_CHARS else f"{said[:MAX_MESSAGE_CHARS]}..."
