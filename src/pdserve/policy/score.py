"""What a route would cost: the request itself, and those that are already there.

Each side of a route is estimated alone (`Scorer.prefill_side`, `Scorer.decode_side`); `Scorer.pair`
and `Scorer.local` join two estimates on what only the two together know: the link, and the prefix
that the decode worker has already. So the work grows with the number of workers looked at, and
only a few arithmetic operations with the number of pairs.

Before the first token a prompt waits for the prompts ahead of it, which a worker without decodes
computes in steps of ``max_step_tokens``. Beside running decodes it goes in chunks of
``mixed_chunk_tokens``, in steps that carry the decodes too: it takes longer, and each running
sequence gets its tokens later by what the chunks add to a step. That, and what the request's own
decode adds to the steps of its batch, is the harm that it does.

All times are expectations in seconds. What a view does not say is assumed: prompts that are queued,
and answers that are under way, are like those of this request, and whenever an answer ends on a
mixed worker another prompt takes its place. Splitting buys freedom from these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pdserve.core.ids import WorkerId
from pdserve.core.request import Role
from pdserve.cost.link import LinkModel
from pdserve.cost.step import StepModel
from pdserve.policy.cluster import Candidate, ClusterView, RouteAsk, WorkerView

NEUTRAL_STEPS = StepModel(
    prompt_base_s=5e-3,
    per_prompt_token_s=1e-4,
    per_pair_s=5e-9,
    decode_base_s=2e-2,
    per_sequence_s=1e-4,
    per_context_token_s=1e-7,
)
"""For a cluster in which no worker has a model of its steps: only the proportions matter then, and
they are those of a 7B model on one accelerator (Splitwise, figs. 5 and 6: a prompt of 1,000 tokens
takes as long as five decode steps, and batching decodes costs little)."""

MIN_STREAM_TOKENS = 32.0
"""Running answers are taken to be at least this long, however short this one may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How seconds of different kinds are compared.

    A score is a sum of seconds over requests: of this request's latency, and ``harm`` times the
    seconds that all others lose. At 0.5, because running answers are half done on average and so
    see half of what a whole answer would, and because a prompt that goes to a prefill worker
    instead delays those that come after it there, whom no view shows. At 1 decode workers stay
    idle beside a queue of prompts; at 0 a prompt goes into any batch.

    ``miss``: what a second beyond a bound of the SLO costs on top, among routes that all miss one.
    Routes that meet both bounds go first anyway. More than a few would let a request that is late
    in any case do any harm to be a little less so.

    ``margin_share`` and ``margin_s``: a route against the roles of its workers must be better than
    one that they are meant for by this share of its own time to the second token, and by at least
    this. 10% is about the error of fitted step models; below 2 ms are reporting delays.

    ``fetch_ratio`` and ``fetch_tokens``: a fetch is weighed where another worker knows more than
    ``fetch_ratio`` times the own prefix and ``fetch_tokens`` (Mooncake, FAST'25 sec. 6.2:
    kvcache_balancing_threshold). It keeps small gains from costing messages and link time.

    ``max_step_tokens``: most prompt tokens in a step, as workers are configured (Splitwise: 2,048).
    """

    harm: float = 0.5
    miss: float = 2.0
    margin_share: float = 0.1
    margin_s: float = 0.002
    fetch_ratio: float = 1.25
    fetch_tokens: int = 64
    max_step_tokens: int = 2048


@dataclass(slots=True)
class PrefillSide:
    """A worker, if it prefilled. ``caused_tpot_s``: time per token of the streams that decode
    there, if prompts kept coming as these streams end (0: there are none)."""

    view: WorkerView
    queue_s: float
    fetch_s: float
    prefill_s: float
    harm_s: float
    caused_tpot_s: float
    fetch_from: WorkerId | None = None
    fetch_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.fetch_s + self.prefill_s


@dataclass(slots=True)
class DecodeSide:
    """A worker, if it decoded. ``join_s``: until the step under way ends; ``blocks_s``: waiting for
    blocks. ``backlog_s``: it has prompts to compute for so long; a step takes ``mixed_step_s``
    while it does, and ``step_s`` afterwards, the prompts that keep coming to a mixed worker
    included."""

    view: WorkerView
    join_s: float
    blocks_s: float
    step_s: float
    harm_s: float
    backlog_s: float
    mixed_step_s: float


@dataclass(slots=True)
class Estimate:
    """Both sides joined. ``misses``: a bound of the SLO."""

    misses: bool
    score_s: float
    prefill: PrefillSide
    decode: DecodeSide
    exposed_s: float
    decode_wait_s: float
    tpot_s: float

    @property
    def is_local(self) -> bool:
        return self.prefill.view is self.decode.view

    @property
    def harm_s(self) -> float:
        return self.prefill.harm_s + self.decode.harm_s

    @property
    def rank(self) -> tuple[bool, float, bool, WorkerId, WorkerId]:
        """Order of candidates: the SLO, the score, no hand-off, ids."""
        prefill, decode = self.prefill.view, self.decode.view
        return (self.misses, self.score_s, prefill is not decode, prefill.worker, decode.worker)

    def candidate(self) -> Candidate:
        return Candidate(
            prefill=self.prefill.view.worker,
            decode=self.decode.view.worker,
            fetch_from=self.prefill.fetch_from,
            queue_s=self.prefill.queue_s,
            fetch_s=self.prefill.fetch_s,
            prefill_s=self.prefill.prefill_s,
            exposed_s=self.exposed_s,
            decode_wait_s=self.decode_wait_s,
            tpot_s=self.tpot_s,
            harm_s=self.harm_s,
            score_s=self.score_s,
        )


class Scorer:
    """One question to one view. ``decode_steps``: tokens that it is expected to decode after the
    first one, at least one if it may. ``cached``: tokens of its prefix by worker; the last prefill
    worker of a resume has them all, as far as is known."""

    def __init__(self, view: ClusterView, ask: RouteAsk, weights: Weights) -> None:
        self.view = view
        self.ask = ask
        self.weights = weights
        self.decode_steps = 0.0
        if ask.max_output_tokens > 1:
            self.decode_steps = max(1.0, min(ask.output_tokens, ask.max_output_tokens) - 1.0)
        self.cached: Mapping[WorkerId, int] = ask.cached_tokens
        last = ask.last_prefill
        if last is not None and last not in self.cached:
            self.cached = {**self.cached, last: ask.num_tokens}
        self._stream_tokens = max(self.decode_steps, MIN_STREAM_TOKENS)
        self._mean_length = ask.num_tokens + self.decode_steps / 2
        self._default_steps: StepModel | None = None

    @property
    def default_steps(self) -> StepModel:
        """For workers without a model: that of the first worker that has one, or else the neutral
        one."""
        if self._default_steps is None:
            known = [w.steps for w in self.view.workers if w.steps is not None]
            self._default_steps = known[0] if known else NEUTRAL_STEPS
        return self._default_steps

    def prefill_side(self, worker: WorkerView, holder: WorkerView | None = None) -> PrefillSide:
        """``holder`` has the longest match: its blocks are fetched if that is quicker."""
        steps, ask = worker.steps or self.default_steps, self.ask
        chunk, step_base_s, decode_step_s = self._prompt_steps(worker, steps)
        pending = worker.pending_tokens
        before = pending // chunk
        queue_s = self._pending_s(pending, before, step_base_s, steps) + decode_step_s / 2
        own = self.cached.get(worker.worker, 0)
        num_steps, alone_s = self._prompt_s(own, pending, chunk, steps)
        prefill_s = num_steps * step_base_s + alone_s
        fetch_s, fetch_from, fetch_tokens = 0.0, None, 0
        if holder is not None and holder is not worker:
            best = min(ask.cached_tokens[holder.worker], ask.num_tokens)
            if best > own * self.weights.fetch_ratio + self.weights.fetch_tokens:
                link = self._link(holder, worker)
                there_s = link.exposed_s((best - own) * self.view.token_bytes)
                num_fewer, fewer_s = self._prompt_s(best, pending, chunk, steps)
                if there_s + num_fewer * step_base_s + fewer_s < prefill_s:
                    num_steps, alone_s = num_fewer, fewer_s
                    prefill_s = num_steps * step_base_s + alone_s
                    fetch_s, fetch_from, fetch_tokens = there_s, holder.worker, best - own
        side = PrefillSide(worker, queue_s, fetch_s, prefill_s, 0.0, 0.0, fetch_from, fetch_tokens)
        streams = worker.num_decoding
        if streams:
            late_s = self._late_s(worker, num_steps, prefill_s, decode_step_s)
            side.harm_s = streams * late_s
            side.caused_tpot_s = decode_step_s + streams * late_s / self._stream_tokens
        return side

    def decode_side(self, worker: WorkerView) -> DecodeSide:
        steps, num_steps = worker.steps or self.default_steps, self.decode_steps
        streams, pending = worker.num_decoding, worker.pending_tokens
        drag_s = steps.per_sequence_s * streams + steps.per_context_token_s * worker.context_tokens
        mine_s = steps.per_sequence_s + steps.per_context_token_s * self._mean_length
        mine_s *= self.ask.num_choices
        step_s = steps.decode_base_s + drag_s + mine_s
        if streams and worker.role is Role.MIXED:
            chunk, base_s, alone_step_s = self._prompt_steps(worker, steps)
            known = self.cached.get(worker.worker, 0)
            num_prompt_steps, prompt_s = self._prompt_s(known, 0, chunk, steps)
            late_s = self._late_s(
                worker, num_prompt_steps, num_prompt_steps * base_s + prompt_s, alone_step_s
            )
            step_s += streams * late_s / self._stream_tokens
        backlog_s, mixed_step_s = 0.0, step_s
        if pending:
            chunk = min(pending, worker.mixed_chunk_tokens) if worker.mixes else pending
            carried_s = drag_s + mine_s if worker.mixes else 0.0
            num_chunks = -(-pending // max(1, chunk))
            base_s = steps.prompt_base_s + carried_s
            backlog_s = self._pending_s(pending, num_chunks, base_s, steps)
            mixed_step_s = max(step_s, backlog_s / num_chunks)
        return DecodeSide(
            worker,
            join_s=(steps.decode_base_s + drag_s) / 2 if streams else 0.0,
            blocks_s=self._blocks_s(worker, step_s),
            step_s=step_s,
            harm_s=streams * num_steps * mine_s,
            backlog_s=backlog_s,
            mixed_step_s=mixed_step_s,
        )

    def pair(self, prefill: PrefillSide, decode: DecodeSide) -> Estimate:
        """Two workers and a hand-off. An answer of one token has none."""
        if self.ask.max_output_tokens <= 1:
            return self._estimate(prefill, decode, 0.0, 0.0, 0.0)
        known = min(self.cached.get(decode.view.worker, 0), self.ask.num_tokens)
        num_bytes = (self.ask.num_tokens - known) * self.view.token_bytes
        link = self._link(prefill.view, decode.view)
        exposed_s = link.exposed_s(num_bytes, prefill.prefill_s)
        tpot_s = decode.step_s
        left_s = decode.backlog_s - prefill.ttft_s - exposed_s
        if left_s > 0.0 and decode.mixed_step_s > tpot_s:
            # Its prompts still slow some of the steps, at most all of them.
            slow_steps = left_s / decode.mixed_step_s
            share = min(1.0, slow_steps / max(1.0, self.decode_steps))
            tpot_s += share * (decode.mixed_step_s - tpot_s)
        return self._estimate(prefill, decode, exposed_s, decode.join_s + decode.blocks_s, tpot_s)

    def local(self, prefill: PrefillSide, decode: DecodeSide) -> Estimate:
        """One worker: its first step as a decode is its next one."""
        if self.ask.max_output_tokens <= 1:
            return self._estimate(prefill, decode, 0.0, 0.0, 0.0)
        return self._estimate(prefill, decode, 0.0, decode.blocks_s, decode.step_s)

    def _estimate(
        self,
        prefill: PrefillSide,
        decode: DecodeSide,
        exposed_s: float,
        decode_wait_s: float,
        tpot_s: float,
    ) -> Estimate:
        weights, service = self.weights, self.ask.service
        ttft_s = prefill.queue_s + prefill.fetch_s + prefill.prefill_s
        second_s = ttft_s + exposed_s + decode_wait_s
        score_s = second_s + tpot_s * self.decode_steps
        score_s += weights.harm * (prefill.harm_s + decode.harm_s)
        if self._against_roles(prefill.view, decode.view):
            score_s += max(weights.margin_s, weights.margin_share * second_s)
        late_s = max(0.0, self.ask.waited_s + ttft_s - service.ttft_s)
        slow_s = max(0.0, tpot_s - service.tpot_s, prefill.caused_tpot_s - service.tpot_s)
        misses = late_s > 0.0 or slow_s > 0.0
        if misses:
            score_s += weights.miss * (late_s + slow_s * max(1.0, self.decode_steps))
        return Estimate(misses, score_s, prefill, decode, exposed_s, decode_wait_s, tpot_s)

    def _against_roles(self, prefill: WorkerView, decode: WorkerView) -> bool:
        """Roles are the memory of what the load has wanted so far: prefill workers hand off to
        decode workers, mixed ones keep what they prefill. The rest must be worth it."""
        if prefill is not decode:
            return prefill.role is not Role.PREFILL or decode.role is not Role.DECODE
        return prefill.role is not Role.MIXED and self.ask.max_output_tokens > 1

    def _link(self, source: WorkerView, destination: WorkerView) -> LinkModel:
        return self.view.links.get((source.worker, destination.worker), self.view.link)

    def _prompt_steps(self, worker: WorkerView, steps: StepModel) -> tuple[int, float, float]:
        """Prompt tokens per step, what a step takes without them, and what one takes that only
        decodes (0: nothing decodes there)."""
        streams, most = worker.num_decoding, max(1, self.weights.max_step_tokens)
        if not streams:
            return most, steps.prompt_base_s, 0.0
        drag_s = steps.per_sequence_s * streams + steps.per_context_token_s * worker.context_tokens
        decode_step_s = steps.decode_base_s + drag_s
        if not worker.mixes:
            return most, steps.prompt_base_s, decode_step_s
        chunk = max(1, worker.block_size, min(worker.mixed_chunk_tokens, most - streams))
        return chunk, steps.prompt_base_s + drag_s, decode_step_s

    def _pending_s(self, pending: int, num_steps: int, base_s: float, steps: StepModel) -> float:
        """Seconds of the prompts that are queued, each as long as this one."""
        pairs = min(pending, self.ask.num_tokens)
        return num_steps * base_s + pending * (steps.per_prompt_token_s + steps.per_pair_s * pairs)

    def _prompt_s(
        self, cached: int, pending: int, chunk: int, steps: StepModel
    ) -> tuple[int, float]:
        """Steps beyond those of the queue, and the seconds that this prompt adds to their base."""
        num_tokens = self.ask.num_tokens
        cached = max(0, min(cached, num_tokens - 1))
        todo = num_tokens - cached
        num_steps = -(-(pending + todo) // chunk) - pending // chunk
        pairs = num_tokens * num_tokens - cached * cached
        return num_steps, todo * steps.per_prompt_token_s + pairs * steps.per_pair_s

    def _late_s(
        self, worker: WorkerView, num_steps: int, prefill_s: float, decode_step_s: float
    ) -> float:
        """How much later each running sequence gets its tokens, because of one prompt.

        A worker that mixes decodes in each of the prompt's steps; one that does not stands still.
        """
        return max(0.0, prefill_s - num_steps * decode_step_s) if worker.mixes else prefill_s

    def _blocks_s(self, worker: WorkerView, step_s: float) -> float:
        """How long its answer waits for blocks that it has none of yet.

        It has room for the prompt, or is no candidate. What it lacks to grow to its end comes free
        as others finish: all that they hold, while one answer is written.
        """
        spare = worker.free_blocks - self.ask.num_blocks
        block_size = max(1, worker.block_size)
        lacking = self.ask.num_choices * self.decode_steps / block_size - max(0, spare)
        held = max(worker.total_blocks - worker.free_blocks, 0)
        held = held or worker.context_tokens // block_size
        if lacking <= 0.0 or not worker.num_decoding or not held:
            return 0.0
        return min(1.0, lacking / held) * self._stream_tokens * step_s
