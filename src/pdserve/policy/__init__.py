"""Decisions: a policy is a function of a view.

No clock, no I/O, no unseeded randomness, no logging. Ties are broken by id.
"""
