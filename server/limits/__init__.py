"""Limits on what one request may cost, whichever route it goes to.

- `connections`: a request's head, and connections that send none
- `door`: headers, body, the engine's queue
- `shape`: what is in the body
- `grammars`: structured outputs, checked away from the event loop
- `messages`: how long an error message may be

`adaptive_head.vllm.limits` has the limits themselves.
"""
