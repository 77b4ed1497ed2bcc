"""A shipped engine that batches for itself, without a model: it keeps the `Engine` seam honest.

It does what such engines do behind their door. Attempts wait first come first served, are admitted
when blocks for their known tokens can be had, are prefilled in chunks within a step's budget beside
running decodes, and are forked when they have several choices; when blocks run out the youngest
gives up its own and is computed again later. The blocks are its own notion: nobody else sees one.

Tokens are a pure function of (token ids, seed, choice, index), whether computed here, adopted, or
resumed (see ``engine.fake_payload``). With ``recomputes_first_token`` it draws an adopted attempt's
first token again, as vLLM's decode workers do; ``first_token_drift`` is then added to the token's
id, as if other kernels had led to another choice.

For tests, demonstrations and simulated load (``step_s`` is how long a step takes).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from pdserve.core.engine_work import (
    EngineLoad,
    EngineOutput,
    EnginePhase,
    EngineStart,
    EngineWork,
)
from pdserve.core.errors import ConfigError, ContextLengthError, PayloadError
from pdserve.core.ids import AttemptId
from pdserve.core.messages import TokenDelta
from pdserve.core.request import SamplingParams
from pdserve.core.step import SampledToken
from pdserve.engine.fake_payload import (
    PAYLOAD_FORMAT,
    draw,
    next_state,
    pack_payload,
    root_state,
    unpack_payload,
)
from pdserve.engine.foreign import Capabilities, Engine, EngineInfo
from pdserve.node.sequence import finish_reason


@dataclass(slots=True, eq=False, kw_only=True)
class _Sequence:
    """Some choices of an attempt that share all their tokens. ``states`` is the KV of the first of
    them, ``num_blocks`` what it takes. ``redraws``: its next token was drawn elsewhere already."""

    attempt: AttemptId
    choices: tuple[int, ...]
    params: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    arrival: int
    phase: EnginePhase = EnginePhase.WHOLE
    states: list[bytes] = field(default_factory=list)
    num_blocks: int = 0
    started: bool = False
    redraws: bool = False

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be drawn."""
        return len(self.token_ids) - len(self.states)


