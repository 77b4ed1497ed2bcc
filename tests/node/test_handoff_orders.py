"""One hand-off, in the orders in which its messages can meet."""

from __future__ import annotations

import pytest
from virtual_cluster import make_ask
from virtual_cluster.orders import PROMPT, STAGES, of, pair, reach, submitted

from pdserve.core.events import LifeName
from pdserve.core.messages import (
    Accepted,
    HandoffAbort,
    Header,
    Ticket,
    Trailer,
)


@pytest.mark.parametrize("stage", list(STAGES))
def test_nothing_goes_wrong_without_a_fault(stage: str) -> None:
    """Whatever is held for a while."""
    together = submitted(num_choices=2)
    reach(stage, together)
    assert together.completes()
    assert LifeName.RESUMED not in together.names()
    assert together.said()[Accepted] == 2  # to the prefill worker and to the router


def test_token_0_waits_for_the_ticket_and_for_nothing_else() -> None:
    together = submitted()
    reach("prefilled, no ticket", together)
    together.cluster.run(hold=of(together.decode, "deliver"))
    assert together.cluster.client.answers["r"].tokens == [[]]
    together.cluster.run(hold=of(together.prefill, "transfer"))
    assert len(together.cluster.client.answers["r"].tokens[0]) == 1
    assert together.completes()


def test_bytes_go_out_while_later_layers_and_chunks_compute() -> None:
    together = submitted(max_step_tokens=8, one_shot_tokens=0)
    prefill = together.prefill
    together.cluster.run(hold=of(prefill, "step"))
    assert prefill.engine is not None
    for _ in range(4):  # both layers of the first of two chunks, its end, a layer of the second
        together.cluster.run(hold=of(prefill, "step"))
        prefill.compute(together.cluster.now)
    together.cluster.run(hold=of(prefill, "step"))
    (handoff,) = together.decode.node.inbound.handoffs()
    first = together.decode.memory.layers[0]
    written = [block for block in handoff.fresh if any(first[block])]
    assert written == handoff.fresh
    assert not any(together.decode.memory.layers[1][handoff.fresh[-1]])
    assert together.completes()


def test_a_short_prompt_goes_in_one_shot() -> None:
    together = submitted(one_shot_tokens=100)
    prefill = together.prefill
    together.cluster.run(hold=of(prefill, "step"))
    prefill.compute(together.cluster.now)
    together.cluster.run(hold=of(prefill, "step"))
    assert not any(any(block) for block in together.decode.memory.layers[0])
    assert together.completes()


def test_all_is_written_before_the_step_is_heard_to_have_ended() -> None:
    """`TransferSent` comes before `StepDone`: both are posted by threads of their own."""
    together = submitted()
    prefill = together.prefill
    together.cluster.run(hold=of(prefill, "posted"))
    assert prefill.engine is None
    first, second = prefill.posted
    prefill.posted.clear()
    prefill.posted.extend((second, first))
    assert type(second).__name__ == "TransferSent"
    assert together.completes()
    assert LifeName.RESUMED not in together.names()


def test_token_1_does_not_overtake_token_0() -> None:
    """What the prefill worker says is late; the decode worker repeats token 0 before its own."""
    together = submitted()
    cluster = together.cluster
    late = of(together.prefill, "to_gateway")
    cluster.run(hold=late)
    answer = cluster.client.answers["r"]
    assert answer.is_complete
    assert len(together.prefill.to_gateway) > 1
    assert together.completes()


def test_choices_share_one_prefill_and_one_ticket() -> None:
    together = submitted(num_choices=4)
    assert together.completes()
    count = together.said()
    assert (count[Header], count[Ticket], count[Trailer]) == (1, 1, 1)


def test_one_token_needs_no_ticket() -> None:
    together = submitted(max_tokens=1, num_choices=2)
    assert together.completes()
    assert together.said()[Header] == 0
    assert together.decode.node.batch.num_steps == 0


def test_a_resume_for_one_last_token_needs_no_ticket() -> None:
    together = submitted(max_tokens=3)
    answer = together.cluster.client.answers["r"]
    together.cluster.run(until=lambda: len(answer.tokens[0]) == 2)
    together.cluster.kill(together.decode)
    headers = together.said()[Header]
    together.cluster.run_for(2)
    assert answer.is_complete
    assert together.said()[Header] == headers


def first_token_ends(num_choices: int) -> int:
    """A seed with which each of the choices stops with its first token."""
    for seed in range(100_000):
        ask = make_ask("r", PROMPT, num_choices=num_choices, seed=seed, eos=True)
        if all(len(answer) == 1 for answer in ask.answers):
            return seed
    raise AssertionError("no such seed")


@pytest.mark.parametrize("stage", ["ticket held, prefill runs", "prefilled, no ticket"])
def test_a_stop_on_the_first_token_aborts_the_ticket(stage: str) -> None:
    """The client does not wait for it, and the blocks come back without quarantine."""
    together = pair()
    seed = first_token_ends(2)
    together.cluster.submit(make_ask("r", PROMPT, num_choices=2, seed=seed, eos=True))
    if stage == "ticket held, prefill runs":
        reach(stage, together)
    together.cluster.run(hold=of(together.decode, "deliver"))
    assert together.cluster.client.answers["r"].is_complete
    assert together.completes()
    assert together.said()[HandoffAbort] == 1
    assert together.decode.node.batch.num_steps == 0


def test_what_the_decode_worker_has_is_not_sent_again() -> None:
    """The second prompt has its first two blocks in common with the first one."""
    together = submitted()
    assert together.completes()
    cluster = together.cluster
    cluster.submit(make_ask("s", (*PROMPT[:9], 99, 98, 97, 96), max_tokens=4))
    assert together.completes()
    granted = [dict(e.detail) for e in cluster.life if e.name == LifeName.HANDOFF_GRANTED]
    assert [(d["blocks"], d["reused_blocks"]) for d in granted] == [(4, 0), (2, 2)]


def test_a_full_hit_on_the_decode_side_sends_nothing() -> None:
    together = pair()
    cluster = together.cluster
    cluster.submit(make_ask("r", PROMPT[:12], max_tokens=4))
    assert together.completes()
    cluster.submit(make_ask("s", PROMPT[:12], max_tokens=4, seed=2))
    assert together.completes()
    closed = [dict(e.detail) for e in cluster.life if e.name == LifeName.HANDOFF_CLOSED]
    assert [d["bytes"] > 0 for d in closed] == [True, False]


def test_another_salt_shares_nothing() -> None:
    together = submitted()
    assert together.completes()
    together.cluster.submit(make_ask("s", PROMPT, max_tokens=4, salt="other"))
    assert together.completes()
    granted = [e for e in together.cluster.life if e.name == LifeName.HANDOFF_GRANTED]
    assert [dict(e.detail)["reused_blocks"] for e in granted] == [0, 0]
