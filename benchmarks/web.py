"""What the web adds: the middleware to a request, the router to an answer of a model; and what holds under overload.

Middleware: microseconds a request, against the bare application and against slowapi (--peers); see `_web_middleware`.
Router: time to the first token and tokens a second against the engine alone, at 1, 4 and 16 clients; goodput, latency
and refusals at five times the capacity; see `_web_router`.
"""

import _web_middleware
import _web_router
from _harness import arguments, print_figures, write_results

DISTRIBUTIONS = ("anyio", "fastapi", "onnxruntime", "slowapi", "starlette", "uvicorn")


def main() -> None:
    options = arguments(__doc__)
    figures, samples, notes = _web_middleware.measure(peers=options.peers)
    ours, its, said = _web_router.measure()
    figures = {**figures, **ours}
    print_figures("What the web adds", figures, [*notes, *said])
    if options.json:
        write_results(options.json, figures, {**samples, **its}, DISTRIBUTIONS)


if __name__ == "__main__":
    main()
