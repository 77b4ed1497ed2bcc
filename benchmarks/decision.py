"""What a routing decision costs the gateway: every policy, among few workers and many.

The router's own books are filled with workers that have reported loads of their own. Each decision
is the whole of what the router does for it: a report and a debit have changed two books, the view
is renewed, and the policy chooses. Beside it stands hashing the prompt's blocks, which is done once
a request whatever the policy. Figures are medians of CPU time, the policies taking turns; the ratio
is to `round_robin`, which compares nothing.

    taskset -c 1 python benchmarks/decision.py [--workers 32,1024] [--prompt 2048]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import replace

from pdserve.core.effects import WorkerUp
from pdserve.core.ids import AttemptId, Epoch, RequestId, WorkerId
from pdserve.core.layout import KvLayout
from pdserve.core.messages import LoadReport
from pdserve.core.request import Role
from pdserve.kv.hashing import block_hashes, root_hash
from pdserve.node.books import ClusterBooks
from pdserve.policy.cluster import RouteAsk
from pdserve.policy.registry import ROUTE_POLICIES, make_policy

LAYOUT = KvLayout(
    num_layers=32,
    num_kv_heads=8,
    head_dim=128,
    block_size=16,
    dtype="bf16",
    numerics="class",
    weights_digest="weights",
)
ROLES = (Role.PREFILL, Role.DECODE, Role.DECODE, Role.MIXED)
NUM_BLOCKS = 4000


def report(rng: random.Random, seq: int) -> LoadReport:
    decoding = rng.randrange(40)
    return LoadReport(
        seq=seq,
        last_route_seq=0,
        pending_prefill_tokens=rng.randrange(8000),
        num_waiting=rng.randrange(4),
        num_running=decoding,
        num_decoding=decoding,
        context_tokens=decoding * 1000,
        free_blocks=NUM_BLOCKS - decoding * 65,
        total_blocks=NUM_BLOCKS,
        cached_blocks=0,
        quarantined_blocks=0,
        open_leases=0,
        num_preemptions=0,
        num_steps=seq,
        prefix_queries_tokens=0,
        prefix_hits_tokens=0,
        transfer_bytes=0,
        step_age_s=0.0,
        step_expected_s=0.0,
        draining=False,
    )


def books_of(num_workers: int, rng: random.Random) -> ClusterBooks:
    books = ClusterBooks()
    for number in range(num_workers):
        role = ROLES[number % len(ROLES)]
        up = WorkerUp(
            worker=WorkerId(f"{role}-{number:04}"),
            epoch=Epoch(1),
            role=role,
            layout=LAYOUT,
            num_blocks=NUM_BLOCKS,
            max_model_tokens=32_768,
            pid=1,
            device="cpu",
            engine="torch",
        )
        books.take_report(books.add(up, 0.0), report(rng, 1), 0.0)
    return books


def decide(books: ClusterBooks, name: str, ask: RouteAsk, rng: random.Random) -> float:
    """Milliseconds of CPU for one decision, with what has changed before it."""
    policy = make_policy(name)
    workers = list(books.workers)
    reporter, debited = books.workers[rng.choice(workers)], books.workers[rng.choice(workers)]
    attempt = AttemptId(RequestId(f"r{ask.number}"), Epoch(1))
    news = report(rng, ask.number)
    began_s = time.process_time()
    books.take_report(reporter, news, 1.0)
    debited.promise(attempt, 65)
    route = policy.choose(books.view(1.0, 4096), ask)
    took_s = time.process_time() - began_s
    assert route is not None
    debited.take_back(attempt)
    return took_s * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workers", default="32,1024")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens")
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    sizes = [int(number) for number in arguments.workers.split(",")]
    rng = random.Random(0)
    took: dict[tuple[str, int], list[float]] = {}
    ask = RouteAsk(
        num_tokens=arguments.prompt,
        num_blocks=arguments.prompt // 16 + 1,
        max_output_tokens=500,
        output_tokens=200.0,
    )
    all_books = {size: books_of(size, rng) for size in sizes}
    for number in range(arguments.rounds):
        for size, books in all_books.items():
            holders = rng.sample(list(books.workers), min(16, size))
            asked = replace(ask, number=number + 2, cached_tokens=dict.fromkeys(holders, 512))
            for name in ROUTE_POLICIES:
                took.setdefault((name, size), []).append(decide(books, name, asked, rng))
    root = root_hash(LAYOUT, "")
    tokens = [rng.randrange(30_000) for _ in range(arguments.prompt)]
    hashing = []
    for _ in range(arguments.rounds):
        began_s = time.process_time()
        block_hashes(root, tokens, 16)
        hashing.append((time.process_time() - began_s) * 1e3)
    columns = [f"{size} workers, ms (times round_robin)" for size in sizes]
    print("| policy | " + " | ".join(columns) + " |\n| --- |" + " ---: |" * len(sizes))
    for name in ROUTE_POLICIES:
        cells = []
        for size in sizes:
            median, least = (statistics.median(took[each, size]) for each in (name, "round_robin"))
            cells.append(f"{median:.3f} ({median / least:.1f})")
        print(f"| {name} | " + " | ".join(cells) + " |")
    median = statistics.median(hashing)
    print(f"\nhashing {arguments.prompt} tokens, once a request: {median:.3f} ms")


if __name__ == "__main__":
    main()
