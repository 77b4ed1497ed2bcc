"""Every error that pdserve raises on purpose.

::

    PdserveError
    ├── ConfigError            a flag, file or combination that cannot work; says what to change
    │   └── UnknownNameError   a name that nobody knows; says what it may mean, and what there is
    ├── ModelError             a model folder or file that cannot be served; says why
    │   └── PullError          a model could not be fetched or converted
    ├── RequestError           the client's fault; ``param`` names the field          -> 400
    │   ├── ContextLengthError prompt and answer do not fit the model                 -> 400
    │   ├── AuthError          missing or wrong API key                               -> 401
    │   ├── ForbiddenError     this API key may not do that                           -> 403
    │   ├── NotFoundError      unknown model, request id or worker                    -> 404
    │   └── ConflictError      what is asked for does not go with how things stand    -> 409
    ├── OverloadedError        no room now; ``retry_after_s``                         -> 429
    │   └── RateLimitError     not so much at a time for this API key; ``limit``      -> 429
    ├── DeadlineError          the answer has taken longer than it may   -> 504 or an error event
    ├── UnavailableError       nobody left to serve, or draining                      -> 503
    ├── GenerationError        the answer broke off after it began      -> 500 or an error event
    ├── OutOfBlocksError       the block pool cannot give that many (caught by the batch machine)
    ├── ProtocolError          a peer said something it may not: the link is closed
    │   └── ProofError         its first frame does not prove the cluster secret
    └── TransferError          a write to a peer's pool failed: the attempt is resumed
        └── PayloadError       a foreign engine cannot give, or cannot take, this payload

Mapped to HTTP in one place, ``api.errors``.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection


class PdserveError(Exception):
    """Base of the tree."""


class ConfigError(PdserveError):
    pass


class UnknownNameError(ConfigError):
    """``kind`` is what ``name`` should be one of, such as ``routing policy``."""

    def __init__(self, kind: str, name: str, known: Collection[str]) -> None:
        listed = f" There are {', '.join(sorted(known))}" if known else " There is none"
        super().__init__(f"there is no {kind} {name!r}{meant(name, known) or '.'}{listed}")


def meant(name: str, known: Collection[str]) -> str:
    """``; did you mean predicted?``: the known name that is nearest, or nothing if none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def why(error: Exception) -> str:
    """Of a file that cannot be used, without its name and number: whoever tells it says those."""
    return str(getattr(error, "strerror", None) or error)


class ModelError(PdserveError):
    pass


class PullError(ModelError):
    pass


class RequestError(PdserveError):
    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    pass


class AuthError(RequestError):
    pass


class ForbiddenError(RequestError):
    pass


class NotFoundError(RequestError):
    pass


class ConflictError(RequestError):
    pass


class OverloadedError(PdserveError):
    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimitError(OverloadedError):
    """``limit``: which one was met, ``requests`` or ``tokens``."""

    def __init__(self, message: str, retry_after_s: float, limit: str) -> None:
        super().__init__(message, retry_after_s)
        self.limit = limit


class DeadlineError(PdserveError):
    pass


class UnavailableError(PdserveError):
    pass


class GenerationError(PdserveError):
    pass


class OutOfBlocksError(PdserveError):
    pass


class ProtocolError(PdserveError):
    pass


class ProofError(ProtocolError):
    pass


class TransferError(PdserveError):
    pass


class PayloadError(TransferError):
    pass
