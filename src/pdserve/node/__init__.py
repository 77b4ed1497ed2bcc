"""Sans-I/O machines: `(input, now) -> effects`, the same in the live server and in a simulator.

All queues, block accounting, leases, timeouts, retries and aborts live here. A machine never
blocks, never reads a clock and never fails because of what another node says.
"""
