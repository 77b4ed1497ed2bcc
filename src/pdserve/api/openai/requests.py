"""From a valid body to requests: what depends on the model, the settings and the headers.

Nothing here generates. The result is an `Order`: the requests, one per prompt, and how their tokens
are to be told to the client.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest

from pdserve.api.callers import caller_of, reserve_tokens, salt_of, service_of
from pdserve.api.gateway import ModelCard
from pdserve.api.middleware import CLIENT_REQUEST_ID
from pdserve.api.openai.schema import GenerationBody
from pdserve.api.openai.tools import ToolUse
from pdserve.api.request_ids import check_request_id
from pdserve.api.settings import ApiSettings
from pdserve.core.errors import ContextLengthError, NotFoundError, RequestError
from pdserve.core.ids import RequestId
from pdserve.core.request import Request, RoutePreference, SamplingParams

ROUTE_HEADER = "X-Pdserve-Route"
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM: dividing by them would overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """How the tokens of a choice become what the client sees; the same for all choices.

    ``num_top_logprobs`` is the number of most likely tokens beside the chosen one, None for no
    log-probabilities at all. ``with_prompt_logprobs``: the prompt's are reported in a field of
    their own. ``drops_answer``: only the prompt is of interest. ``continues_text``: the answer goes
    on in the middle of a text. ``tools``: calls of tools are looked for in it.
    """

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    continues_text: bool = False
    with_token_ids: bool = False
    num_top_logprobs: int | None = None
    with_prompt_logprobs: bool = False
    drops_answer: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    tools: ToolUse | None = None

    @property
    def reason_of_calls(self) -> str:
        """Why a choice that has called tools has ended: of a tool that the client has named this is
        ``stop``, as OpenAI has it."""
        return "stop" if self.tools is not None and self.tools.named else "tool_calls"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One HTTP request: its requests (one per prompt, all with ``n`` choices) and its options."""

    name: str
    response_id: str
    requests: tuple[Request, ...]
    options: OutputOptions
    stream: bool

    @property
    def num_choices(self) -> int:
        return self.requests[0].num_choices


def check_model(model: str | None, card: ModelCard) -> None:
    """Raises `NotFoundError` for a model that is not the served one."""
    if model is not None and model != card.name:
        raise NotFoundError(
            f"the model {model!r} is not served here; the served model is {card.name!r}", "model"
        )


def check_vocabulary(token_ids: Sequence[int], card: ModelCard, param: str) -> None:
    """Raises `RequestError` for the first id outside the vocabulary."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < card.vocab_size:
        bad = next(t for t in token_ids if not 0 <= t < card.vocab_size)
        raise RequestError(
            f"{param}: token id {bad} is outside the vocabulary of {card.vocab_size} tokens", param
        )


def output_options(
    body: GenerationBody,
    settings: ApiSettings,
    num_top_logprobs: int | None,
    param: str,
    *,
    continues_text: bool,
) -> OutputOptions:
    """Raises `RequestError` for a value beyond a limit; ``param`` names the logprobs field."""
    if num_top_logprobs is not None and num_top_logprobs > settings.max_logprobs:
        raise RequestError(
            f"{param} is {num_top_logprobs}; at most {settings.max_logprobs} are served", param
        )
    of_prompt = body.prompt_logprobs
    if of_prompt is not None and of_prompt > settings.max_logprobs:
        raise RequestError(
            f"prompt_logprobs is {of_prompt}; at most {settings.max_logprobs} are served",
            "prompt_logprobs",
        )
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if len(stops) > settings.max_stops:
        raise RequestError(f"stop: at most {settings.max_stops} stop strings are served", "stop")
    for stop in stops:
        if not 0 < len(stop) <= settings.max_stop_chars:
            raise RequestError(
                f"stop: a stop string has 1 to {settings.max_stop_chars} characters", "stop"
            )
    usage = body.stream_options
    return OutputOptions(
        stops=stops,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        continues_text=continues_text,
        with_token_ids=body.return_token_ids,
        num_top_logprobs=num_top_logprobs,
        with_prompt_logprobs=of_prompt is not None,
        drops_answer=body.max_tokens == 0,
        include_usage=usage is not None and usage.include_usage,
        continuous_usage=(
            usage is not None and usage.include_usage and usage.continuous_usage_stats
        ),
    )


def answer_tokens(
    num_prompt_tokens: int, wanted: int | None, default: int | None, card: ModelCard, param: str
) -> int:
    """The ``max_tokens`` of one prompt: what was asked for, else ``default``, else all that fits.

    Raises `ContextLengthError` if the prompt (field ``param``) leaves no room, or less than was
    asked for.
    """
    limit, room = card.max_model_tokens, card.max_model_tokens - num_prompt_tokens
    if room < 1:
        raise ContextLengthError(
            f"this model's maximum context length is {limit} tokens, and the prompt alone has "
            f"{num_prompt_tokens}, which leaves no room for an answer: shorten the prompt",
            param,
        )
    if wanted is None:
        return room if default is None else min(default, room)
    if wanted > room:
        raise ContextLengthError(
            f"this model's maximum context length is {limit} tokens, but {num_prompt_tokens} in "
            f"the prompt and {wanted} in the answer make {num_prompt_tokens + wanted}: shorten the "
            f"prompt or ask for at most {room}",
            param,
        )
    return wanted


def sampling_params(
    body: GenerationBody,
    card: ModelCard,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Parameters of one prompt. A seed is drawn if the client gave none; ``prompt_logprobs``: so
    many are wanted for another reason than the body's field."""
    of_prompt = [n for n in (body.prompt_logprobs, prompt_logprobs) if n is not None]
    check_vocabulary(body.stop_token_ids, card, "stop_token_ids")
    check_vocabulary(tuple(body.logit_bias), card, "logit_bias")
    if body.min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens is {body.min_tokens}, more than the {max_tokens} tokens that the answer "
            "may have",
            "min_tokens",
        )
    return SamplingParams(
        max_tokens=max_tokens,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        min_tokens=body.min_tokens,
        temperature=0.0 if body.temperature < _GREEDY_BELOW else body.temperature,
        top_p=body.top_p,
        top_k=body.top_k if 0 < body.top_k < card.vocab_size else 0,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=tuple(sorted(body.logit_bias.items())),
        stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids)),
        eos_token_ids=card.eos_token_ids,
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=max(of_prompt, default=None),
    )


