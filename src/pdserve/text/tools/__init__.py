"""Calls of tools in what a model writes, and how to make it write them.

Every family of models has its own way to write a call; a `syntax.ToolSyntax` says what it is, and
``registry`` knows them by name and by the chat templates that ask for them. ``stream`` finds calls
in an answer while it is being written, ``call`` reads one, ``json_object`` checks its JSON
character by character, and ``forced`` turns tools into a grammar in which nothing but calls of them
can be written.
"""
