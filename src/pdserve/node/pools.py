"""Which pool each worker is in: roles that change, and workers that are to be left alone.

A worker slot has a home role, which its process was started as, and a role, which is what the
router sends it now. Changing it takes effect at the next route: nothing is drained, what runs there
finishes, and the worker itself only switches how it batches. Each change has a number, the role
epoch; the worker's next report repeats it. Roles change on three grounds: an operator's command,
the role controller's proposal, and a route that draws a worker of the other pool into the mixed one
because its own pools are full (Splitwise, sec. IV-A). Who was drawn goes home as soon as it has
none of the other pool's work left, or has run empty, as the return rule says.

A drain takes a worker out of all pools until it holds nothing; its command is answered then. A slot
keeps its role when its process is replaced, and loses its drain.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pdserve.core.commands import (
    Answer,
    ChangeRole,
    DrainOne,
    Refused,
    RoleChanged,
    RolesJudged,
    UndrainOne,
)
from pdserve.core.effects import KillWorker
from pdserve.core.ids import WorkerId
from pdserve.core.messages import DrainWorker, SetRole, UndrainWorker
from pdserve.core.request import Role
from pdserve.node.books import ClusterBooks, WorkerBook
from pdserve.node.demand import Demand
from pdserve.node.outbox import Outbox
from pdserve.node.settings import ReturnRule, RoleControl
from pdserve.policy.roles import LoadBalancedRoles, RolePolicy, RolesView, target_sign

ROLES_TIMER = "roles"
ROLES_INTERVAL_S = 0.5


@dataclass(slots=True)
class Slot:
    """A worker's place; it outlives the process. ``drains``: commands that wait for it to be
    empty, and whether each wants the process replaced then. ``was_busy``: it was, when its return
    was last thought about."""

    role: Role
    role_epoch: int = 0
    changed_s: float | None = None
    drains: list[tuple[int, bool]] = field(default_factory=list)
    was_busy: bool = False


class Pools:
    """All roles and drains. Owned by the router."""

    def __init__(
        self,
        books: ClusterBooks,
        control: RoleControl,
        policy: RolePolicy | None = None,
        return_rule: ReturnRule = ReturnRule.DONE,
    ) -> None:
        self.slots: dict[WorkerId, Slot] = {}
        self._drawn: set[WorkerId] = set()
        self.demand = Demand(is_kept=control is not RoleControl.FIXED)
        self._books = books
        self._control = control
        self._policy = policy or LoadBalancedRoles()
        self._return_rule = return_rule
        self._target: int | None = None
        self._target_since_s = 0.0

    def start(self, out: Outbox) -> None:
        if self._control is not RoleControl.FIXED:
            out.set_timer(ROLES_TIMER, ROLES_INTERVAL_S)

    # --- workers ------------------------------------------------------------------------------

    def worker_up(self, book: WorkerBook, out: Outbox) -> None:
        """A process is ready: it learns its slot's role if that is not its home role."""
        worker = book.up.worker
        slot = self.slots.setdefault(worker, Slot(book.up.role))
        if slot.role is not book.up.role:
            book.set_role(slot.role, slot.changed_s or 0.0)
            out.send(worker, SetRole(slot.role, slot.role_epoch))

    def worker_lost(self, worker: WorkerId, out: Outbox) -> None:
        """An empty worker could not be emptier: its drains are done."""
        slot = self.slots.get(worker)
        if slot is not None:
            for command, _ in slot.drains:
                out.add(Answer(command=command, detail=f"{worker} has ended"))
            slot.drains.clear()

    # --- roles --------------------------------------------------------------------------------

    def change(self, asked: ChangeRole, out: Outbox) -> None:
        """An operator's command."""
        worker = asked.worker
        slot, book = self.slots.get(worker), self._books.workers.get(worker)
        if slot is None or book is None:
            self._refuse(asked.command, Refused.UNKNOWN_WORKER, f"no worker {worker} is up", out)
        elif asked.expected_epoch not in (None, slot.role_epoch):
            detail = f"the role epoch of {worker} is {slot.role_epoch}, not {asked.expected_epoch}"
            self._refuse(asked.command, Refused.STALE_EPOCH, detail, out)
        elif asked.role is Role.MIXED and not book.mixes:
            detail = f"the engine of {worker} cannot prefill and decode at once"
            self._refuse(asked.command, Refused.CANNOT, detail, out)
        else:
            self._set(book, slot, asked.role, "an operator's command", out)
            out.add(Answer(command=asked.command, detail=f"role epoch {slot.role_epoch}"))

    def draw(self, worker: WorkerId, out: Outbox) -> None:
        """A route needs the worker in the mixed pool for a while."""
        slot, book = self.slots.get(worker), self._books.workers.get(worker)
        if slot is not None and book is not None and slot.role is not Role.MIXED:
            self._set(book, slot, Role.MIXED, "its own pool has room and the other has none", out)
            self._drawn.add(worker)
            slot.was_busy = False

    def send_home(self, out: Outbox) -> None:
        """Whoever was drawn and may go, as the return rule says."""
        if not self._drawn:
            return
        for worker in sorted(self._drawn):
            book = self._books.workers.get(worker)
            if book is None:
                continue
            if self._return_rule is ReturnRule.IDLE:
                slot = self.slots[worker]
                if book.report is None or book.report.role_epoch != slot.role_epoch:
                    continue  # it has not heard that it was drawn
                was_busy, slot.was_busy = slot.was_busy, book.is_busy
                goes, reason = was_busy and not slot.was_busy, "it has run empty"
            else:
                goes = not book.has_work_against(book.up.role)
                reason = "nothing of the other pool's work is left"
            if goes:
                self._set(book, self.slots[worker], book.up.role, reason, out)

    def timer_fired(self, out: Outbox) -> None:
        """Ask the controller."""
        out.set_timer(ROLES_TIMER, ROLES_INTERVAL_S)
        workers = self._books.view(out.now, 0).workers
        changed_s = {w: s.changed_s for w, s in self.slots.items() if s.changed_s is not None}
        proposal = self._policy.propose(
            RolesView(
                now=out.now,
                workers=workers,
                load=self.demand.load(out.now, workers),
                changed_s=changed_s,
                target_prefill=self._target,
                target_since_s=self._target_since_s,
            )
        )
        num_prefill = sum(worker.role is Role.PREFILL for worker in workers)
        wished, wishes = (
            target_sign(target, num_prefill) for target in (self._target, proposal.target_prefill)
        )
        if wished != wishes:
            self._target_since_s = out.now
        self._target = proposal.target_prefill
        applies = proposal.move is not None and self._control is RoleControl.AUTO
        out.add(RolesJudged(reason=proposal.reason, applies=applies))
        if proposal.move is not None and applies:
            worker, role = proposal.move
            self._set(self._books.workers[worker], self.slots[worker], role, proposal.reason, out)
            self._target_since_s = out.now

    def _set(self, book: WorkerBook, slot: Slot, role: Role, reason: str, out: Outbox) -> None:
        self._drawn.discard(book.up.worker)
        if slot.role is role:
            return
        slot.role = role
        slot.role_epoch += 1
        slot.changed_s = out.now
        book.set_role(role, out.now)
        worker = book.up.worker
        out.send(worker, SetRole(role, slot.role_epoch))
        out.add(RoleChanged(worker=worker, role=role, role_epoch=slot.role_epoch, reason=reason))

    # --- drains -------------------------------------------------------------------------------

    def drain(self, asked: DrainOne, out: Outbox) -> None:
        """Nothing new for the worker; answered when nothing is left there."""
        slot, book = self.slots.get(asked.worker), self._books.workers.get(asked.worker)
        if slot is None or book is None:
            detail = f"no worker {asked.worker} is up"
            self._refuse(asked.command, Refused.UNKNOWN_WORKER, detail, out)
            return
        if not book.drains:
            book.set_drains(True)
            out.send(asked.worker, DrainWorker())
        slot.drains.append((asked.command, asked.restart))

    def undrain(self, asked: UndrainOne, out: Outbox) -> None:
        slot, book = self.slots.get(asked.worker), self._books.workers.get(asked.worker)
        if slot is None or book is None:
            detail = f"no worker {asked.worker} is up"
            self._refuse(asked.command, Refused.UNKNOWN_WORKER, detail, out)
            return
        for command, _ in slot.drains:
            self._refuse(command, Refused.CANNOT, f"{asked.worker} is to take work again", out)
        slot.drains.clear()
        if book.drains:
            book.set_drains(False)
            out.send(asked.worker, UndrainWorker())
        out.add(Answer(command=asked.command, detail=f"{asked.worker} takes work again"))

    def drained(self, book: WorkerBook, out: Outbox) -> None:
        """After a report: answer the drains of a worker that holds nothing any more."""
        worker = book.up.worker
        slot = self.slots.get(worker)
        if slot is None or not slot.drains or not book.is_drained:
            return
        drains, slot.drains = slot.drains, []
        for command, _ in drains:
            out.add(Answer(command=command, detail=f"{worker} holds nothing"))
        if any(restart for _, restart in drains):
            book.set_killed()
            out.add(KillWorker(worker, book.up.epoch, "drained, to be replaced"))

    def _refuse(self, command: int, kind: str, detail: str, out: Outbox) -> None:
        out.add(Answer(command=command, refused=kind, detail=detail))
