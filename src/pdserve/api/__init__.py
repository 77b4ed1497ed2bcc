"""The HTTP edge: OpenAI's routes, and ours, in front of a `gateway.Gateway`.

``app.create_app`` puts it together. A request passes ``middleware`` (its id), ``time_limits``,
``key_check`` (the key, its rights and limits), ``body`` (size, JSON) and one of the route modules;
``openai`` holds the two that generate. ``errors`` maps every error to a status, once.
``fake.FakeGateway`` stands in for the server in tests and trials.
"""
