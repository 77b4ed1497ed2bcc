"""Random histories: a list of numbers, each of which decides one thing that happens.

After the last number everything is healed, and the cluster must come to rest with every request
answered rightly and nothing left behind. What a client is given is checked as it comes.
"""

from __future__ import annotations

from collections.abc import Sequence

from foreign_cluster.answers import make_request
from foreign_cluster.cluster import Cluster, Spec
from foreign_cluster.process import ForeignBackend, Process
from pdserve.core.effects import Refusal
from pdserve.core.request import RoutePreference

NUMBERS = 1 << 40
FAULTS = ("leave", "leave_choice", "kill", "cut", "stop", "go_on", "damage", "hang", "drain")


class History:
    """``percent`` of the numbers submit a request or make something go wrong."""

    def __init__(self, spec: Spec, *, percent: int = 8) -> None:
        self.cluster = Cluster(spec)
        self._percent = percent
        self._num_requests = 0
        self._value = 0
        self._no_worker = False
        self._drained: set[Process] = set()

    def play(self, numbers: Sequence[int]) -> None:
        for self._value in numbers:
            if self._below(100) < self._percent:
                if self._below(2):
                    self._submit()
                else:
                    getattr(self, "_" + FAULTS[self._below(len(FAULTS))])()
            elif events := self.cluster.events():
                events[self._below(len(events))]()
            else:
                self.cluster.advance()
            self._no_worker |= not self.cluster.router.books.workers
        self._heal()
        self.cluster.run()
        self.cluster.check_end()
        for answer in self.cluster.answers.values():
            if answer.failure is not None:
                self._check_reason(answer.failure.kind)

    def _check_reason(self, kind: str) -> None:
        assert kind in (Refusal.OVERLOADED, Refusal.UNAVAILABLE), kind
        assert kind != Refusal.UNAVAILABLE or self._no_worker

    def _below(self, bound: int) -> int:
        self._value, digit = divmod(self._value, bound)
        return digit

    def _submit(self) -> None:
        self._num_requests += 1
        num_tokens = 1 + self._below(40)
        self.cluster.submit(
            make_request(
                f"r{self._num_requests}",
                tuple((self._num_requests * 7 + i) % 30 for i in range(num_tokens)),
                max_tokens=1 + self._below(10),
                num_choices=1 + self._below(3),
                seed=self._below(3),
                stops=self._below(2) == 0,
                route=list(RoutePreference)[self._below(3)],
            )
        )

    def _process(self) -> Process:
        processes = list(self.cluster.current.values())
        return processes[self._below(len(processes))]

    def _backend(self) -> ForeignBackend | None:
        backend = self._process().backend
        return backend if isinstance(backend, ForeignBackend) else None

    # --- what goes wrong ------------------------------------------------------------------------

    def _leave(self) -> None:
        running = [a for a in self.cluster.answers.values() if not a.is_over]
        if running:
            self.cluster.leave(running[self._below(len(running))].request.request_id)

    def _leave_choice(self) -> None:
        running = [a for a in self.cluster.answers.values() if not a.is_over]
        if running:
            answer = running[self._below(len(running))]
            choice = answer.open_choices[self._below(len(answer.open_choices))]
            self.cluster.leave(answer.request.request_id, (choice,))

    def _kill(self) -> None:
        self.cluster.kill(self._process(), keep=self._below(4))

    def _cut(self) -> None:
        links = self.cluster.links
        if links:
            links[self._below(len(links))].cut(self._below(4))

    def _stop(self) -> None:
        self._process().stopped = True

    def _go_on(self) -> None:
        for process in self.cluster.current.values():
            process.stopped = False

    def _damage(self) -> None:
        backend = self._backend()
        if backend is not None:
            backend.damage_next = True

    def _hang(self) -> None:
        """The engine does nothing for a while; ``go on`` and the end wake it."""
        backend = self._backend()
        if backend is not None:
            backend.hangs = not backend.hangs

    def _drain(self) -> None:
        """One worker is to take nothing new, unless it is the last one that does."""
        process = self._process()
        if len(self.cluster.current) - len(self._drained) > 1 and self._below(4) == 0:
            self._drained.add(process)
            self.cluster.drain(process.worker)

    def _heal(self) -> None:
        """Nothing goes wrong any more. Drained workers are replaced."""
        self._go_on()
        for process in list(self.cluster.current.values()):
            if isinstance(process.backend, ForeignBackend):
                process.backend.hangs = process.backend.damage_next = False
            if process in self._drained:
                self.cluster.kill(process)
