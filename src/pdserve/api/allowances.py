"""How much a key may still ask for: requests a minute, and tokens in flight.

An `Allowance` belongs to a name of the key file and outlives a reload of it: new limits do not
forget what was used. Requests are a token bucket that holds a minute's worth and fills evenly.
Tokens are reserved when a request's prompt is known, as many as it may become (prompt plus
``max_tokens`` of each choice), and given back when its response has ended, however it ended.

A response tells what is left in OpenAI's headers ``x-ratelimit-*``.
"""

from __future__ import annotations

import math

from pdserve.core.errors import RateLimitError, RequestError

RATE_LIMIT_HEADERS = tuple(
    f"x-ratelimit-{name}"
    for name in (
        *("limit-requests", "remaining-requests", "reset-requests"),
        *("limit-tokens", "remaining-tokens"),
    )
)
_MINUTE_S = 60.0
_TOKENS_RETRY_S = 1.0
"""When tokens in flight will end is not known; a client may as well ask again soon."""


class Allowance:
    """Of one name. Event loop's thread only; ``now`` is seconds of a monotonic clock."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._requests_per_minute: float | None = None
        self._concurrent_tokens: int | None = None
        self._level = 0.0
        self._filled_s = 0.0
        self._num_tokens = 0

    @property
    def tokens_in_flight(self) -> int:
        return self._num_tokens

    def limit(
        self, requests_per_minute: float | None, concurrent_tokens: int | None, now: float
    ) -> None:
        """From now on these limits hold; None: there is none."""
        before = self._requests_per_minute
        self._fill(now)
        self._requests_per_minute = requests_per_minute
        self._concurrent_tokens = concurrent_tokens
        if requests_per_minute is not None:
            full = before is None  # what was used without a limit was not counted
            self._level = requests_per_minute if full else min(self._level, requests_per_minute)

    def take_request(self, now: float) -> None:
        """Count a request. Raises `RateLimitError`."""
        self._fill(now)
        if self._requests_per_minute is None:
            return
        if self._level < 1.0:
            wait_s = (1.0 - self._level) * _MINUTE_S / self._requests_per_minute
            raise RateLimitError(
                f"API key {self._name!r} may send {self._requests_per_minute:g} requests a minute; "
                f"the next one is due in {wait_s:.1f} s",
                wait_s,
                "requests",
            )
        self._level -= 1.0

    def reserve(self, num_tokens: int) -> None:
        """Count so many tokens as in flight. Raises `RateLimitError`, or `RequestError` if they
        are more than the key may have at all."""
        limit = self._concurrent_tokens
        if limit is not None and self._num_tokens + num_tokens > limit:
            if num_tokens > limit:
                raise RequestError(
                    f"prompt and answer may come to {num_tokens} tokens, and API key "
                    f"{self._name!r} may have {limit} in flight: ask for a smaller max_tokens",
                    "max_tokens",
                )
            raise RateLimitError(
                f"API key {self._name!r} may have {limit} tokens in flight: {self._num_tokens} "
                f"are, and this request may come to {num_tokens}; wait until others have ended",
                _TOKENS_RETRY_S,
                "tokens",
            )
        self._num_tokens += num_tokens

    def release(self, num_tokens: int) -> None:
        """Give back what was reserved."""
        self._num_tokens -= num_tokens
        assert self._num_tokens >= 0, "more was given back than reserved"

    def headers(self, now: float) -> list[tuple[bytes, bytes]]:
        """What is left, by OpenAI's names. There is no time after which tokens come back."""
        found: list[tuple[str, str]] = []
        if self._requests_per_minute is not None:
            self._fill(now)
            missing = self._requests_per_minute - self._level
            found += [
                ("limit-requests", f"{self._requests_per_minute:g}"),
                ("remaining-requests", str(int(self._level))),
                ("reset-requests", duration(missing * _MINUTE_S / self._requests_per_minute)),
            ]
        if self._concurrent_tokens is not None:
            left = max(0, self._concurrent_tokens - self._num_tokens)
            found += [
                ("limit-tokens", str(self._concurrent_tokens)),
                ("remaining-tokens", str(left)),
            ]
        return [(f"x-ratelimit-{name}".encode(), value.encode()) for name, value in found]

    def _fill(self, now: float) -> None:
        elapsed_s, self._filled_s = max(0.0, now - self._filled_s), now
        if self._requests_per_minute is not None:
            gained = elapsed_s * self._requests_per_minute / _MINUTE_S
            self._level = min(self._requests_per_minute, self._level + gained)


def duration(seconds: float) -> str:
    """As OpenAI writes it: ``120ms``, ``7s``, ``6m0s``. Rounded up."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"
