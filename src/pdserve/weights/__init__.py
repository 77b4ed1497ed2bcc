"""Where a model comes from: a folder in Hugging Face layout, pulled, given or made at random.

`pull` fetches and converts a known model, `folder` opens what lies on disk, `config` says what the
model is, `random_model` writes a small one for tests. Nothing here imports transformers.
"""
