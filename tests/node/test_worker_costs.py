"""What workers report of their steps and hand-offs, what the router makes of it, and its views."""

from __future__ import annotations

from dataclasses import replace

import pytest
from virtual_cluster import ClusterSpec, VirtualCluster, make_ask

from pdserve.core.effects import Received, WorkerUp
from pdserve.core.ids import AttemptId, Epoch, RequestId, WorkerId
from pdserve.core.messages import LoadReport
from pdserve.core.request import Role, RoutePreference
from pdserve.core.step import StepSample, StepShape, TransferSample
from pdserve.node.books import ClusterBooks
from pdserve.node.learned import MAX_PAIRS, OWN_SAMPLES, KnownCosts, LearnedCosts
from pdserve.node.outbox import Outbox
from pdserve.node.report import MAX_SAMPLES, BatchLoad, LoadReporter
from pdserve.policy.cluster import ClusterView, WorkerView

PROMPT = tuple(range(2, 16))
ATTEMPT = AttemptId(RequestId("r"), Epoch(1))


@pytest.fixture
def up() -> WorkerUp:
    """What a worker of the virtual cluster says when it is ready."""
    cluster = VirtualCluster(ClusterSpec(workers=(0, 1, 0)))
    return cluster.current[WorkerId("decode-0")].up()


def book_of(books: ClusterBooks, up: WorkerUp, name: str, role: Role = Role.DECODE) -> WorkerId:
    books.add(replace(up, worker=WorkerId(name), role=role), 0.0)
    return WorkerId(name)


def report(seq: int = 1, **figures: object) -> LoadReport:
    zeros = dict.fromkeys(LoadReport.__dataclass_fields__, 0)
    for name in ("role", "steps", "transfers", "draining", "is_empty"):
        del zeros[name]
    known = {"free_blocks": 12, "total_blocks": 12, "draining": False, "seq": seq}
    return LoadReport(**{**zeros, **known, **figures})  # type: ignore[arg-type]


def decode_steps(count: int, seconds: float) -> tuple[StepSample, ...]:
    return tuple(
        StepSample(StepShape(0, 0, 1 + n % 8, 64 * (1 + n % 8)), seconds) for n in range(count)
    )


# --- what workers say ----------------------------------------------------------------------------


def test_reports_tell_of_each_step_and_each_hand_off() -> None:
    cluster = VirtualCluster(ClusterSpec(workers=(1, 1, 0)))
    cluster.run()
    cluster.submit(make_ask("r", PROMPT, max_tokens=6))
    cluster.run_for(2)
    learned = cluster.router.books.workers
    own = {worker: book.learned.own for worker, book in learned.items()}
    prefill, decode = own[WorkerId("prefill-0")], own[WorkerId("decode-0")]
    assert prefill is not None
    assert decode is not None
    assert (prefill.num_prompt_samples, prefill.num_decode_samples) == (1, 0)
    assert (decode.num_prompt_samples, decode.num_decode_samples) == (0, 5)
    view = cluster.router.books.view(cluster.now, 1)
    (transfer,) = cluster.router.books.learned.saved()[-1:]
    assert transfer.fit.line.num_samples == 1  # type: ignore[union-attr]
    assert view.token_bytes == learned[WorkerId("decode-0")].up.layout.pool_bytes(1) // 4  # type: ignore[union-attr]


def test_reports_tell_how_much_is_decoded_and_when_nothing_is_left() -> None:
    cluster = VirtualCluster(ClusterSpec(workers=(0, 0, 1)))
    cluster.run_for(0.1)
    book = cluster.router.books.workers[WorkerId("mixed-0")]
    assert book.report is not None
    assert book.report.is_empty
    for number in range(2):
        cluster.submit(make_ask(f"r{number}", (*PROMPT, number), max_tokens=40))
    cluster.run(until=lambda: book.report is not None and book.report.num_decoding == 2)
    assert book.report.context_tokens >= 2 * len(PROMPT)
    assert not book.report.is_empty
    assert book.view().context_tokens == book.report.context_tokens
    cluster.run_for(3)
    assert all(answer.is_complete for answer in cluster.client.answers.values())
    assert (book.report.num_decoding, book.report.context_tokens) == (0, 0)
    assert book.report.is_empty


