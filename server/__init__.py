"""The OpenAI-compatible front end: what runs in vLLM's API process.

`adaptive-serve` (`server.cli`) starts it; `server.plugin` is what vLLM loads.
"""
