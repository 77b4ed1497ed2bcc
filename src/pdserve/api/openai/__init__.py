"""OpenAI's routes: from a JSON body to `core.request.Request`, and from tokens to JSON or SSE.

``schema`` says what a body may hold, ``unserved`` what it may not hold yet, ``requests`` turns it
into requests. ``choice`` turns the tokens of one choice into text, ``generation`` does so for all
choices of an HTTP request, ``reply`` sends the result, streaming or not. ``completions`` and
``chat`` are what differs between the two endpoints: their prompts and the shape of their JSON.
"""
