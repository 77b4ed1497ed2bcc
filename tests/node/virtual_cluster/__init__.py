"""A whole cluster in one thread: real node machines, everything below them modelled.

Each worker process has memory whose slots hold a chained hash of the tokens before them, so that KV
in a wrong place is seen where it is read; an engine that runs one step, layer by layer; a transfer
thread that writes one block at a time; named timers; and links that keep order and can break.
Nothing happens by itself: `VirtualCluster.events` lists what could happen next, a test or a
schedule picks one, and every invariant that the touched node can break is checked after it.
"""

from virtual_cluster.checks import check_books_restored, check_worker
from virtual_cluster.client import Client
from virtual_cluster.cluster import Event, VirtualCluster
from virtual_cluster.oracle import Ask, make_ask
from virtual_cluster.process import Process
from virtual_cluster.spec import ClusterSpec

__all__ = [
    "Ask",
    "Client",
    "ClusterSpec",
    "Event",
    "Process",
    "VirtualCluster",
    "check_books_restored",
    "check_worker",
    "make_ask",
]
