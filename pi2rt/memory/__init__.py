"""The KV cache: pages, their sharing, and the account of bytes."""