class FakeForeignEngine(Engine):
    """``capacity_tokens`` of KV in hidden blocks of ``block_tokens``; one step computes at most
    ``max_step_tokens`` of at most ``max_running`` sequences."""

    def __init__(
        self,
        *,
        capacity_tokens: int = 4096,
        max_model_tokens: int = 1024,
        block_tokens: int = 8,
        max_step_tokens: int = 256,
        max_running: int = 64,
        vocab_size: int = 256,
        weights_digest: str = "fake-foreign",
        recomputes_first_token: bool = False,
        first_token_drift: int = 0,
        step_s: float = 0.0,
    ) -> None:
        if capacity_tokens // block_tokens * block_tokens < max_model_tokens:
            raise ConfigError(
                f"{capacity_tokens} tokens of KV do not hold one answer of {max_model_tokens} "
                "tokens: give more KV or lower the longest request"
            )
        self.info = EngineInfo(
            engine="fake-foreign",
            device="cpu",
            numerics="fake-foreign",
            weights_digest=weights_digest,
            vocab_size=vocab_size,
            max_model_tokens=max_model_tokens,
            capacity_tokens=capacity_tokens // block_tokens * block_tokens,
            capabilities=Capabilities(
                payload_format=PAYLOAD_FORMAT, recomputes_first_token=recomputes_first_token
            ),
        )
        self._block_tokens = block_tokens
        self._max_step_tokens = max_step_tokens
        self._max_running = max_running
        self._drift = first_token_drift
        self._step_s = step_s
        self._root = root_state(weights_digest)
        self._free_blocks = capacity_tokens // block_tokens
        self._arrivals = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._held: dict[AttemptId, _Sequence] = {}

    # --- Engine -------------------------------------------------------------------------------

    def submit(self, work: EngineWork, phase: EnginePhase) -> None:
        if len(work.token_ids) >= self.info.max_model_tokens:
            raise ContextLengthError(
                f"{len(work.token_ids)} tokens leave no room in {self.info.max_model_tokens}"
            )
        sequence = self._new(work, work.choices, phase=phase)
        self._waiting.append(sequence)

    def adopt(self, work: EngineWork, first_tokens: tuple[TokenDelta, ...], payload: bytes) -> None:
        states = unpack_payload(payload, self.info.weights_digest, work.token_ids)
        if self.info.capabilities.recomputes_first_token:
            sequence = self._new(work, work.choices, started=True, redraws=True)
            sequence.states = states[:-1]
            self._waiting.append(sequence)
            return
        for delta in first_tokens:
            sequence = self._new(work, (delta.choice,), started=True)
            sequence.token_ids.append(delta.token_id)
            sequence.states = list(states)
            self._waiting.append(sequence)

    def export(self, attempt: AttemptId) -> bytes:
        sequence = self._held.get(attempt)
        if sequence is None:
            raise PayloadError(f"nothing is held of {attempt}")
        return pack_payload(self.info.weights_digest, sequence.token_ids, sequence.states)

    def abort(self, attempt: AttemptId, choices: tuple[int, ...] | None = None) -> None:
        for sequence in [s for s in self._sequences() if s.attempt == attempt]:
            gone = sequence.choices if choices is None else choices
            sequence.choices = tuple(c for c in sequence.choices if c not in gone)
            if not sequence.choices:
                self._forget(sequence)

    def step(self) -> EngineOutput | None:
        shares = self._shares()
        if not shares:
            return None
        if self._step_s:
            time.sleep(self._step_s)
        self._num_steps += 1
        started = []
        deltas: list[TokenDelta] = []
        for sequence, num_tokens in shares:
            if not sequence.started:
                sequence.started = True
                started.append(EngineStart(sequence.attempt))
            self._compute(sequence, num_tokens)
            if sequence.remaining == 0:
                deltas += self._draw(sequence)
        return EngineOutput(started=tuple(started), deltas=tuple(deltas))

    def load(self) -> EngineLoad:
        adopted = sum(self._blocks_for(len(s.token_ids)) for s in self._waiting if s.states)
        return EngineLoad(
            free_tokens=max(0, self._free_blocks - adopted) * self._block_tokens,
            num_preemptions=self._num_preemptions,
            num_steps=self._num_steps,
        )

    def close(self) -> None:
        for sequence in list(self._sequences()):
            self._forget(sequence)

    # --- batching -----------------------------------------------------------------------------

    def _shares(self) -> list[tuple[_Sequence, int]]:
        """Who computes how many tokens in the next step: the running ones, then who fits in."""
        shares = []
        budget = self._max_step_tokens
        for sequence in sorted(self._running, key=lambda s: s.arrival):
            num_tokens = min(sequence.remaining, budget)
            if num_tokens and self._make_room(sequence, num_tokens):
                shares.append((sequence, num_tokens))
                budget -= num_tokens
        while self._waiting and budget and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            if not self._grow(sequence, len(sequence.token_ids)):
                break
            self._running.append(self._waiting.pop(0))
            num_tokens = min(sequence.remaining, budget)
            shares.append((sequence, num_tokens))
            budget -= num_tokens
        return shares

    def _make_room(self, sequence: _Sequence, num_tokens: int) -> bool:
        """Blocks for so many more states, if need be those of the youngest. False if it was the
        youngest itself; it then waits again."""
        while sequence in self._running:
            if self._grow(sequence, len(sequence.states) + num_tokens):
                return True
            youngest = max(self._running, key=lambda s: s.arrival)
            self._running.remove(youngest)
            self._num_preemptions += 1
            self._drop_kv(youngest)
            self._waiting.insert(0, youngest)
        return False

    def _grow(self, sequence: _Sequence, num_tokens: int) -> bool:
        missing = max(0, self._blocks_for(num_tokens) - sequence.num_blocks)
        if missing > self._free_blocks:
            return False
        self._free_blocks -= missing
        sequence.num_blocks += missing
        return True

    # --- computing ----------------------------------------------------------------------------

    def _compute(self, sequence: _Sequence, num_tokens: int) -> None:
        at = len(sequence.states)
        state = sequence.states[-1] if at else self._root
        for token_id in sequence.token_ids[at : at + num_tokens]:
            state = next_state(state, token_id)
            sequence.states.append(state)

    def _draw(self, sequence: _Sequence) -> list[TokenDelta]:
        """The next token of each choice, each of which then goes its own way."""
        index = len(sequence.token_ids) - sequence.num_prompt_tokens
        deltas = [self._draw_one(sequence, choice, index) for choice in sequence.choices]
        sequence.redraws = False
        if sequence.phase is EnginePhase.PREFILL:
            self._running.remove(sequence)
            self._held[sequence.attempt] = sequence
            return deltas
        live = [delta for delta in deltas if delta.finish is None]
        if not live:
            self._forget(sequence)
            return deltas
        for delta in live[:-1]:
            self._fork(sequence, delta)
        sequence.choices = (live[-1].choice,)
        sequence.token_ids.append(live[-1].token_id)
        return deltas

    def _draw_one(self, sequence: _Sequence, choice: int, index: int) -> TokenDelta:
        vocab_size = self.info.vocab_size
        token = draw(sequence.states[-1], sequence.params, choice, index, vocab_size)
        if sequence.redraws and self._drift:
            token = SampledToken((token.token_id + self._drift) % vocab_size, token.logprobs)
        room_tokens = self.info.max_model_tokens - len(sequence.token_ids) - 1
        return TokenDelta(
            request_id=sequence.attempt.request_id,
            epoch=sequence.attempt.epoch,
            choice=choice,
            index=index,
            token_id=token.token_id,
            finish=finish_reason(sequence.params, index, token, room_tokens),
            logprobs=token.logprobs,
        )

    def _fork(self, parent: _Sequence, delta: TokenDelta) -> None:
        child = _Sequence(
            attempt=parent.attempt,
            choices=(delta.choice,),
            params=parent.params,
            token_ids=[*parent.token_ids, delta.token_id],
            num_prompt_tokens=parent.num_prompt_tokens,
            arrival=self._next_arrival(),
            started=True,
        )
        if self._grow(child, len(parent.states)):
            child.states = list(parent.states)
            self._running.append(child)
        else:
            self._waiting.insert(0, child)

    # --- inside -------------------------------------------------------------------------------

    def _new(
        self,
        work: EngineWork,
        choices: tuple[int, ...],
        *,
        phase: EnginePhase = EnginePhase.WHOLE,
        started: bool = False,
        redraws: bool = False,
    ) -> _Sequence:
        return _Sequence(
            attempt=work.attempt,
            choices=choices,
            params=work.params,
            token_ids=list(work.token_ids),
            num_prompt_tokens=work.num_prompt_tokens,
            arrival=self._next_arrival(),
            phase=phase,
            started=started,
            redraws=redraws,
        )

    def _next_arrival(self) -> int:
        self._arrivals += 1
        return self._arrivals

    def _sequences(self) -> Iterator[_Sequence]:
        return iter([*chain(self._waiting, self._running, self._held.values())])

    def _forget(self, sequence: _Sequence) -> None:
        for queue in (self._waiting, self._running):
            if sequence in queue:
                queue.remove(sequence)
        if self._held.get(sequence.attempt) is sequence:
            del self._held[sequence.attempt]
        self._drop_kv(sequence)

    def _drop_kv(self, sequence: _Sequence) -> None:
        self._free_blocks += sequence.num_blocks
        sequence.num_blocks = 0
        sequence.states = []

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)
