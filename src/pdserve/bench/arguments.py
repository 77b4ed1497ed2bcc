"""The flags of ``pdserve bench``, and the options that they make."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from pdserve.bench.options import DEFAULT_URL, ROUTES, LoadOptions, OutputOptions, TargetOptions
from pdserve.core.errors import ConfigError
from pdserve.workload.arrivals import KINDS
from pdserve.workload.slo import parse_slo
from pdserve.workload.traces import READERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags, in groups. Their names are the fields of the options."""
    _add_target(parser.add_argument_group("the server"))
    _add_load(parser.add_argument_group("what is sent"))
    _add_times(parser.add_argument_group("when it is sent"))
    _add_output(parser.add_argument_group("what is shown"))


def _add_target(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--url", default=DEFAULT_URL, help="where it listens (default: %(default)s)")
    add("--endpoint", choices=tuple(ROUTES), default="completions", help="which route to use")
    add("--model", metavar="NAME", help="default: the first that the server names")
    add("--api-key", metavar="KEY", help="default: $PDSERVE_API_KEY, then $OPENAI_API_KEY")
    add(
        "--header", action="append", default=[], metavar="NAME:VALUE", help="sent with each request"
    )
    add("--timeout", type=float, default=600.0, metavar="S", help="for one request, in seconds")
    add("--temperature", type=float, default=0.0, metavar="T", help="default: 0 (greedy)")
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="answers are as long as asked for (default; not part of OpenAI's own API)",
    )
    add("--return-token-ids", action="store_true", help="have the server send token ids as well")
    add("--extra-body", default="{}", metavar="JSON", help="fields to add to each request's body")


