"""A cluster with foreign engines in one thread: real node machines, real `FakeForeignEngine`s.

A foreign worker's engine thread is modelled as a queue of calls, performed by the code that the
live driver uses, with the engine's steps between them. A native worker beside it keeps, in blocks,
the states that the foreign engine would have, so that both kinds give the same tokens. Links keep
order and can break; processes can be stopped, killed and replaced. Nothing happens by itself:
`Cluster.events` lists what could happen next, and a test or a list of numbers picks one.
"""

from foreign_cluster.answers import Answer, make_request
from foreign_cluster.cluster import Cluster, Spec
from foreign_cluster.process import ForeignBackend, NativeBackend, Process

__all__ = [
    "Answer",
    "Cluster",
    "ForeignBackend",
    "NativeBackend",
    "Process",
    "Spec",
    "make_request",
]
