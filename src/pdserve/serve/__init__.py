"""The live drivers: the only place where processes, sockets, threads and clocks meet the machines.

`driver` feeds one machine and performs what it asks for. Around it stand two kinds of process: the
gateway (`gateway`, `server`, `launcher`) and the workers (`worker`, `engine_thread`, `mesh`),
joined by `links`. `inproc` puts all of it into one process, `recorder` and `replay` write down what
every machine heard and check that it would say the same again.
"""
