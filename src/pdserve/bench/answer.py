"""One streamed answer: the times of its chunks, its tokens by the server's own count, its end.

An `Answer` is told the bytes of a server-sent event stream. A chunk counts as output

- on the completions route if it has choices, even if their text is empty (a token whose text is
  held back still has been made);
- on the chat route if its delta has content, reasoning, a tool call or token ids, or if it ends the
  choice; the chunk that only opens the message does not count.

The answer is complete when a chunk with a finish reason and ``[DONE]`` (or the end of the body)
have come. An error event, a broken stream or another status than 200 is a failure: what came before
it does not make it an answer.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import msgspec

from pdserve.bench.connection import StaleConnectionError
from pdserve.core.errors import ProtocolError
from pdserve.workload.outcome import CountedBy

MAX_ERROR_BYTES = 4096
_DONE = b"[DONE]"


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None

    @property
    def is_output(self) -> bool:
        delta = self.delta
        return delta is None or bool(
            delta.content
            or delta.reasoning
            or delta.reasoning_content
            or delta.tool_calls
            or self.token_ids
            or self.finish_reason
        )


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class Event(msgspec.Struct):
    id: str | None = None
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(Event).decode


class Answer:
    """Hears one exchange (`connection.Exchange`). ``ended`` is set once, when all is known.

    With ``leave_after_tokens`` it asks to be cancelled (``ended`` with ``left`` true) once so many
    tokens are there. With ``digests`` it remembers what the answer was, by its `digest`.
    """

    def __init__(self, leave_after_tokens: int | None = None, *, digests: bool = False) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.response_id = ""
        self.times_s: list[float] = []
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.failure: str | None = None
        self.message = ""
        self.left = False
        self._leave_after_tokens = leave_after_tokens
        self._num_token_ids = 0
        self._digest = hashlib.blake2b(digest_size=16) if digests else None
        self._rest = b""
        self._refusal = b""
        self._done = False

    # --- what is known ----------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Output tokens, by the best count there is."""
        if self.usage is not None and self.usage.completion_tokens is not None:
            return self.usage.completion_tokens
        return self._num_token_ids or len(self.times_s)

    @property
    def counted_by(self) -> CountedBy:
        if self.usage is not None and self.usage.completion_tokens is not None:
            return CountedBy.USAGE
        return CountedBy.TOKEN_IDS if self._num_token_ids else CountedBy.CHUNKS

    @property
    def is_stale(self) -> bool:
        """True if the server has not seen the request."""
        return self.failure == "stale"

    @property
    def digest(self) -> str:
        """Of its token ids if the server sends them, else of its text; empty if not asked for."""
        return "" if self._digest is None else self._digest.hexdigest()

    # --- told by the connection -------------------------------------------------------------

    def head(self, status: int) -> None:
        self.status = status

    def body(self, data: bytes, at_s: float) -> None:
        if self.status != 200:
            if len(self._refusal) < MAX_ERROR_BYTES:
                self._refusal += data
            return
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if self.left:
                return  # what still comes before the connection is closed comes too late
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), at_s)

    def end(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if self.failure is None and not self.left:
            self._judge(error)
        self.ended.set_result(None)

    # --- inside -----------------------------------------------------------------------------

    def _judge(self, error: Exception | None) -> None:
        if isinstance(error, StaleConnectionError):
            self.fail("stale", "")
        elif isinstance(error, ProtocolError):
            self.fail("not HTTP", str(error))
        elif error is not None:
            self.fail("disconnected", str(error))
        elif self.status != 200:
            self.fail(str(self.status), _message_of(self._refusal))
        elif not self.times_s:
            self.fail("no tokens", "the stream ended without any output")
        elif self.finish_reason is None and not self._done:
            self.fail("broken off", "the stream ended before the answer did")

    def fail(self, failure: str, message: str) -> None:
        self.failure = failure
        self.message = message

    def _event(self, data: bytes, at_s: float) -> None:
        if data == _DONE:
            self._done = True
            return
        try:
            event = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self.fail("not JSON", f"{error}: {data[:200]!r}")
            return
        if event.error is not None:
            self.fail("error event", _text_of(event.error))
        if event.usage is not None:
            self.usage = event.usage
        if not event.choices:
            return
        choice = event.choices[0]
        if not self.times_s:
            self.response_id = event.id or ""
        if choice.token_ids is not None:
            self._num_token_ids += len(choice.token_ids)
        if self._digest is not None:
            self._digest.update(_content_of(choice))
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason
        if choice.is_output:
            self.times_s.append(at_s)
            if self._leave_after_tokens is not None:
                self._perhaps_leave(self._leave_after_tokens)

    def _perhaps_leave(self, num_tokens: int) -> None:
        if (self._num_token_ids or len(self.times_s)) >= num_tokens and not self.ended.done():
            self.left = True
            self.ended.set_result(None)


def _content_of(choice: Choice) -> bytes:
    """What is the same however the answer was cut into chunks."""
    if choice.token_ids is not None:
        return b"".join(token_id.to_bytes(4, "little") for token_id in choice.token_ids)
    delta = choice.delta or Delta()
    return (choice.text or delta.content or "").encode()


def _message_of(body: bytes) -> str:
    """The message in an OpenAI-like error document, or the body as it is."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body[:300].decode(errors="replace")
    if isinstance(document, dict):
        return _text_of(document.get("error", document))
    return _text_of(document)


def _text_of(error: Any) -> str:
    if isinstance(error, dict) and "message" in error:
        error = error["message"]
    return str(error)[:300]
