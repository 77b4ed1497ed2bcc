"""The planner: which cluster to buy for a trace, or what to make of the one that is there.

`promise` says what is to be held, `windows` cuts the trace, `bounds` says what no cluster can do
better than, `trial` is one question to the simulator and its answer, `book` remembers answers and
what follows from them, `least` and `most` search one design, `contest` lets designs compete,
`sureness` says how sure the winner is, `change` what would make another win, and `answer` puts it
all into a sentence, a table, a document and a picture.
"""
