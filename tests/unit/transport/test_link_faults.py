"""Links that are slow on purpose: so many times slower, by the clock."""

from __future__ import annotations

import threading

from pdserve.core.ids import WorkerId
from pdserve.transport.link_faults import LinkFault, LinkFaults, Throttle

A, B, C = map(WorkerId, "abc")


def test_each_worker_finds_its_own_links_and_the_worst_of_each() -> None:
    faults = LinkFaults(
        (
            LinkFault(one=A, other=B, factor=2.0),
            LinkFault(one=B, other=A, factor=5.0),
            LinkFault(one=A, other=B, factor=3.0),
            LinkFault(one=B, other=C, factor=2.0),
            LinkFault(one=C, other=B, factor=None),
            LinkFault(one=B, other=C, factor=4.0),
        )
    )
    assert faults.of(A) == {B: 5.0}
    assert faults.of(B) == {A: 5.0, C: None}
    assert faults.of(WorkerId("d")) == {}


def test_a_write_takes_the_factor_times_as_long() -> None:
    now, waited = [0.0], []
    throttle = Throttle(lambda peer: 4.0 if peer == A else 1.0, clock=lambda: now[0])
    throttle.wait = waited.append  # type: ignore[method-assign]
    begun_s = throttle.begin()
    now[0] += 0.5
    throttle.end(A, begun_s)
    throttle.end(B, begun_s)
    assert waited == [1.5]


def test_closing_ends_a_wait_and_all_later_ones() -> None:
    throttle = Throttle(lambda peer: 1e9)
    waiter = threading.Thread(target=throttle.wait, args=(600.0,))
    waiter.start()
    throttle.close()
    waiter.join(20)
    assert not waiter.is_alive()
    throttle.wait(600.0)
