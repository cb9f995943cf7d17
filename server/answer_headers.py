"""Headers that say how an answer was sampled, for clients that drop fields they do not know."""

from urllib.parse import quote

from fastapi import Response
from fastapi.responses import StreamingResponse

from server.report import Report

POLICY = "X-Adaptive-Policy"
HEAD = "X-Adaptive-Head"
MEAN = "X-Adaptive-Mean"

# What stands for itself in a head's name; everything else is percent-encoded.
_SAFE = "!#$&'()*+,/:;=?@[]"


def add_headers(response: Response, report: Report) -> None:
    """Name the policy, the head if it is one, and the mean temperature of a whole answer.

    A stream sends its headers before its first token, so it has no mean; `report: "none"` asks for
    none. Errors get no header.
    """
    if response.status_code >= 400:
        return
    options = report.options
    response.headers[POLICY] = options.policy
    if options.policy == "head":
        response.headers[HEAD] = quote(options.name, safe=_SAFE)
    if report.detail == "none" or isinstance(response, StreamingResponse):
        return
    if (mean := report.mean) is not None:
        response.headers[MEAN] = str(round(mean, 6))
