"""One choice: its tokens go in, what the client may see of them comes out.

A token passes the detokenizer, which holds back the bytes of unfinished characters, and then the
stop strings, which hold back what may be the start of one; in a chat with tools then the reader of
calls, which holds back what may become one. What leaves is final: it is never taken
back, and joined together it is the text of a non-streaming answer.

Why a choice ends is decided here too, because a stop string can only be seen in the text: it wins
over whatever the worker said of the token that completed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pdserve.api.openai.requests import OutputOptions
from pdserve.core.messages import TokenDelta
from pdserve.core.request import FinishReason, SamplingParams
from pdserve.core.step import TokenLogprobs
from pdserve.text.detokenize import Detokenizer
from pdserve.text.stop import StopStrings
from pdserve.text.tokenizer import Tokenizer
from pdserve.text.tools.stream import CallPart, CallStream


@dataclass(frozen=True, slots=True)
class LoggedToken:
    """A token with its log-probabilities. ``text_offset`` counts characters of the answer."""

    token_id: int
    text_offset: int
    logprobs: TokenLogprobs


@dataclass(slots=True)
class Piece:
    """News of one choice. ``text`` is content, apart from ``calls`` of tools. ``stop_reason``: the
    stop string or stop token id of the client's."""

    choice: int
    text: str
    token_ids: list[int]
    logged: list[LoggedToken]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """On the first piece of a choice, if they were asked for."""
    calls: list[CallPart] = field(default_factory=list)

    @classmethod
    def joined(cls, pieces: Sequence[Piece]) -> Piece:
        """All pieces of one choice as one."""
        return cls(
            pieces[0].choice,
            "".join(piece.text for piece in pieces),
            [token_id for piece in pieces for token_id in piece.token_ids],
            [token for piece in pieces for token in piece.logged],
            pieces[-1].finish_reason,
            pieces[-1].stop_reason,
            pieces[0].prompt_logprobs,
            [part for piece in pieces for part in piece.calls],
        )


class ChoiceText:
    """State of one choice. ``num_tokens`` counts every token, also the one that ended it."""

    def __init__(
        self, index: int, options: OutputOptions, params: SamplingParams, tokenizer: Tokenizer
    ) -> None:
        self._index = index
        self._options = options
        self._params = params
        self._is_verbose = (
            options.with_token_ids
            or options.num_top_logprobs is not None
            or params.prompt_logprobs is not None
        )
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=options.skip_special_tokens,
            continues_text=options.continues_text,
            shown_ids=frozenset() if options.tools is None else options.tools.shown_ids,
        )
        self._calls = None if options.tools is None else options.tools.reader()
        self._stops = StopStrings(options.stops, include=options.include_stop)
        self._num_chars = 0
        self.num_tokens = 0
        self.has_ended = False

    def push(self, delta: TokenDelta) -> Piece | None:
        """What the client is to be told of this token; None if nothing (yet)."""
        if self._options.drops_answer:
            self.has_ended = True
            return Piece(self._index, "", [], [], FinishReason.LENGTH.value)
        offset = self._num_chars
        text = self._decode(delta)
        self._num_chars += len(text)
        self.num_tokens += 1
        finish_reason = None if delta.finish is None else delta.finish.value
        stop_reason: str | int | None = self._stop_token(delta)
        text = self._stops.feed(text, armed=self.num_tokens > self._params.min_tokens)
        if self._stops.matched is not None:
            finish_reason, stop_reason = FinishReason.STOP.value, self._stops.matched
        elif delta.finish is not None:
            text += self._stops.finish()
        self.has_ended = finish_reason is not None
        calls: list[CallPart] = []
        if self._calls is not None:
            text, calls = self._find_calls(self._calls, text)
            if self._calls.num_complete and finish_reason == FinishReason.STOP.value:
                finish_reason = self._options.reason_of_calls
        if not (text or calls or self._is_verbose or self.has_ended):
            return None
        piece = Piece(
            self._index, text, [delta.token_id], [], finish_reason, stop_reason, calls=calls
        )
        if delta.logprobs is not None and self._options.num_top_logprobs is not None:
            piece.logged.append(LoggedToken(delta.token_id, offset, delta.logprobs))
        return piece

    def _find_calls(self, reader: CallStream, text: str) -> tuple[str, list[CallPart]]:
        """What of the text is content, and what it says of calls."""
        news = reader.feed(text)
        if not self.has_ended:
            return news.content, news.parts
        last = reader.finish()
        return news.content + last.content, news.parts + last.parts

    def _decode(self, delta: TokenDelta) -> str:
        """Text that this token completes. A token that ends the choice has none of its own."""
        if delta.finish is None:
            return self._detokenizer.push(delta.token_id)
        if delta.finish is FinishReason.STOP and not self._options.include_stop:
            return self._detokenizer.flush()
        return self._detokenizer.push(delta.token_id) + self._detokenizer.flush()

    def _stop_token(self, delta: TokenDelta) -> int | None:
        if delta.finish is not FinishReason.STOP:
            return None
        params = self._params
        ends_at_eos = not params.ignore_eos or params.constraint is not None
        is_eos = ends_at_eos and delta.token_id in params.eos_token_ids
        return None if is_eos else delta.token_id
