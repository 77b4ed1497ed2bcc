"""What the router believes of its workers: never more than they have, and in the end all of it."""

from __future__ import annotations

import pytest
from virtual_cluster import (
    ClusterSpec,
    VirtualCluster,
    check_books_restored,
    make_ask,
)

from pdserve.core.request import RoutePreference

PROMPT = tuple(range(2, 16))


def test_a_ticket_counts_as_a_sequence_until_it_is_one() -> None:
    """The heartbeat after the grant has forgotten the promise, and nothing runs there yet."""
    cluster = VirtualCluster(ClusterSpec(workers=(1, 2, 0)))
    cluster.run()
    cluster.submit(make_ask("first", PROMPT, max_tokens=8))
    cluster.run_for(0.6, hold=lambda event: event.kind == "transfer")
    book = cluster.router.books.workers["decode-0"]
    assert book.report is not None
    assert (book.report.open_leases, book.promised, book.num_granted) == (1, {}, 0)
    assert book.num_decoding == 1
    cluster.submit(make_ask("second", PROMPT[1:], max_tokens=8))
    cluster.run_for(1)
    decoders = [dict(e.detail)["decode"] for e in cluster.life if e.name == "routed"]
    assert decoders == ["decode-0", "decode-1"]


@pytest.mark.parametrize("route", list(RoutePreference))
@pytest.mark.parametrize("workers", [(1, 1, 0), (0, 0, 2), (2, 1, 1)])
def test_a_promise_becomes_a_grant_becomes_a_report(
    workers: tuple[int, int, int], route: RoutePreference
) -> None:
    """No more is ever promised than there is, and at the end nothing is."""
    cluster = VirtualCluster(ClusterSpec(workers=workers, num_blocks=12))
    cluster.run()
    for number in range(4):
        prompt = (*PROMPT, number)
        cluster.submit(make_ask(f"r{number}", prompt, max_tokens=3, num_choices=1, route=route))
    promised = 0
    while events := cluster.events():
        cluster.do(events[0])
        for book in cluster.router.books.workers.values():
            total = sum(book.promised.values())
            assert total + book.granted_blocks <= book.up.num_blocks
            promised = max(promised, total)
    cluster.run_for(1.2)
    assert promised > 0
    assert all(answer.is_complete for answer in cluster.client.answers.values())
    check_books_restored(cluster.router)
