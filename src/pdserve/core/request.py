"""What a client asked for (`Request`) and what a worker is told to do about it (`Job`)."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from math import inf

from pdserve.core.ids import AttemptId, Epoch, RequestId, WorkerId
from pdserve.core.token_ids import TokenIds
from pdserve.core.values import value


class RoutePreference(StrEnum):
    """The client's wish in ``X-Pdserve-Route``."""

    AUTO = "auto"
    SPLIT = "split"
    LOCAL = "local"


class Role(StrEnum):
    """What the router sends a worker. A routing fact: every native worker can do both phases."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@value(kw_only=True)
class ServiceClass:
    """What a kind of request is promised. Bounds are seconds; infinite: none is promised.

    ``weight`` is the class's share of the server while classes compete: one of weight 2 gets twice
    the tokens of one of weight 1.
    """

    name: str = "default"
    ttft_s: float = inf
    tpot_s: float = inf
    weight: float = 1.0

    @property
    def is_bounded(self) -> bool:
        """True if it is promised anything."""
        return self.ttft_s < inf or self.tpot_s < inf


DEFAULT_SERVICE = ServiceClass()


class FinishReason(StrEnum):
    """Why a choice ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class ConstraintKind(StrEnum):
    """In which language a `Constraint` is written."""

    JSON = "json"
    """A JSON schema."""
    REGEX = "regex"
    """A regular expression that matches the whole answer."""
    CHOICE = "choice"
    """A JSON list of strings, one of which is the answer."""
    GRAMMAR = "grammar"
    """A context-free grammar, in Lark's syntax or in GBNF."""


@value()
class Constraint:
    """What an answer is held to, token by token (``text.structured``).

    Which tokens may come next is a function of this and of the answer's tokens so far, so a
    hand-off or a resume carries no other state.
    """

    kind: ConstraintKind
    text: str


@value(kw_only=True)
class SamplingParams:
    """How tokens are drawn. Validated at the edge; a worker trusts it.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. ``seed`` is
    always set: the edge draws one for a request without. Token i of choice c uses random number
    f(seed, c, i), so that a resume needs no generator state. ``logprobs`` is the number of most
    likely tokens to report beside the chosen one (None: report nothing); ``prompt_logprobs`` is the
    same for the prompt's tokens, which are then computed and not read from a prefix cache.
    ``stop_token_ids`` holds what the client gave, ``eos_token_ids`` what the model has;
    ``ignore_eos`` disables the latter. Neither can end a choice before ``min_tokens``, and none of
    them can then be sampled.

    With a ``constraint`` an ending token is sampled only where the answer may end, and where it
    must end, one is sampled (and ends it) whatever ``min_tokens`` and ``ignore_eos`` say.
    """

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None

    @property
    def ending_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a choice."""
        if self.ignore_eos and self.constraint is None:
            return self.stop_token_ids
        return self.stop_token_ids + self.eos_token_ids

    def without_scores(self) -> SamplingParams:
        """For a worker that only decodes: it takes of the prompt what it has."""
        return self if self.prompt_logprobs is None else replace(self, prompt_logprobs=None)

    @property
    def needs_history(self) -> bool:
        """True if sampling must see the ids of earlier tokens."""
        return self.constraint is not None or self.has_penalties

    @property
    def has_penalties(self) -> bool:
        """True if earlier tokens change the logits of their likes."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


@value(kw_only=True)
class Request:
    """One prompt with its parameters, as the gateway submits it to the router.

    ``tenant`` names whose request it is (of API keys: a digest), for fairness between them.
    ``oracle_output_tokens`` is how long the answer will be, which only a simulation knows, and only
    a policy that imitates one that knows may read (``policy.splitwisesim``).
    """

    request_id: RequestId
    prompt_token_ids: TokenIds
    params: SamplingParams
    num_choices: int = 1
    cache_salt: str = ""
    route: RoutePreference = RoutePreference.AUTO
    trace_context: str = ""
    service: ServiceClass = DEFAULT_SERVICE
    tenant: str = ""
    oracle_output_tokens: int | None = None

    @property
    def max_tokens_total(self) -> int:
        """Prompt and answer of one choice, in tokens."""
        return len(self.prompt_token_ids) + self.params.max_tokens


@value(kw_only=True)
class Job:
    """One attempt, as the router hands it to a prefill worker.

    ``token_ids`` is the prompt followed by the tokens that the gateway has already taken, so a
    first try and a resume are the same thing. All ``choices`` share these tokens: choices that have
    diverged are resumed by jobs of their own. ``route_seq`` counts the jobs that the router has
    sent to this prefill worker (`LoadReport` repeats it). ``number``: of the request, in the order
    in which they came to the router. ``answer_tokens``: for so many output tokens of each choice
    the route has reserved room where it decodes; 0: for none.
    """

    request_id: RequestId
    epoch: Epoch
    choices: tuple[int, ...]
    token_ids: TokenIds
    num_prompt_tokens: int
    params: SamplingParams
    prefill_worker: WorkerId
    decode_worker: WorkerId
    cache_salt: str = ""
    trace_context: str = ""
    route_seq: int = 0
    number: int = 0
    answer_tokens: int = 0

    @property
    def attempt(self) -> AttemptId:
        return AttemptId(self.request_id, self.epoch)

    def sent(self, choices: tuple[int, ...], route_seq: int) -> Job:
        """The same for these choices, with its number."""
        return Job(
            request_id=self.request_id,
            epoch=self.epoch,
            choices=choices,
            token_ids=self.token_ids,
            num_prompt_tokens=self.num_prompt_tokens,
            params=self.params,
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
            cache_salt=self.cache_salt,
            trace_context=self.trace_context,
            route_seq=route_seq,
            number=self.number,
            answer_tokens=self.answer_tokens,
        )

    @property
    def is_local(self) -> bool:
        """True if both phases run on one worker and nothing is handed off."""
        return self.prefill_worker == self.decode_worker

    @property
    def next_index(self) -> int:
        """Index of the next output token of each choice."""
        return len(self.token_ids) - self.num_prompt_tokens
