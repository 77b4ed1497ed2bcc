"""What is asked of a server: requests with arrival times, lengths and prompts that can repeat.

A workload is an iterator of `request.TraceRequest`: generated (``synthetic``) or read (``traces``),
then shaped (``shaping``). The load client sends it to a real server, the simulator to a simulated
one; what came of it is a list of `outcome.Outcome`, and ``summary`` turns that into figures. So
both have the same load and the same definitions. Everything random comes from a seed.
"""
