"""Answers of a given form: which tokens may come next.

A `core.request.Constraint` is a small text that travels with a request. ``grammar`` turns it into
what the llguidance library reads, ``vocabulary`` tells that library the model's tokens, and
``masks`` says for each row of a step which tokens its constraint allows. ``checker`` is a process
of its own in which the gateway tries a constraint before it accepts a request: what a client wrote
may take long to compile, and only a process can be stopped.
"""
