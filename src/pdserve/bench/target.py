"""The server under load, as the client knows it: how to ask, and what came of one question.

A `Target` makes a request's body ahead of its time (`prepare`), sends it when told (`send`), and
hands back an `Outcome` whatever happens: refusals, broken streams and time-outs are outcomes too.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pdserve.bench.answer import Answer
from pdserve.bench.connection import Connection, Exchange, Pool
from pdserve.bench.options import ROUTES, TargetOptions
from pdserve.core.errors import ConfigError, UnavailableError
from pdserve.workload.outcome import Ending, Outcome
from pdserve.workload.prompts import token_ids, words
from pdserve.workload.request import TraceRequest

ASK_TIMEOUT_S = 10.0


class Target:
    """One server. Belongs to one event loop; close it when done."""

    def __init__(self, options: TargetOptions) -> None:
        self.options = options
        self.model = options.model
        self.base_url = options.url.rstrip("/").removesuffix("/v1")
        url = urlsplit(self.base_url)
        try:
            port = url.port
        except ValueError:
            port = -1
        if url.scheme not in ("http", "https") or not url.hostname or port == -1:
            raise ConfigError(f"--url is {options.url!r}; it looks like http://HOST:PORT")
        tls = ssl.create_default_context() if url.scheme == "https" else None
        self._pool = Pool(url.hostname, port or (443 if tls else 80), tls)
        self._path = url.path
        self._netloc = url.netloc

    def close(self) -> None:
        self._pool.close()

    async def ask_for_model(self) -> str:
        """The model that is used. Raises `UnavailableError` if the server does not answer."""
        document = await self._get("/v1/models")
        if self.model is None:
            try:
                self.model = str(document["data"][0]["id"])
            except (KeyError, IndexError, TypeError) as error:
                raise UnavailableError(
                    f"{self.base_url} names no model at /v1/models; name one with --model"
                ) from error
        return self.model

    def prepare(self, request: TraceRequest) -> bytes:
        """The whole HTTP request."""
        body = msgspec.json.encode(self._body(request))
        return self._head("POST", ROUTES[self.options.endpoint], len(body)) + body

    async def send(
        self, request: TraceRequest, prepared: bytes, start_s: float, due_s: float | None = None
    ) -> Outcome:
        """Ask, and wait for the end. Times of the outcome count from ``start_s``.

        ``start_s`` is read from `time.perf_counter`. ``due_s`` None: whenever it is sent is the
        right time.
        """
        sent_s = time.perf_counter() - start_s
        digests = self.options.digests
        answer = Answer(request.cancel_after_tokens or None, digests=digests)
        connection: Connection | None = None
        leave_after_s = 0.0 if request.cancel_after_tokens == 0 else request.cancel_after_s
        try:
            async with asyncio.timeout(self.options.timeout_s):
                connection = await self._pool.connection()
                connection.exchange(prepared, answer)
                await self._wait(answer, leave_after_s)
                if answer.is_stale:
                    answer = Answer(request.cancel_after_tokens or None, digests=digests)
                    connection = await self._pool.connection(fresh=True)
                    connection.exchange(prepared, answer)
                    await self._wait(answer, leave_after_s)
        except TimeoutError:
            answer.fail("timeout", f"no end within {self.options.timeout_s:g} s")
        except OSError as error:
            answer.fail("no connection", str(error))
        finally:
            if connection is not None and (answer.left or not answer.ended.done()):
                self._pool.forget(connection)
        outcome = _outcome(request, answer, start_s, sent_s, due_s)
        if self.options.ignore_eos:
            return replace(outcome, asked_tokens=request.output_tokens)
        return outcome

    async def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        timeout_s: float | None = ASK_TIMEOUT_S,
    ) -> tuple[int, Mapping[str, Any]]:
        """Status and JSON document of an operator's route. Raises `UnavailableError` if nobody
        answers."""
        whole = _Whole()
        data = b"" if body is None else msgspec.json.encode(body)
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._pool.connection(fresh=True)
                connection.exchange(self._head(method, path, len(data)) + data, whole)
                await whole.ended
            document = _document(whole)
        except (OSError, TimeoutError, msgspec.DecodeError) as error:
            raise UnavailableError(
                f"no OpenAI-compatible server answers at {self.base_url} ({error}); name the right "
                "one with --url"
            ) from error
        return whole.status, document if isinstance(document, dict) else {}

    # --- inside -----------------------------------------------------------------------------

    async def _wait(self, answer: Answer, leave_after_s: float | None) -> None:
        if leave_after_s is None:
            await answer.ended
            return
        await asyncio.wait([answer.ended], timeout=leave_after_s)
        if not answer.ended.done():
            answer.left = True

    def _body(self, request: TraceRequest) -> dict[str, object]:
        options = self.options
        body: dict[str, object] = {
            "model": self.model,
            "max_tokens": request.output_tokens,
            "temperature": options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.temperature > 0:
            body["seed"] = options.seed + request.index
        if options.ignore_eos:
            body["ignore_eos"] = True
        if options.return_token_ids:
            body["return_token_ids"] = True
        if options.endpoint == "chat":
            content = words(request.segments, options.seed)
            body["messages"] = [{"role": "user", "content": content}]
        elif options.prompt == "words":
            body["prompt"] = words(request.segments, options.seed)
        else:
            body["prompt"] = token_ids(request.segments, options.seed, options.vocab_size)
        return body | options.extra_body

    def _head(self, method: str, path: str, length: int) -> bytes:
        fields = {"Host": self._netloc, "Accept": "*/*", "User-Agent": "pdserve-bench"}
        if method == "POST":
            fields |= {"Content-Type": "application/json", "Content-Length": str(length)}
        if self.options.api_key:
            fields["Authorization"] = f"Bearer {self.options.api_key}"
        fields |= dict(self.options.headers)
        lines = [f"{method} {self._path}{path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        try:
            return "\r\n".join([*lines, "", ""]).encode("ascii")
        except UnicodeEncodeError as error:
            raise ConfigError(f"the URL, the key and headers are plain ASCII: {error}") from error

    async def _get(self, path: str) -> Mapping[str, Any]:
        status, document = await self.ask("GET", path)
        if status == 401:
            raise UnavailableError(f"{self.base_url} wants a key; give it with --api-key")
        if status != 200 and self.model is None:
            raise UnavailableError(
                f"{self.base_url}{path} answers with status {status}; name the model with --model"
            )
        return document if status == 200 else {}


class _Whole(Exchange):
    """An answer that is read in one piece."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.data = bytearray()

    def head(self, status: int) -> None:
        self.status = status

    def body(self, data: bytes, at_s: float) -> None:
        self.data += data

    def end(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(OSError(str(error)))


def _document(whole: _Whole) -> object:
    """The JSON that was answered; a refusal may come from something that speaks none."""
    try:
        return msgspec.json.decode(bytes(whole.data))
    except msgspec.DecodeError:
        if whole.status == 200:
            raise
        return {}


def _outcome(
    request: TraceRequest, answer: Answer, start_s: float, sent_s: float, due_s: float | None
) -> Outcome:
    ending = Ending.COMPLETED
    if answer.failure is not None:
        ending = Ending.FAILED
    elif answer.left:
        ending = Ending.CANCELLED
    usage = answer.usage
    details = usage.prompt_tokens_details if usage is not None else None
    counted = usage.prompt_tokens if usage is not None else None
    times_s = [at_s - start_s for at_s in answer.times_s]
    return Outcome(
        index=request.index,
        response_id=answer.response_id,
        due_s=sent_s if due_s is None else due_s,
        sent_s=sent_s,
        ending=ending,
        first_s=times_s[0] if times_s else None,
        last_s=times_s[-1] if times_s else None,
        gaps_s=tuple(b - a for a, b in itertools.pairwise(times_s)),
        prompt_tokens=request.prompt_tokens if counted is None else counted,
        cached_tokens=(details.cached_tokens or 0) if details is not None else 0,
        output_tokens=answer.num_tokens,
        counted_by=answer.counted_by,
        finish_reason=answer.finish_reason,
        ended_s=time.perf_counter() - start_s,
        digest=answer.digest,
        failure=answer.failure,
        message=answer.message,
    )
