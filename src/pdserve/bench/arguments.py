"""The flags of ``pdserve bench``, and the options that they make."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from pdserve.bench.options import DEFAULT_URL, ROUTES, LoadOptions, OutputOptions, TargetOptions
from pdserve.bench.scenario import FaultOptions
from pdserve.core.errors import ConfigError
from pdserve.workload.arguments import add_contents, add_times, check_numbers, workload_options
from pdserve.workload.scenario import read_scenario
from pdserve.workload.slo import parse_slo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags, in groups. Their names are the fields of the options."""
    _add_target(parser.add_argument_group("the server"))
    _add_load(parser.add_argument_group("what is sent"))
    _add_times(parser.add_argument_group("when it is sent"))
    _add_faults(parser.add_argument_group("what goes wrong"))
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
    add_contents(group)
    add = group.add_argument
    add("--prompt", choices=("ids", "words"), default="ids", help="send token ids, or text")
    add("--vocab-size", type=int, default=16000, metavar="N", help="token ids are below N")
    add("--warmup", type=int, default=0, metavar="N", help="send N others first, not measured")


def _add_times(group: argparse._ArgumentGroup) -> None:
    add_times(group)
    group.add_argument("--concurrency", type=int, metavar="C", help="at most C requests in flight")


def _add_faults(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--scenario",
        type=Path,
        metavar="FILE",
        help="kills, hangs and link faults to do to the server meanwhile (docs/failures.md)",
    )
    add(
        "--check-answers",
        action="store_true",
        help="send each answered request again afterwards, and compare",
    )


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
    check_numbers(parsed, above_0=_ABOVE_0, from_0=_FROM_0)
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
        digests=parsed.check_answers,
    )
    output = OutputOptions(
        slo=parse_slo(parsed.goodput) if parsed.goodput else None,
        json=parsed.json,
        with_requests=parsed.save_requests,
        plot=parsed.plot,
        progress=not parsed.no_progress,
    )
    return target, _load_options(parsed), output


def faults_of(parsed: argparse.Namespace) -> FaultOptions | None:
    """What is to go wrong, None if nothing is. Raises `ConfigError`."""
    if parsed.scenario is None:
        if parsed.check_answers:
            raise ConfigError("--check-answers needs --scenario FILE")
        return None
    return FaultOptions(
        scenario=read_scenario(parsed.scenario),
        check_answers=parsed.check_answers,
        slo=parse_slo(parsed.goodput) if parsed.goodput else None,
    )


def _load_options(parsed: argparse.Namespace) -> LoadOptions:
    workload = workload_options(parsed)
    shared = {part.name: getattr(workload, part.name) for part in fields(workload)}
    return LoadOptions(**shared, concurrency=parsed.concurrency, warmup=parsed.warmup)


_ABOVE_0 = ("vocab_size", "concurrency", "timeout")
_FROM_0 = ("warmup", "temperature")


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
