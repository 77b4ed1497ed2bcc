"""Links between simulated workers, and how transfers share them.

A worker has one end of the network, with so many bytes/s out and as many in. All flows that leave
it share what goes out evenly, all that arrive what comes in; a flow runs at the lesser of its two
shares (what that leaves unused is not given to others). An end that is not ``shared`` gives each
flow its whole rate, as SplitwiseSim does.

A flow's bytes are released as they are computed; it is *drained* when it has sent all of them, and
sends no more until others are released.
"""

from __future__ import annotations

from collections.abc import Callable

from pdserve.core.ids import WorkerId
from pdserve.cost.machine import LinkSpec
from pdserve.sim.clock import Clock


class Flow:
    """Bytes from one end to another. ``num_sent`` of ``num_released`` are there."""

    def __init__(self, sender: End, receiver: End, drained: Callable[[], None]) -> None:
        self.sender = sender
        self.receiver = receiver
        self.drained = drained
        self.num_released = 0.0
        self.num_sent = 0.0
        self.rate = 0.0
        self.since_s = 0.0
        self.version = 0


class End:
    """One worker's end. ``flows_out`` and ``flows_in`` are those that are sending now."""

    def __init__(self, worker: WorkerId, spec: LinkSpec) -> None:
        self.worker = worker
        self.spec = spec
        self.flows_out: dict[Flow, None] = {}
        self.flows_in: dict[Flow, None] = {}

    def share(self, num_flows: int) -> float:
        return self.spec.bytes_per_s / (num_flows if self.spec.shared else 1)


class Network:
    """All flows. ``slowed`` has a factor, at most 1, of pairs whose link is slow."""

    def __init__(self, clock: Clock) -> None:
        self.slowed: dict[tuple[WorkerId, WorkerId], float] = {}
        self._clock = clock
        self._ends: list[End] = []

    def alone_rate(self, sender: End, receiver: End) -> float:
        """Bytes/s of a flow that shares with nobody."""
        rate = min(sender.spec.bytes_per_s, receiver.spec.bytes_per_s)
        return rate * self._factor(sender, receiver)

    def release(self, flow: Flow, num_bytes: float) -> None:
        """So many more bytes can be sent."""
        if flow not in flow.sender.flows_out:
            flow.sender.flows_out[flow] = None
            flow.receiver.flows_in[flow] = None
            flow.since_s = self._clock.now
            flow.num_released += num_bytes
            self._share_again(flow)
        else:
            self._settle(flow)
            flow.num_released += num_bytes
            self._expect(flow)

    def stop(self, flow: Flow) -> None:
        """Send no more of it."""
        flow.version += 1
        if flow in flow.sender.flows_out:
            self._settle(flow)
            self._leave(flow)

    def links_changed(self) -> None:
        """`slowed` is another: every flow has a new rate."""
        for flow in [flow for end in self._ends for flow in end.flows_out]:
            self._settle(flow)
            flow.rate = self._rate(flow)
            self._expect(flow)

    def end(self, worker: WorkerId, spec: LinkSpec) -> End:
        """A worker's end, new."""
        end = End(worker, spec)
        self._ends.append(end)
        return end

    # --- inside -------------------------------------------------------------------------------

    def _factor(self, sender: End, receiver: End) -> float:
        if not self.slowed:
            return 1.0
        return self.slowed.get((sender.worker, receiver.worker), 1.0)

    def _rate(self, flow: Flow) -> float:
        out = flow.sender.share(len(flow.sender.flows_out))
        into = flow.receiver.share(len(flow.receiver.flows_in))
        return min(out, into) * self._factor(flow.sender, flow.receiver)

    def _settle(self, flow: Flow) -> None:
        now = self._clock.now
        flow.num_sent = min(flow.num_released, flow.num_sent + flow.rate * (now - flow.since_s))
        flow.since_s = now

    def _expect(self, flow: Flow) -> None:
        """When it will have sent all that is released."""
        flow.version += 1
        left_s = (flow.num_released - flow.num_sent) / flow.rate
        self._clock.after(left_s, self._drained, flow, flow.version)

    def _drained(self, flow: Flow, version: int) -> None:
        if flow.version == version:
            flow.num_sent = flow.num_released
            self._leave(flow)
            flow.drained()

    def _leave(self, flow: Flow) -> None:
        del flow.sender.flows_out[flow]
        del flow.receiver.flows_in[flow]
        self._share_again(flow)

    def _share_again(self, changed: Flow) -> None:
        """New rates for all that share an end with a flow that has come or gone."""
        out, into = changed.sender.flows_out, changed.receiver.flows_in
        if not out and not into:
            return
        shared = dict.fromkeys(out) if changed.sender.spec.shared else {}
        if changed.receiver.spec.shared:
            shared.update(into)
        if changed in out:
            shared[changed] = None
        for flow in shared:
            self._settle(flow)
            flow.rate = self._rate(flow)
            self._expect(flow)
