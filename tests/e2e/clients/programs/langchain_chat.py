"""langchain-openai: an answer, a stream of it, and log-probabilities."""

import json
import sys

from langchain_openai import ChatOpenAI, OpenAI

url, model = sys.argv[1:]
options = {"base_url": f"{url}/v1", "api_key": "none", "model": model, "temperature": 0}
chat = ChatOpenAI(**options, max_tokens=12)
whole = chat.invoke("Tell me of rivers.")
streamed = "".join(chunk.content for chunk in chat.stream("Tell me of rivers."))
logged = chat.bind(logprobs=True, top_logprobs=2).invoke("Tell me of rivers.")
batch = OpenAI(**options, max_tokens=5).batch(["One river", "Two rivers"])
told = {
    "whole": whole.content,
    "streamed": streamed,
    "usage": whole.usage_metadata["output_tokens"],
    "logprobs": len(logged.response_metadata["logprobs"]["content"]),
    "batch": batch,
}
print(json.dumps(told))
