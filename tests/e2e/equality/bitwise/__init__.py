"""A laboratory for the numerics contract: the same request, computed in every way there is.

`Reference` computes an answer with nothing but a model runner. A `Lab` is a live cluster in this
process; `Lab.answer_all` sends it requests and compares every token and every log-probability with
the reference, bit by bit. Runners of a lab can be held at a chosen step or push, so that a worker
dies at a chosen moment.
"""

from bitwise.asks import (
    FIRST_TOKEN_KINDS,
    KINDS,
    LENGTHS,
    Ask,
    ask_of,
    prompt_of,
)
from bitwise.lab import Heard, Lab, lab_of
from bitwise.reference import Reference, Token
from bitwise.shapes import Shape

__all__ = [
    "FIRST_TOKEN_KINDS",
    "KINDS",
    "LENGTHS",
    "Ask",
    "Heard",
    "Lab",
    "Reference",
    "Shape",
    "Token",
    "ask_of",
    "lab_of",
    "prompt_of",
]
