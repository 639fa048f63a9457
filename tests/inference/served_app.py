"""A WSGI application over a small model, for a real gunicorn; HOW says when the model is loaded."""

import os

from seawall.engine import Supervised
from seawall.inference import Backend
from seawall.inference.errors import ForkedBackendError
from tests.inference import onnx_models as models


def load():
    return Backend.load(models.linear().SerializeToString(), threads=1)


HOW = os.environ["HOW"]
model = Supervised("scores", load).open_sync() if HOW == "supervised" else load() if HOW == "early" else None


def app(environ, start_response):
    global model
    if model is None:
        model = load()
    try:
        text = str(model.run_sync(models.rows(1))["y"].shape)
    except ForkedBackendError as error:
        text = str(error)
    except Exception as error:
        text = type(error).__name__
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [text.encode()]
