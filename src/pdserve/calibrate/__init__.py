"""``pdserve calibrate``: measure a live server, and write what it says as a profile.

Stands above the server (whose recordings it reads), the load client (with which it asks) and the
simulator (which it checks against the same recordings).
"""