def _add_load(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-n", "--num-requests", type=int, metavar="N", help="default: 100, or the whole trace")
    add("--input", default="512", metavar="LENGTH", help="prompt tokens (default: 512)")
    add(
        "--output",
        default="128",
        metavar="LENGTH",
        help="answer tokens (default: 128); a LENGTH is 512, 128:1024 (even), exp:MEAN or "
        "lognormal:MEDIAN:SIGMA",
    )
    add("--prefix-groups", type=int, default=0, metavar="G", help="prompts begin with one of G ...")
    add("--prefix-tokens", type=int, default=0, metavar="P", help="... prefixes of P tokens")
    add("--trace", type=Path, metavar="FILE", help="send what this trace has")
    add("--trace-kind", choices=tuple(READERS), help="default: told by its first line")
    add("--max-input", type=int, metavar="N", help="leave out a trace's longer prompts")
    add("--max-output", type=int, metavar="N", help="cut a trace's longer answers")
    add("--prompt", choices=("ids", "words"), default="ids", help="send token ids, or text")
    add("--vocab-size", type=int, default=16000, metavar="N", help="token ids are below N")
    add("--warmup", type=int, default=0, metavar="N", help="send N others first, not measured")
    add("--cancel-rate", type=float, default=0.0, metavar="P", help="share of clients that leave")
    add("--cancel-after", type=float, metavar="S", help="... S seconds after sending")
    add("--seed", type=int, default=0, help="of everything random (default: 0)")


def _add_times(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--concurrency", type=int, metavar="C", help="at most C requests in flight")
    add("--rate", type=float, metavar="R", help="requests per second; inf: all at once")
    add("--arrivals", choices=(*KINDS, "trace"), help="default: told by the other flags")
    add("--burstiness", type=float, metavar="B", help="gamma arrivals; 1: Poisson, less: burstier")
    add("--rate-scale", type=float, default=1.0, metavar="X", help="replay a trace X times as fast")
    add("--window", metavar="START:END", help="only this part of a trace, in seconds")
    add(
        "--smear",
        action=argparse.BooleanOptionalAction,
        help="spread requests with one time stamp (default: if most of the trace has shared ones)",
    )
    add("--duration", type=float, metavar="S", help="send for S seconds")


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--goodput", nargs="+", metavar="SLO", help="objectives in ms, as ttft:200 tpot:50 e2e:4000"
    )
    add("--json", metavar="FILE", help="write one JSON document; -: on stdout and nothing else")
    add("--save-requests", action="store_true", help="the document also has every request")
    add("--plot", type=Path, metavar="DIR", help="write the distributions there, as SVG")
    add("--no-progress", action="store_true", help="no progress bar")


def options_of(parsed: argparse.Namespace) -> tuple[TargetOptions, LoadOptions, OutputOptions]:
    """Raises `ConfigError` for a value that cannot be."""
    _check_numbers(parsed)
    environment = os.environ
    key = environment.get("PDSERVE_API_KEY") or environment.get("OPENAI_API_KEY")
    target = TargetOptions(
        url=parsed.url,
        endpoint=parsed.endpoint,
        model=parsed.model,
        api_key=parsed.api_key or key,
        headers=_headers(parsed.header),
        prompt=parsed.prompt,
        vocab_size=parsed.vocab_size,
        temperature=parsed.temperature,
        ignore_eos=parsed.ignore_eos,
        return_token_ids=parsed.return_token_ids,
        extra_body=_extra_body(parsed.extra_body),
        timeout_s=parsed.timeout,
        seed=parsed.seed,
    )
    output = OutputOptions(
        slo=parse_slo(parsed.goodput) if parsed.goodput else None,
        json=parsed.json,
        with_requests=parsed.save_requests,
        plot=parsed.plot,
        progress=not parsed.no_progress,
    )
    return target, _load_options(parsed), output


def _load_options(parsed: argparse.Namespace) -> LoadOptions:
    return LoadOptions(
        trace=parsed.trace,
        trace_kind=parsed.trace_kind,
        window_s=_window(parsed.window),
        smear=parsed.smear,
        rate_scale=parsed.rate_scale,
        input_tokens=parsed.input,
        output_tokens=parsed.output,
        max_input_tokens=parsed.max_input,
        max_output_tokens=parsed.max_output,
        prefix_groups=parsed.prefix_groups,
        prefix_tokens=parsed.prefix_tokens,
        arrivals=parsed.arrivals,
        rate=parsed.rate,
        burstiness=parsed.burstiness,
        concurrency=parsed.concurrency,
        num_requests=parsed.num_requests,
        duration_s=parsed.duration,
        warmup=parsed.warmup,
        cancel_rate=parsed.cancel_rate,
        cancel_after_s=parsed.cancel_after,
        seed=parsed.seed,
    )


_ABOVE_0 = (
    "num_requests", "max_input", "max_output", "vocab_size", "concurrency", "timeout", "rate_scale",
    "duration",
)  # fmt: skip
_FROM_0 = ("prefix_groups", "prefix_tokens", "warmup", "temperature", "cancel_rate", "cancel_after")


def _check_numbers(parsed: argparse.Namespace) -> None:
    for name in (*_ABOVE_0, *_FROM_0):
        value = getattr(parsed, name)
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (name in _ABOVE_0 and value == 0):
            least = "above 0" if name in _ABOVE_0 else "0 or more"
            raise ConfigError(f"{flag} is {value:g}: give a number {least}")
    if parsed.cancel_rate > 1:
        raise ConfigError(f"--cancel-rate is {parsed.cancel_rate:g}: it is a share, 0 to 1")


def _headers(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    headers = []
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or not name.strip() or "\n" in text or "\r" in text:
            raise ConfigError(f"--header {text!r}: write NAME:VALUE")
        headers.append((name.strip(), value.strip()))
    return tuple(headers)


def _extra_body(text: str) -> dict[str, object]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError('--extra-body is a JSON object, as {"top_k": 5}')
    return document


def _window(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    start, _, end = text.partition(":")
    try:
        window_s = (float(start or 0), float(end or math.inf))
    except ValueError:
        window_s = (0.0, 0.0)
    if not 0 <= window_s[0] < window_s[1]:
        raise ConfigError(f"--window {text!r}: write START:END in seconds, as 600:900")
    return window_s
