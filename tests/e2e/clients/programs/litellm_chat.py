"""litellm: an answer, a stream of it, and an error as its own exception."""

import json
import sys

import litellm

url, model = sys.argv[1:]
messages = [{"role": "user", "content": "Tell me of rivers."}]
options = {
    "model": f"openai/{model}",
    "api_base": f"{url}/v1",
    "api_key": "none",
    "messages": messages,
    "temperature": 0,
    "max_tokens": 12,
}
whole = litellm.completion(**options)
streamed = "".join(
    c.choices[0].delta.content or "" for c in litellm.completion(**options, stream=True)
)
try:
    litellm.completion(**{**options, "max_tokens": 10**6})
    refused = ""
except litellm.BadRequestError as error:
    refused = str(error)
told = {
    "whole": whole.choices[0].message.content,
    "streamed": streamed,
    "usage": whole.usage.completion_tokens,
    "refused": refused,
}
print(json.dumps(told))
