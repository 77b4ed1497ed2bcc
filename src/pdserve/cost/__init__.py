"""What things cost: how long steps and transfers take. Models, their fits, their priors.

Pure numbers in seconds, bytes and tokens; nothing here knows a worker, a clock or a request.
"""
