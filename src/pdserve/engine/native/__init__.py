"""Compiled kernels for the CPU: C++ behind a plain C interface, called on raw pointers.

`library` finds and loads them, or says that they are not there; `engine/torch` calls them through
its own seams and falls back to torch. The interface is C and not a Python extension because then
the build needs a compiler and nothing else (no Python headers, one library for every version of
Python), a call by ctypes costs about a microsecond, and the GIL is released during it.
"""
