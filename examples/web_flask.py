"""A Flask application behind policies.

`python examples/web_flask.py [PORT]`, then `curl localhost:8000/report/7`.
Several workers: `gunicorn --chdir examples web_flask:app --workers 4 --threads 8`.
"""

import sys
import time
from collections.abc import Iterator

import waitress
from flask import Flask, Response

from seawall import Bulkhead, CircuitBreaker, KeyedRateLimiter, LoadShedder, time_left
from seawall.web import Health
from seawall.web.flask import setup

per_client = KeyedRateLimiter("per client", rate=50, burst=100, key=lambda request: request.environ["REMOTE_ADDR"])
reports = Bulkhead("reports", max_concurrent=4, max_queued=16)
database = CircuitBreaker("database")
health = Health(critical=[database])

app = Flask(__name__)
setup(app, policies=[LoadShedder("front"), per_client], timeout=10.0)


@database
def rows(number: int) -> list[str]:
    time.sleep(0.01)  # a query
    return [f"row {row} of report {number}" for row in range(3)]


@app.get("/report/<int:number>")
@reports
def report(number: int) -> dict[str, object]:
    return {"rows": rows(number), "seconds_left": round(time_left(), 3)}


@app.get("/stream/<int:number>")
def stream(number: int) -> Response:
    @reports  # on the generator, so that it holds its place until the last piece is sent
    def events() -> Iterator[str]:
        for row in rows(number):
            yield f"data: {row}\n\n"

    return Response(events(), mimetype="text/event-stream", headers={"cache-control": "no-store"})


@app.get("/livez")
def livez() -> dict[str, object]:
    return health.live()[1]


@app.get("/readyz")
def readyz() -> tuple[dict[str, object], int]:
    status, content = health.ready()
    return content, status


if __name__ == "__main__":
    waitress.serve(app, host="127.0.0.1", port=int(sys.argv[1]) if sys.argv[1:] else 8000, threads=8)
