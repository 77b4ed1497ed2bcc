"""What a calibration asks of a server: requests that show every kind of step on its own.

A round has four parts: prompts of many lengths, one after the other; batches that decode, of one
sequence and more, with short and with long contexts; prompts that come while others decode on the
same worker; and free loads, a light and a heavy one, that mix everything as clients do, since what
workers cost each other is seen where all of them have work, and how long steps take in operation is
seen where it is operated. Half of the time is theirs. Rounds are repeated with other lengths,
so that a machine that drifts is seen drifting. How much fits into a round is judged by two probes
of how fast the server is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from pdserve.workload.request import TraceRequest, own_segment

LEAST_PROMPT = 8
MOST_PROMPT = 2048
LEAST_LENGTHS = 8
BATCHES = (1, 2, 4, 8, 16, 32)
SHORT_CONTEXT = 32
LOAD = "load"
"""The name of the stages that are free loads."""
DECODED = (24, 96)
"""Fewest and most tokens that a batch decodes together."""
SHARES = {"prompts": 0.15, "batches": 0.2, "mixed": 0.15, LOAD: 0.5}
"""Of a round's time."""
DECODING = (2, 6, 12)
"""Sequences beside which prompts come."""
BETWEEN = (64, 512, 200, 32, 320)
"""Those prompts' tokens."""
BUSY = (0.4, 0.8)
"""How much of what the server could do the free loads ask for."""
LOAD_BATCH = 8
"""Sequences that a free load decodes together: a guess."""
BATCH_GROWTH = 0.03
"""A step's cost of another sequence, as a share of a step: a guess that only places the budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast a server is, roughly: seconds for a token of a prompt, and for a decode step."""

    prompt_token_s: float
    decode_s: float

    def prompt_s(self, tokens: int) -> float:
        return self.prompt_token_s * tokens

    def batch_s(self, num_sequences: int, tokens: int) -> float:
        """To decode so many tokens of each of so many sequences together."""
        return tokens * self.decode_s * (1.0 + BATCH_GROWTH * num_sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the server holds: the longest request, and the KV of one worker, in tokens. ``workers``:
    how many share the load."""

    longest_tokens: int
    pool_tokens: int
    workers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Requests that are sent at their times, or, if ``in_turn``, each when the one before it has
    ended. ``route``: what is asked of the router."""

    name: str
    requests: tuple[TraceRequest, ...]
    in_turn: bool = False
    route: str = "auto"


class Design:
    """Makes the stages. The same seed and pace make the same ones."""

    def __init__(self, limits: Limits, seed: int, *, splits: bool) -> None:
        """``splits``: the server has workers to hand over to."""
        self._limits = limits
        self._random = random.Random(f"{seed}/calibrate")
        self._numbers = count()
        self._splits = splits
        self._longest = max(LEAST_PROMPT, min(MOST_PROMPT, limits.longest_tokens - DECODED[1]))

    def probes(self) -> Iterator[Stage]:
        """To be sent first: the second and third say how fast the server is."""
        for tokens in (self._longest // 4, self._longest // 4, self._longest):
            yield self._stage("probe", [(0.0, tokens, 8)], in_turn=True)

    def round(self, pace: Pace, budget_s: float) -> Iterator[Stage]:
        """The stages of one round, of about ``budget_s`` seconds."""
        yield self._prompts(pace, budget_s * SHARES["prompts"])
        yield from self._batches(pace, budget_s * SHARES["batches"])
        yield from self._mixed(pace, budget_s * SHARES["mixed"])
        for busy in BUSY:
            yield self._load(pace, budget_s * SHARES[LOAD] / len(BUSY), busy)

    # --- inside -------------------------------------------------------------------------------

    def _prompts(self, pace: Pace, budget_s: float) -> Stage:
        """Lengths spread evenly over their logarithm, the longest and the shortest among them."""
        longest = min(self._longest, max(LEAST_PROMPT, int(0.4 * budget_s / pace.prompt_token_s)))
        lengths = [longest]
        spent_s = pace.prompt_s(longest)
        while len(lengths) < LEAST_LENGTHS or (spent_s < budget_s and len(lengths) < 64):
            length = self._length(longest)
            lengths.append(length)
            spent_s += pace.prompt_s(length) + 2 * pace.decode_s
        self._random.shuffle(lengths)
        return self._stage("prompts", [(0.0, n, 2) for n in lengths], in_turn=True)

    def _batches(self, pace: Pace, budget_s: float) -> Iterator[Stage]:
        """Batches as large as the budget and the pool allow, of short and of long contexts."""
        sizes = [n for n in BATCHES if self._fits(n, SHORT_CONTEXT + DECODED[0])]
        each_s = budget_s / (2 * len(sizes) or 1)
        for num in sizes:
            for context in (SHORT_CONTEXT, self._context(pace, num, each_s)):
                left_s = each_s - num * pace.prompt_s(context)
                decoded = int(left_s / pace.batch_s(num, 1))
                decoded = min(max(decoded, DECODED[0]), DECODED[1])
                if not self._fits(num, context + decoded):
                    continue
                lengths = [(0.0, self._near(context), decoded) for _ in range(num)]
                yield self._stage("batches", lengths)

    def _mixed(self, pace: Pace, budget_s: float) -> Iterator[Stage]:
        """A few that decode on one worker, and prompts that come in between."""
        longest = self._longest // 4
        prompts = [min(tokens, longest) for tokens in BETWEEN]
        each_s = budget_s / len(DECODING)
        for num in DECODING:
            decoded = min(max(int(each_s / pace.batch_s(num, 1)), 2 * DECODED[0]), 2 * DECODED[1])
            if not self._fits(num + 1, SHORT_CONTEXT + decoded):
                continue
            requests = [(0.0, self._near(SHORT_CONTEXT), decoded) for _ in range(num)]
            gap_s = pace.batch_s(num, decoded) / (len(prompts) + 1)
            requests += [
                (gap_s * (place + 1), self._near(prompt), 2) for place, prompt in enumerate(prompts)
            ]
            yield self._stage("mixed", requests, route="local" if self._splits else "auto")

    def _load(self, pace: Pace, budget_s: float, busy: float) -> Stage:
        """Arrivals as of a Poisson process; lengths of all sizes."""
        longest = max(LEAST_PROMPT + 1, self._longest // 2)
        fewest, most = DECODED[0] // 2, DECODED[1]
        mean_prompt = (longest - LEAST_PROMPT) / math.log(longest / LEAST_PROMPT)
        prompt_s = pace.prompt_s(round(mean_prompt))
        decode_s = pace.batch_s(LOAD_BATCH, (fewest + most) // 2) / LOAD_BATCH
        cost_s = 2.0 * max(prompt_s, decode_s) if self._splits else prompt_s + decode_s
        rate = busy * self._limits.workers / max(cost_s, 1e-6)
        requests: list[tuple[float, int, int]] = []
        at_s = 0.0
        while at_s < budget_s and len(requests) < 400:
            output = self._random.randint(fewest, most)
            requests.append((at_s, self._length(longest), output))
            at_s += self._random.expovariate(rate)
        return self._stage(LOAD, requests)

    def _context(self, pace: Pace, num: int, budget_s: float) -> int:
        """A long context whose prompts take no more than half of the budget."""
        affordable = int(0.5 * budget_s / num / pace.prompt_token_s)
        room = self._limits.pool_tokens // (2 * num)
        return max(SHORT_CONTEXT, min(self._longest, affordable, room))

    def _fits(self, num: int, tokens: int) -> bool:
        return num * tokens <= 0.8 * self._limits.pool_tokens and tokens <= (
            self._limits.longest_tokens
        )

    def _length(self, longest: int) -> int:
        length = math.exp(self._random.uniform(math.log(LEAST_PROMPT), math.log(longest)))
        return max(1, round(length))

    def _near(self, tokens: int) -> int:
        """Lengths that are not all the same: up to a quarter less."""
        return max(1, tokens - self._random.randrange(1 + tokens // 4))

    def _stage(
        self,
        name: str,
        lengths: list[tuple[float, int, int]],
        *,
        in_turn: bool = False,
        route: str | None = None,
    ) -> Stage:
        requests = []
        for at_s, prompt, output in lengths:
            number = next(self._numbers)
            prompt = min(prompt, self._limits.longest_tokens - output)
            requests.append(
                TraceRequest(
                    index=number,
                    at_s=at_s,
                    segments=(own_segment(number, max(1, prompt)),),
                    output_tokens=output,
                )
            )
        if route is None:
            route = "split" if self._splits and name != LOAD else "auto"
        return Stage(name=name, requests=tuple(requests), in_turn=in_turn, route=route)
