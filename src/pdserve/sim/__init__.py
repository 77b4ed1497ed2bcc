"""The simulator: the live server's own machines and policies in virtual time.

`Simulation` drives a `RouterNode` and `WorkerNode`s: an effect becomes a future event, after as
long as the cost models say. Nothing is decided here.
"""
