"""seawall at the edge of an application: refusals become HTTP answers, and deadlines travel.

Nothing here needs a web framework: ASGI and WSGI are protocols.
"""

from __future__ import annotations

from seawall.web.answers import Answer, Answers
from seawall.web.asgi import SeawallMiddleware
from seawall.web.bodies import BodyTooLargeError
from seawall.web.health import Health
from seawall.web.intake import deadline_headers, seconds_left
from seawall.web.metrics import Metrics
from seawall.web.wsgi import SeawallWSGIMiddleware

__all__ = [
    "Answer",
    "Answers",
    "BodyTooLargeError",
    "Health",
    "Metrics",
    "SeawallMiddleware",
    "SeawallWSGIMiddleware",
    "deadline_headers",
    "seconds_left",
]
