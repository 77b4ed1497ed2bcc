"""What the router has learned of how long steps and hand-offs take.

Every worker process has a fit of its own, since two machines of one kind may differ, and all
workers of the same kind (`StepKey`) share one. A worker's steps count in both. Until it has
reported enough steps of a phase, that half of its model is the group's. The group's starts from
what earlier servers have saved, or from the prior of model and device.

Links are alike: one fit over all hand-offs, and one for each pair of workers that has had enough.
"""

from __future__ import annotations

from collections.abc import Mapping

from pdserve.core.effects import WorkerUp
from pdserve.core.ids import WorkerId
from pdserve.core.step import StepSample, TransferSample
from pdserve.cost.fit import LinkFit, StepFit, halves
from pdserve.cost.link import LinkModel
from pdserve.cost.prior import DEFAULT_SHAPE, device_of, link_prior, step_prior
from pdserve.cost.step import StepModel
from pdserve.cost.store import KnownCosts, SavedLink, SavedSteps, StepKey

OWN_SAMPLES = 16
"""Steps of a phase, or hand-offs of a pair, from which on its own fit is used."""
MAX_PAIRS = 4096
"""Pairs of workers with a fit of their own; beyond that the one unused for longest is forgotten."""

Pair = tuple[WorkerId, WorkerId]


class WorkerSteps:
    """How long the steps of one worker process take. ``group`` is shared with its like."""

    def __init__(self, group: StepFit) -> None:
        self.group = group
        self.own: StepFit | None = None

    def take(self, samples: tuple[StepSample, ...]) -> None:
        """Learn from steps that have ended, oldest first."""
        if not samples:
            return
        if self.own is None:
            self.own = StepFit(self.group.model())
        for sample in samples:
            self.own.add(sample)
            self.group.add(sample)

    def model(self) -> StepModel:
        if self.own is None:
            return self.group.model()
        own_prompts = self.own.num_prompt_samples >= OWN_SAMPLES
        own_decodes = self.own.num_decode_samples >= OWN_SAMPLES
        if own_prompts and own_decodes:
            return self.own.model()
        prompt = self.own if own_prompts else self.group
        decode = self.own if own_decodes else self.group
        return halves(prompt.model(), decode.model())


class LearnedCosts:
    """All fits of a router. ``link`` is that of any pair, ``links`` has those that differ."""

    def __init__(self, known: KnownCosts) -> None:
        self._known = known
        self._saved = {saved.key: saved.fit for saved in known.steps}
        self._groups: dict[StepKey, StepFit] = {}
        prior = link_prior(known.transport)
        saved = known.link
        mine = saved is not None and saved.transport == known.transport
        self._link = LinkFit(prior, state=saved.fit if saved is not None and mine else None)
        self._pairs: dict[Pair, LinkFit] = {}
        self._links: dict[Pair, LinkModel] = {}
        self.links: Mapping[Pair, LinkModel] = {}
        self.link = self._link.model()
        self.token_bytes = 0

    def of_worker(self, up: WorkerUp) -> WorkerSteps:
        """For the book of a process that is ready."""
        if up.layout is not None and up.layout.num_layers:
            self.token_bytes = up.layout.pool_bytes(1) // up.layout.block_size
        elif not self.token_bytes and self._known.shape is not None:
            self.token_bytes = int(self._known.shape.token_kv_bytes)
        key = StepKey(
            weights_digest="" if up.layout is None else up.layout.weights_digest,
            engine=up.engine,
            device=up.device,
            numerics="" if up.layout is None else up.layout.numerics,
        )
        group = self._groups.get(key)
        if group is None:
            device = device_of(up.device, self._known.num_cores)
            prior = step_prior(self._known.shape or DEFAULT_SHAPE, device)
            group = self._groups[key] = StepFit(prior, state=self._saved.get(key))
        return WorkerSteps(group)

    def take_transfers(self, sender: WorkerId, samples: tuple[TransferSample, ...]) -> None:
        """Learn from hand-offs that were accepted, oldest first."""
        if not samples:
            return
        for sample in samples:
            pair = (sender, sample.peer)
            fit = self._pairs.pop(pair, None) or LinkFit(self._link.model())
            self._pairs[pair] = fit  # at the end: used last
            fit.add(sample)
            self._link.add(sample)
            if fit.num_samples >= OWN_SAMPLES:
                self._links[pair] = fit.model()
        while len(self._pairs) > MAX_PAIRS:
            oldest = next(iter(self._pairs))
            del self._pairs[oldest]
            self._links.pop(oldest, None)
        self.link = self._link.model()
        self.links = dict(self._links)

    def saved(self) -> tuple[SavedSteps | SavedLink, ...]:
        """What has been learned, to be told to the next server."""
        steps = [
            SavedSteps(key, fit.state())
            for key, fit in sorted(self._groups.items())
            if fit.num_prompt_samples or fit.num_decode_samples
        ]
        if not self._link.num_samples:
            return tuple(steps)
        return (*steps, SavedLink(self._known.transport, self._link.state()))

    def errors(self) -> Mapping[str, float]:
        """Running relative errors of prediction over all workers: prompt steps, decode steps,
        hand-offs. Groups count alike."""
        groups = self._groups.values()
        prompt = [fit.prompt_error for fit in groups if fit.num_prompt_samples]
        decode = [fit.decode_error for fit in groups if fit.num_decode_samples]
        return {
            "prompt_step": sum(prompt) / max(1, len(prompt)),
            "decode_step": sum(decode) / max(1, len(decode)),
            "transfer": self._link.error,
        }