def test_of_too_many_steps_the_latest_are_reported_once() -> None:
    cluster = VirtualCluster(ClusterSpec(workers=(1, 1, 0)))
    node = cluster.current[WorkerId("decode-0")].node
    load = BatchLoad(node.batch, node.inbound)
    reporter = LoadReporter(node.settings, load, node.standing, lambda: True, lambda out: None)
    for number in range(MAX_SAMPLES + 5):
        reporter.step_started(StepShape(num_decoding=1, context_tokens=number), 0.0)
        reporter.step_done(0.01)
    reporter.step_started(StepShape(num_decoding=9), 0.0)
    reporter.step_failed()
    for expected in (range(5, MAX_SAMPLES + 5), range(0)):
        out = Outbox(WorkerId("decode-0"), 0.0)
        reporter.beat(out)
        (message,) = [e.message for e in out.effects if hasattr(e, "message")]
        assert [sample.shape.context_tokens for sample in message.steps] == list(expected)


@pytest.mark.interpreted
@pytest.mark.parametrize("held", ["step", "deliver"])
def test_waiting_for_room_is_not_the_links_doing(
    held: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill and ticket come in either order: the link's time begins with the later one."""
    cluster = VirtualCluster(ClusterSpec(workers=(1, 1, 0)))
    cluster.run()
    samples: list[TransferSample | None] = []
    outbound = cluster.current[WorkerId("prefill-0")].node.outbound
    accepted = outbound.accepted
    monkeypatch.setattr(outbound, "accepted", lambda *told: samples.append(accepted(*told)))
    cluster.submit(make_ask("r", PROMPT, max_tokens=4, route=RoutePreference.SPLIT))
    cluster.run(until=lambda: len(outbound) == 1)
    cluster.run_for(0.5, hold=lambda event: event.kind == held)
    cluster.run_for(2)
    (sample,) = samples
    assert sample is not None
    assert sample.peer == "decode-0"
    assert 0.0 < sample.exposed_s < 0.3


# --- what the router makes of it -----------------------------------------------------------------


def test_a_new_worker_is_as_fast_as_its_like_until_it_has_shown_its_own_speed(up: WorkerUp) -> None:
    books = ClusterBooks()
    slow, new = book_of(books, up, "slow"), book_of(books, up, "zz-new")
    other = WorkerId("other")
    books.add(replace(up, worker=other, engine="another"), 0.0)
    untold = books.workers[other].steps
    for seq in range(8):
        message = report(seq, steps=decode_steps(32, 2.0))
        books.take_report(books.workers[slow], message, 1.0)
    assert books.workers[slow].steps.decode_s(4, 256) == pytest.approx(2.0, rel=0.1)
    assert books.workers[new].view().steps is not None
    assert books.workers[new].steps.decode_s(4, 256) == pytest.approx(2.0, rel=0.1)
    assert books.workers[other].steps == untold
    books.take_report(books.workers[new], report(steps=decode_steps(OWN_SAMPLES - 1, 0.1)), 1.0)
    assert books.workers[new].steps.decode_s(4, 256) > 0.5
    books.take_report(books.workers[new], report(2, steps=decode_steps(32, 0.1)), 1.0)
    assert books.workers[new].steps.decode_s(4, 256) == pytest.approx(0.1, rel=0.3)
    assert books.workers[new].steps.prefill_s(64) == books.workers[
        new
    ].learned.group.model().prefill_s(64)


def test_a_pair_of_workers_has_a_link_of_its_own_after_some_hand_offs() -> None:
    learned = LearnedCosts(KnownCosts(transport="shm"))
    before = learned.link
    near, far = WorkerId("near"), WorkerId("far")
    for number in range(OWN_SAMPLES):
        samples = tuple(TransferSample(far, 1_000_000 * (1 + number + k), 1.0) for k in range(2))
        learned.take_transfers(near, (samples[0],))
        learned.take_transfers(far, (replace(samples[1], peer=near, exposed_s=0.001),))
    assert set(learned.links) == {(near, far), (far, near)}
    assert learned.links[near, far].exposed_s(1_000_000) > 100 * learned.links[far, near].exposed_s(
        1_000_000
    )
    assert learned.link != before
    held = learned.links
    learned.take_transfers(near, (TransferSample(far, 1, 5.0),))
    assert learned.links is not held, "a view that was handed out has changed"


def test_of_too_many_pairs_the_one_used_last_stays() -> None:
    learned = LearnedCosts(KnownCosts())
    for number in range(MAX_PAIRS + 2):
        sample = TransferSample(WorkerId(f"d{number}"), 1000, 0.01)
        learned.take_transfers(WorkerId("p"), (sample,) * (OWN_SAMPLES if number < 2 else 1))
        if number == MAX_PAIRS // 2:
            learned.take_transfers(WorkerId("p"), (TransferSample(WorkerId("d1"), 1000, 0.01),))
    assert set(learned.links) == {("p", "d1")}


# --- views ---------------------------------------------------------------------------------------


def fresh(books: ClusterBooks, num_tokens: int) -> tuple[WorkerView, ...]:
    """The views as a router would make them that has kept none."""
    found = []
    for worker in sorted(books.workers):
        book = books.workers[worker]
        if book.accepts and book.longest_tokens >= num_tokens:
            object.__setattr__(book, "_view", None)
            found.append(book.view())
    return tuple(found)


def test_only_the_views_of_changed_books_are_made_anew(up: WorkerUp) -> None:
    books = ClusterBooks()
    names = [book_of(books, up, f"w{number}") for number in range(4)]
    first = books.view(0.0, 1)
    assert books.view(1.0, 1).workers is first.workers
    books.workers[names[1]].debit_job(7)
    books.workers[names[2]].promise(ATTEMPT, 3)
    second = books.view(0.0, 1)
    changed = [a is not b for a, b in zip(first.workers, second.workers, strict=True)]
    assert changed == [False, True, True, False]
    assert first.workers[1].pending_tokens == 0
    assert second.workers[1].pending_tokens == 7
    promised = second.workers[2]
    assert (promised.num_decoding, promised.free_blocks) == (1, first.workers[2].free_blocks - 3)
    assert promised.context_tokens == 3 * promised.block_size
    books.forget(ATTEMPT, names[2])
    assert books.view(0.0, 1).workers[2] == first.workers[2]
    assert (promised.total_blocks, promised.home_role) == (up.num_blocks, Role.DECODE)


def test_whatever_happens_to_a_book_its_view_follows(up: WorkerUp) -> None:
    books = ClusterBooks()
    names = [book_of(books, up, f"w{number}") for number in range(3)]
    book_of(books, replace(up, max_model_tokens=8), "short")

    def check() -> ClusterView:
        for num_tokens in (1, 20):
            view = books.view(0.0, num_tokens)
            assert view.workers == fresh(books, num_tokens)
        return view

    book = books.workers[names[1]]
    book.debit_job(5)
    check()
    book.promise(ATTEMPT, 2)
    check()
    book.grant(ATTEMPT)
    check()
    books.take_report(book, report(num_decoding=3, context_tokens=99, open_leases=1), 1.0)
    check()
    book.set_role(Role.MIXED, 1.0)
    check()
    book.set_drains(True)
    assert len(check().workers) == 2
    book.set_drains(False)
    assert len(check().workers) == 3
    book.set_killed()
    assert len(check().workers) == 2
    book_of(books, up, names[1], Role.PREFILL)
    assert len(check().workers) == 3
    books.remove(names[0])
    assert [view.worker for view in check().workers] == names[1:]
    book.set_killed(False)  # a book of a process that was replaced changes nothing
    check()


def test_a_router_learns_from_what_it_hears(up: WorkerUp) -> None:
    cluster = VirtualCluster(ClusterSpec(workers=(0, 1, 0)))
    cluster.run()
    worker = WorkerId("decode-0")
    latest = cluster.router.books.workers[worker].report
    assert latest is not None
    for seq in range(4):
        message = replace(latest, seq=latest.seq + seq, steps=decode_steps(32, 3.0))
        cluster.router.handle(Received(worker, Epoch(1), message), cluster.now)
    (view,) = cluster.router.books.view(cluster.now, 1).workers
    assert view.steps is not None
    assert view.steps.decode_s(2, 128) == pytest.approx(3.0, rel=0.15)