def client_request_id(request: HttpRequest, body: GenerationBody) -> str | None:
    """The client's name for the request: the header's, else the body's. Raises `RequestError`."""
    from_header: str | None = request.scope[CLIENT_REQUEST_ID]
    if from_header is not None or body.request_id is None:
        return from_header
    return check_request_id(body.request_id, "request_id")


def check_choices(num_prompts: int, n: int, settings: ApiSettings) -> None:
    """Raises `RequestError` if the prompts and their choices are too many for one HTTP request."""
    if num_prompts * n > settings.max_choices:
        raise RequestError(
            f"n is {n} for {num_prompts} prompt(s); one HTTP request may ask for at most "
            f"{settings.max_choices} choices in all",
            "n",
        )


def make_requests(
    ids: Sequence[RequestId],
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    body: GenerationBody,
    http: HttpRequest,
    settings: ApiSettings,
) -> tuple[Request, ...]:
    """One request per prompt, in order. Their tokens count for the caller from here on."""
    route = _route(http.headers.get(ROUTE_HEADER))
    service = service_of(http, settings.classes)
    tenant = caller_of(http).tenant
    salt = salt_of(http, body.cache_salt, per_key=settings.salt_per_key)
    trace_context = http.headers.get("traceparent", "")
    if _TRACEPARENT.fullmatch(trace_context) is None:
        trace_context = ""  # W3C Trace Context 3.2: a broken one counts as none
    requests = tuple(
        Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            params=prompt_params,
            num_choices=body.n,
            cache_salt=salt,
            route=route,
            trace_context=trace_context,
            service=service,
            tenant=tenant,
        )
        for request_id, prompt, prompt_params in zip(ids, prompts, params, strict=True)
    )
    reserve_tokens(http, sum(map(_most_tokens, requests)))
    return requests


def _most_tokens(request: Request) -> int:
    """Of the prompt, and of all choices if each is as long as it may be."""
    return len(request.prompt_token_ids) + request.num_choices * request.params.max_tokens


def _route(header: str | None) -> RoutePreference:
    if header is None:
        return RoutePreference.AUTO
    try:
        return RoutePreference(header.strip().lower())
    except ValueError:
        choices = ", ".join(preference.value for preference in RoutePreference)
        raise RequestError(
            f"the header {ROUTE_HEADER} is {header!r}; it may be one of: {choices}", ROUTE_HEADER
        ) from None
