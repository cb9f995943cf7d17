"""Limits on what one request may cost, whichever route it goes to.

- `connections`: a request's head, and connections that send none
- `door`: headers, body, the engine's queue
- `body`: whether the body can be read
- `shape`: what is in it
- `grammars`: structured outputs, checked away from the event loop
- `mistakes`: 400 rather than 500 for what cannot be read all the same
- `messages`: how long an error message may be

`adaptive_head.vllm.limits` has the limits themselves.
"""
