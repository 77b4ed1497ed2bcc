"""Accounting of KV blocks by number: who holds which, which prefixes are where. No tensors."""
