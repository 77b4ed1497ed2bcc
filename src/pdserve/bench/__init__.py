"""The load client: ``pdserve bench`` sends a workload to any OpenAI-compatible server.

``arguments`` says what can be asked for, ``plan`` makes the workload of it, ``run`` sends each
request at its time through ``target`` (what is said to the server) and ``connection`` (how), an
``answer`` keeps the times of each, and ``report`` and ``plot`` show what ``workload.summary`` makes
of them.
"""
