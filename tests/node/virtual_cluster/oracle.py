"""What each request must answer, computed without any machine.

The KV of a token is modelled by a chained hash of it and of everything before it. A sampled token
is a function of (chain over the known tokens, seed, choice, index), so each request has exactly one
right answer, wherever and however it is computed.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from pdserve.core.ids import RequestId
from pdserve.core.request import (
    DEFAULT_SERVICE,
    FinishReason,
    Request,
    RoutePreference,
    SamplingParams,
    ServiceClass,
)

VOCABULARY = 24
EOS = 0
STOP = 1


@dataclass(frozen=True)
class Ask:
    """A request with its right answer, per choice. ``chains[c][i]``: KV of token i of choice c.

    ``poison``: every step in which one of its rows takes part breaks the engine. ``barren``: no
    token of this index can be drawn, in a step that is good.
    """

    request: Request
    answers: tuple[tuple[int, ...], ...]
    finishes: tuple[FinishReason, ...]
    tokens: tuple[tuple[int, ...], ...]
    chains: tuple[tuple[int, ...], ...]
    poison: bool = False
    barren: int | None = None

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id


def extend(chain: int, token_id: int) -> int:
    """KV of a token after the tokens that ``chain`` stands for. Never 0, which is garbage."""
    return hash((chain, token_id, 77)) or 1


def make_ask(
    request_id: str,
    prompt: tuple[int, ...],
    *,
    max_tokens: int = 4,
    num_choices: int = 1,
    seed: int = 1,
    salt: str = "",
    route: RoutePreference = RoutePreference.AUTO,
    eos: bool = False,
    min_tokens: int = 0,
    penalty: bool = False,
    poison: bool = False,
    longest_tokens: int = 1 << 30,
    service: ServiceClass = DEFAULT_SERVICE,
    tenant: str = "",
) -> Ask:
    """A request, and what it must answer. Without ``eos`` only its length ends a choice."""
    params = SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        min_tokens=min_tokens,
        stop_token_ids=(STOP,) if eos else (),
        eos_token_ids=(EOS,),
        ignore_eos=not eos,
        presence_penalty=1.0 if penalty else 0.0,
    )
    request = Request(
        request_id=RequestId(request_id),
        prompt_token_ids=prompt,
        params=params,
        num_choices=num_choices,
        cache_salt=salt,
        route=route,
        service=service,
        tenant=tenant,
    )
    choices = [_answer(request, choice, longest_tokens) for choice in range(num_choices)]
    answers = tuple(answer for answer, _, _ in choices)
    return Ask(
        request=request,
        answers=answers,
        finishes=tuple(finish for _, finish, _ in choices),
        tokens=tuple(prompt + answer for answer in answers),
        chains=tuple(chains for _, _, chains in choices),
        poison=poison,
    )


def _answer(
    request: Request, choice: int, longest_tokens: int
) -> tuple[tuple[int, ...], FinishReason, tuple[int, ...]]:
    params = request.params
    chain = zlib.crc32(request.cache_salt.encode()) + 1
    chains = []
    for token_id in request.prompt_token_ids:
        chain = extend(chain, token_id)
        chains.append(chain)
    answer: list[int] = []
    while True:
        index = len(answer)
        token_id = hash((chain, params.seed, choice, index)) % VOCABULARY
        if index < params.min_tokens and token_id in params.ending_token_ids:
            token_id = VOCABULARY - 1
        answer.append(token_id)
        chain = extend(chain, token_id)
        chains.append(chain)
        if index >= params.min_tokens and token_id in params.ending_token_ids:
            return tuple(answer), FinishReason.STOP, tuple(chains)
        num_tokens = len(request.prompt_token_ids) + len(answer)
        if len(answer) >= params.max_tokens or num_tokens >= longest_tokens:
            return tuple(answer), FinishReason.LENGTH, tuple(chains)
