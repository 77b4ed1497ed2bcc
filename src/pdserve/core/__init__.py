"""The vocabulary that every other package shares: ids, requests, messages, effects, errors.

Frozen data and the standard library only. Nothing in here reads a clock, opens a socket or knows
that torch exists.
"""
