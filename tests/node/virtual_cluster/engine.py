"""The engine of one worker process: a step layer by layer, with a look at everything it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pdserve.core.ids import RequestId
from pdserve.core.step import SampledToken, SampleSpec, StepPlan, StepResult, StepRow
from virtual_cluster.memory import GARBAGE, Memory
from virtual_cluster.oracle import Ask


class Sink(Protocol):
    """The pusher's ears on the engine thread."""

    def begin_step(self, plan: StepPlan) -> None: ...

    def layer_done(self, layer: int) -> None: ...

    def end_step(self, ok: bool) -> None: ...


class StepRun:
    """One step under way. `advance` computes a layer, and at last gives the result."""

    def __init__(
        self, plan: StepPlan, memory: Memory, asks: Mapping[RequestId, Ask], sink: Sink
    ) -> None:
        assert plan.rows, "a step without rows"
        self.plan = plan
        self.broken = any(asks[row.attempt.request_id].poison for row in plan.rows)
        self._memory = memory
        self._asks = asks
        self._sink = sink
        self._next_layer = 0
        self._chains = [self._chain(row) for row in plan.rows]

    def advance(self) -> StepResult | None:
        layer = self._next_layer
        if layer == 0:
            self._sink.begin_step(self.plan)
            for source, target in self.plan.copies:
                self._memory.copy(source, target)
        if layer < len(self._memory.layers):
            self._compute(layer)
            self._next_layer += 1
            self._sink.layer_done(layer)
            return None
        if self.broken:
            self._spoil()
        self._sink.end_step(not self.broken)
        if self.broken:
            return StepResult(step_id=self.plan.step_id, tokens=(), error="broken")
        tokens = tuple(self._sample(row) for row in self.plan.rows)
        failures = tuple(
            (place, "nothing to draw")
            for place, row in enumerate(self.plan.rows)
            if row.sample and row.sample.index == self._asks[row.attempt.request_id].barren
        )
        return StepResult(step_id=self.plan.step_id, tokens=tokens, failures=failures)

    def _compute(self, layer: int) -> None:
        for row, chain in zip(self.plan.rows, self._chains, strict=True):
            found = self._memory.read(layer, row.block_ids, row.start)
            assert found == chain[: row.start], (
                f"{row.attempt} reads wrong KV in layer {layer}: {row}"
            )
            self._memory.write(layer, row.block_ids, row.start, chain[row.start : row.end])

    def _spoil(self) -> None:
        """What a broken step has written can be anything, and so can its copies."""
        for layer in range(len(self._memory.layers)):
            for row in self.plan.rows:
                garbage = [GARBAGE] * (row.end - row.start)
                self._memory.write(layer, row.block_ids, row.start, garbage)
            for _, target in self.plan.copies:
                self._memory.layers[layer][target] = [GARBAGE] * self._memory.block_size

    def _chain(self, row: StepRow) -> tuple[int, ...]:
        """The right KV of the row's sequence; its tokens must be those of one of its choices."""
        ask = self._asks[row.attempt.request_id]
        assert row.token_ids, "a row without tokens"
        assert row.end <= len(row.block_ids) * self._memory.block_size, "tokens without a slot"
        every = range(len(ask.tokens))
        choices = every if row.sample is None else row.sample.choices
        matching = [c for c in choices if ask.tokens[c][row.start : row.end] == row.token_ids]
        assert matching, f"{row} computes tokens that {ask.request_id} does not have"
        if row.sample is None:
            found = self._memory.read(0, row.block_ids, row.start)
            return next(
                (ask.chains[c] for c in matching if ask.chains[c][: row.start] == found),
                ask.chains[matching[0]],
            )
        assert len(matching) == len(choices), f"{row} mixes choices that differ"
        self._check_spec(ask, row, row.sample)
        return ask.chains[choices[0]]

    def _check_spec(self, ask: Ask, row: StepRow, spec: SampleSpec) -> None:
        num_prompt_tokens = len(ask.request.prompt_token_ids)
        assert spec.choices, "a sample of no choice"
        assert spec.index == row.end - num_prompt_tokens, "samples another index than the next"
        assert spec.params == ask.request.params
        if spec.params.needs_history:
            assert spec.history == ask.tokens[spec.choices[0]][: row.end]
            assert spec.num_prompt_tokens == num_prompt_tokens
        for choice in spec.choices:
            assert spec.index < len(ask.answers[choice]), "computes on after the end"

    def _sample(self, row: StepRow) -> tuple[SampledToken, ...]:
        if row.sample is None:
            return ()
        answers = self._asks[row.attempt.request_id].answers
        return tuple(SampledToken(answers[c][row.sample.index]) for c in row.sample.choices)
