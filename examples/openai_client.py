"""Chat with a running server through the openai package, streaming.

make serve
python examples/openai_client.py [URL]
"""

from __future__ import annotations

import sys

import openai

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

with openai.OpenAI(base_url=f"{URL}/v1", api_key="none") as client:
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Why is the sky blue?"}],
        max_tokens=32,
        stream=True,
        extra_headers={"X-Pdserve-Route": "split"},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
