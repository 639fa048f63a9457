"""A classifier that others made and packaged: file types, through the same backend as any model."""

import json

import numpy as np
import pytest

from seawall.inference import Backend, MicroBatcher, models
from seawall.inference.errors import DependentRowsError
from seawall.inference.models.cache import sha256_of

SAMPLES = {
    "python": (
        b"import os\n\n\ndef main():\n    for name in os.listdir('.'):\n        print(name)\n\n\n"
        b"if __name__ == '__main__':\n    main()\n"
    ),
    "json": json.dumps({"name": "seawall", "tags": ["a", "b"], "sizes": [{"width": 10}] * 5}, indent=2).encode(),
    "html": b"<!DOCTYPE html>\n<html><head><title>t</title></head><body><p>Hello</p></body></html>\n",
    "pdf": b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog /Pages 2 0 R >>\nendobj\n2 0 obj\n<< /Type /Pages >>\nendobj\n",
}


def features(content):
    """The first and the last 1,024 bytes without surrounding blanks, filled up with 256."""
    head, tail = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
    row = np.full(2048, 256, np.int32)
    row[: len(head)] = np.frombuffer(head, np.uint8)
    row[2048 - len(tail) :] = np.frombuffer(tail, np.uint8)
    return row


@pytest.fixture(scope="module")
def labels(classifier_model):
    return json.loads((classifier_model.parent / "config.json").read_text())["target_labels_space"]


@pytest.fixture(scope="module")
def classifier(classifier_model):
    with Backend.load(classifier_model, finite=True) as loaded:
        yield loaded


def test_the_file_is_the_one_in_the_package(classifier_model):
    assert sha256_of(classifier_model) == models.CATALOGUE["magika"].files[0].sha256


def test_it_tells_what_files_are(classifier, labels):
    rows = np.stack([features(content) for content in SAMPLES.values()])
    scores = classifier.run_sync({"bytes": rows})["target_label"]
    assert np.abs(scores.sum(axis=1) - 1).max() < 1e-5
    assert list(SAMPLES) == [labels[best] for best in scores.argmax(axis=1)]


def test_its_rows_are_found_to_move_each_other_and_are_shared_only_where_that_is_allowed(classifier):
    """Its convolution adds up in another order for several rows: 1e-4 of a probability, measured."""
    requests = {kind: {"bytes": features(content)[None]} for kind, content in SAMPLES.items()}
    samples = list(requests.values())
    with pytest.raises(DependentRowsError, match="number of rows"):
        MicroBatcher(classifier, max_size=8, samples=samples, tolerance=1e-7)
    with MicroBatcher(classifier, max_size=8, samples=samples, tolerance=1e-2) as batcher:
        for request in samples:
            alone = classifier.run_sync(request)["target_label"]
            assert np.abs(batcher.run_sync(request)["target_label"] - alone).max() < 1e-2
