"""The playground at `/playground`: a page that colours an answer by its temperatures.

The page's files are beside this one. They need no build, and ask for nothing from elsewhere.
"""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

PLAYGROUND_PATH = "/playground"
PAGE = "index.html"
MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# `trusted-types 'none'` takes innerHTML and its like away from the scripts: what a model writes
# can only ever become text.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "connect-src 'self'",
        "img-src 'self'",
        "script-src 'self'",
        "style-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    # Kept by browsers, who ask each time whether it has changed: a page never meets old scripts.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def make_playground_router() -> APIRouter:
    """The page, and each of its files at a path below it."""
    router = APIRouter(include_in_schema=False)
    for file in sorted(Path(__file__).parent.iterdir()):
        if file.suffix in MEDIA_TYPES:
            path = PLAYGROUND_PATH if file.name == PAGE else f"{PLAYGROUND_PATH}/{file.name}"
            router.add_route(path, make_endpoint(file), methods=["GET"])
    return router


def make_endpoint(file: Path) -> Callable[[Request], Awaitable[Response]]:
    """What answers with a file's content, read now."""
    content = file.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = HEADERS | {"ETag": etag}
    media_type = MEDIA_TYPES[file.suffix]

    async def show(request: Request) -> Response:
        if etag in request.headers.get("If-None-Match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return show
