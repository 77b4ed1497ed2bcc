"""A `Gateway` without workers: its tokens follow a script, its failures come when told.

For tests of the edge, and for trying a client without a model. A request's life is that of the real
one in small: submitted, tokens of all choices in turn, then finished, failed or aborted, each of
which is written down.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any

from pdserve.api.gateway import FaultHooks, Gateway, ModelCard
from pdserve.core.commands import ChangeRole, Command
from pdserve.core.errors import ConflictError, NotFoundError
from pdserve.core.events import LifeEvent, LifeName, Scalar, detail
from pdserve.core.ids import GATEWAY, Epoch, RequestId
from pdserve.core.messages import TokenDelta
from pdserve.core.request import FinishReason, Request
from pdserve.core.step import PromptNews, TokenLogprobs

Script = Callable[[Request, int], Iterable[int]]
"""(request, choice) -> token ids. One that ends without an ending token breaks the answer off."""


def repeat_prompt(request: Request, choice: int) -> Iterator[int]:
    """The prompt over and over; choice c begins with token c of it."""
    prompt = request.prompt_token_ids
    return itertools.islice(itertools.cycle(prompt), choice % len(prompt), None)


class FakeGateway(Gateway):
    """Follows ``script``. Belongs to one event loop.

    ``fail_before`` is raised instead of the first token; ``fail_after`` = (k, error) raises after k
    tokens of a request. With ``permits`` only so many tokens are given out in all until `allow` is
    called. ``ready`` is what `is_ready` says. What happened is in ``submitted``, ``finished``,
    ``failed``, ``aborted``, ``stopped`` (choices ended by `stop_choice`) and ``commands``.
    """

    def __init__(
        self,
        card: ModelCard,
        *,
        script: Script = repeat_prompt,
        fail_before: Exception | None = None,
        fail_after: tuple[int, Exception] | None = None,
        permits: int | None = None,
    ) -> None:
        self.card = card
        self.faults: FaultHooks | None = None
        self.script = script
        self.fail_before = fail_before
        self.fail_after = fail_after
        self.ready = True
        self.submitted: list[Request] = []
        self.finished: list[RequestId] = []
        self.failed: list[RequestId] = []
        self.aborted: list[RequestId] = []
        self.stopped: list[tuple[RequestId, int]] = []
        self.commands: list[Command] = []
        self._permits = None if permits is None else asyncio.Semaphore(permits)
        self._events: dict[RequestId, list[LifeEvent]] = {}
        self._news = asyncio.Event()

    # --- the Gateway protocol ---------------------------------------------------------------

    async def submit(self, request: Request) -> AsyncIterator[TokenDelta]:
        """Tokens of all choices in turn, as the script has them."""
        request_id = request.request_id
        self.submitted.append(request)
        whose = {"tenant": request.tenant} if request.tenant else {}
        num_prompt_tokens = len(request.prompt_token_ids)
        self._log(request_id, LifeName.SUBMITTED, prompt_tokens=num_prompt_tokens, **whose)
        running = set(range(request.num_choices))
        outcome = self.aborted
        try:
            num_tokens = 0
            for delta in self._deltas(request):
                await self._permit()
                self._fail(num_tokens)
                if (request_id, delta.choice) in self.stopped:
                    continue
                if num_tokens == 0:
                    self._log(request_id, LifeName.FIRST_TOKEN)
                num_tokens += 1
                if delta.finish is not None:
                    running.remove(delta.choice)
                yield delta
            self._fail(num_tokens)
            running.clear()
        except Exception:
            outcome = self.failed
            raise
        finally:
            running -= {choice for stopped_id, choice in self.stopped if stopped_id == request_id}
            if outcome is self.aborted and not running:
                outcome = self.finished
            outcome.append(request_id)
            ended_well = outcome is self.finished
            self._log(request_id, LifeName.FINISHED if ended_well else LifeName.FAILED)

    def stop_choice(self, request_id: RequestId, choice: int) -> None:
        self.stopped.append((request_id, choice))
        self._tell()

    def cluster(self) -> Mapping[str, Any]:
        return {"workers": [{"id": "fake-0", "role": "mixed", "home_role": "mixed"}]}

    def traffic(self) -> Mapping[str, Any]:
        requests = [{"prompt_tokens": len(r.prompt_token_ids)} for r in self.submitted]
        return {"model": self.card.name, "workers": [], "requests": requests}

    async def command(self, asked: Command) -> str:
        if asked.worker != "fake-0":
            raise NotFoundError(f"no worker {asked.worker} is up", "worker")
        if isinstance(asked, ChangeRole) and asked.expected_epoch not in (None, 0):
            raise ConflictError(f"the role epoch of {asked.worker} is 0", "epoch")
        self.commands.append(asked)
        return "done"

    def timeline(self, request_id: RequestId) -> tuple[LifeEvent, ...] | None:
        events = self._events.get(request_id)
        return None if events is None else tuple(events)

    def is_ready(self) -> bool:
        return self.ready

    def metrics_text(self) -> bytes:
        return (
            "# HELP pdserve:fake_requests_total Requests submitted to the fake gateway.\n"
            "# TYPE pdserve:fake_requests_total counter\n"
            f"pdserve:fake_requests_total {len(self.submitted)}\n"
        ).encode()

    # --- for those who watch it -------------------------------------------------------------

    @property
    def num_running(self) -> int:
        """Requests submitted and not ended."""
        return len(self.submitted) - len(self.finished) - len(self.failed) - len(self.aborted)

    def allow(self, num_tokens: int) -> None:
        """Let so many more tokens out."""
        assert self._permits is not None, "only a gateway made with permits waits for them"
        for _ in range(num_tokens):
            self._permits.release()

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something that happened here has made ``is_so`` true."""
        while not is_so():
            await self._news.wait()

    # --- inside -----------------------------------------------------------------------------

    async def _permit(self) -> None:
        if self._permits is None:
            await asyncio.sleep(0)  # as a real gateway, let others run between tokens
        else:
            await self._permits.acquire()

    def _fail(self, num_tokens: int) -> None:
        if self.fail_before is not None:
            raise self.fail_before
        if self.fail_after is not None and num_tokens == self.fail_after[0]:
            raise self.fail_after[1]

    def _deltas(self, request: Request) -> Iterator[TokenDelta]:
        choices = [self._choice(request, choice) for choice in range(request.num_choices)]
        for turn in itertools.zip_longest(*choices):
            yield from (delta for delta in turn if delta is not None)

    def _choice(self, request: Request, choice: int) -> Iterator[TokenDelta]:
        params, index = request.params, 0
        for token_id in self.script(request, choice):
            ends = token_id in params.ending_token_ids
            if ends and index < params.min_tokens:
                continue  # could not have been sampled
            finish = FinishReason.STOP if ends else None
            if finish is None and index + 1 == params.max_tokens:
                finish = FinishReason.LENGTH
            yield TokenDelta(
                request_id=request.request_id,
                epoch=Epoch(1),
                choice=choice,
                index=index,
                token_id=token_id,
                finish=finish,
                logprobs=self._logprobs(token_id, params.logprobs),
                prompt=self._prompt_news(request) if choice == index == 0 else None,
            )
            if finish is not None:
                return
            index += 1

    def _prompt_news(self, request: Request) -> PromptNews | None:
        num_top = request.params.prompt_logprobs
        if num_top is None:
            return None
        scores = [self._logprobs(token_id, num_top) for token_id in request.prompt_token_ids[1:]]
        return PromptNews(logprobs=tuple(score for score in scores if score is not None))

    def _logprobs(self, token_id: int, num_top: int | None) -> TokenLogprobs | None:
        """The chosen token is the likeliest, its neighbours in the vocabulary follow."""
        if num_top is None:
            return None
        top = ((token_id + i) % self.card.vocab_size for i in range(num_top))
        return TokenLogprobs(-0.5, 1, tuple((t, -0.5 - i) for i, t in enumerate(top)))

    def _log(self, request_id: RequestId, name: LifeName, **values: Scalar) -> None:
        event = LifeEvent(
            name=name,
            request_id=request_id,
            epoch=Epoch(1),
            at_s=time.monotonic(),
            node=GATEWAY,
            detail=detail(**values),
        )
        self._events.setdefault(request_id, []).append(event)
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
