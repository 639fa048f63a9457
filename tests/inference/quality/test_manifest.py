"""Scores in the manifest, and the gate at every load."""

import json
import shutil

import pytest

from seawall.inference import Backend, Decoder
from seawall.inference.errors import CorruptModelError, InvalidSettingError, QualityGateError
from seawall.inference.models.cache import read_verified
from seawall.inference.quality import Gate, quality_report, record, verify
from seawall.inference.quality.manifest import check

TOKENS = [3, 4, 5, 6, 7, 8, 9, 10] * 4
IMPOSSIBLE, EASY = Gate(kl=0.0), Gate(kl=10.0, top1=0.0)


@pytest.fixture(scope="module")
def report(decoders):
    return quality_report(decoders["fp32"], decoders["int4-rtn"], [TOKENS])


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the tiny model in 4 bits."""
    return shutil.copytree(folders["int4-rtn"], tmp_path / "model")


def loads(folder, **settings):
    """Load it in both ways."""
    Decoder.load(folder, context=32, threads=1, **settings).close()
    Backend.load(folder, threads=1, **settings).close()


def changed(folder, change):
    """Edit the manifest by hand."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_folder_that_keeps_its_gate_loads_and_its_scores_are_in_the_manifest(folder, report):
    assert [] == record(folder, report, EASY)
    quality = read_verified(folder)["quality"]
    assert report.scores == quality["scores"]
    assert {"kl": 10.0, "top1": 0.0} == quality["gate"]
    assert ("tiny", "fp32", report.reference.digest) == tuple(
        quality["reference"][k] for k in ("name", "precision", "digest")
    )
    assert {"digest": report.data_digest, "compared": 32} == quality["data"]
    assert "onnxruntime" in quality["versions"]
    loads(folder)
    assert verify(folder).passed


def test_a_folder_that_fails_its_gate_is_refused_unless_asked_for_explicitly(folder, report):
    (failure,) = record(folder, report, IMPOSSIBLE)
    assert ("kl", report.scores["kl"], 0.0) == (failure.measure, failure.measured, failure.limit)
    for kind in (Decoder, Backend):
        with pytest.raises(QualityGateError, match=r"kl is .*\(at most 0\).*check_quality=False") as caught:
            kind.load(folder)
        assert report.scores["kl"] == caught.value.measured
    loads(folder, check_quality=False)
    found = verify(folder)
    assert not found.passed
    assert "kl is" in found.problems[0]


def test_the_path_of_the_file_is_no_way_around_the_gate(folder, report):
    record(folder, report, IMPOSSIBLE)
    with pytest.raises(QualityGateError):
        Backend.load(folder / "model.onnx")


def test_scores_edited_by_hand_are_found_by_the_seal(folder, report):
    record(folder, report, IMPOSSIBLE)
    changed(folder, lambda manifest: manifest["facts"]["quality"]["scores"].update(kl=0.0))
    for kind in (Decoder, Backend):
        with pytest.raises(CorruptModelError):
            kind.load(folder)
    assert ("manifest.json was changed after it was sealed",) == verify(folder).problems


def test_taking_the_record_out_by_hand_is_found_as_well(folder, report):
    record(folder, report, IMPOSSIBLE)
    changed(folder, lambda manifest: manifest["facts"].pop("quality"))
    for kind in (Decoder, Backend):
        with pytest.raises(CorruptModelError):
            kind.load(folder)


def test_recording_changes_no_file_but_the_manifest_and_can_be_repeated(folder, report):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    record(folder, report, IMPOSSIBLE)
    record(folder, report, EASY)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == after.keys()
    assert ["manifest.json"] == [name for name in after if before[name] != after[name]]
    assert {**read_verified(folder), "quality": 0} == {**json.loads(before["manifest.json"])["facts"], "quality": 0}
    loads(folder)


def test_a_report_about_another_model_is_not_recorded(folders, tmp_path, report):
    other = shutil.copytree(folders["int8"], tmp_path / "other")
    with pytest.raises(InvalidSettingError, match="report is about a model of digest"):
        record(other, report, EASY)


def test_a_damaged_folder_gets_no_record_and_verify_names_the_file(folder, report):
    weights = bytearray((folder / "weights.bin").read_bytes())
    weights[10] ^= 1
    (folder / "weights.bin").write_bytes(weights)
    with pytest.raises(CorruptModelError):
        record(folder, report, EASY)
    assert ("weights.bin is not the file that was sealed",) == verify(folder).problems
    (folder / "weights.bin").unlink()
    assert ("weights.bin is missing",) == verify(folder).problems
    (folder / "manifest.json").write_text("[]")
    assert ("it has no usable manifest.json",) == verify(folder).problems


def test_other_versions_are_a_note_and_no_failure(folder, report, monkeypatch):
    from seawall.inference.quality import manifest

    record(folder, report, EASY)
    monkeypatch.setattr(manifest, "versions", lambda: {"onnxruntime": "9.9", "numpy": "9"})
    found = verify(folder)
    assert found.passed
    assert any(note.startswith("measured with onnxruntime") and "here is 9.9" in note for note in found.notes)


def test_a_model_that_nobody_measured_loads_and_verify_says_so(folder):
    loads(folder)
    found = verify(folder)
    assert found.passed
    assert any("no quality was recorded" in note for note in found.notes)


@pytest.mark.parametrize("quality", [None, [], "good", {}, {"gate": {}}, {"gate": {"kl": "x"}, "scores": {}},
                                     {"gate": {"beauty": 1}, "scores": {}}, {"gate": {}, "scores": {"kl": "low"}},
                                     {"gate": {}, "scores": []}])  # fmt: skip
def test_a_record_that_cannot_be_read_is_damage_and_not_a_pass(quality):
    with pytest.raises(CorruptModelError, match="unusable"):
        check({"quality": quality}, "model")


def test_a_manifest_of_somebody_else_is_none_of_ours(folder):
    (folder / "manifest.json").write_text('{"name": "my web app"}')
    Backend.load(folder, threads=1).close()


@pytest.mark.parametrize("content", ["", "{", '{"facts": {"quality"', "\x00", "[" * 100_000])
def test_a_manifest_that_was_half_written_is_damage_and_no_way_around_the_gate(folder, report, content):
    record(folder, report, IMPOSSIBLE)
    (folder / "manifest.json").write_text(content)
    for kind in (Decoder, Backend):
        with pytest.raises(CorruptModelError, match=r"manifest\.json"):
            kind.load(folder, threads=1)


def test_a_manifest_whose_seal_was_taken_out_is_damage_too(folder, report):
    record(folder, report, IMPOSSIBLE)
    changed(folder, lambda manifest: (manifest.pop("seal"), manifest["facts"].pop("quality")))
    for kind in (Decoder, Backend):
        with pytest.raises(CorruptModelError, match=r"manifest\.json"):
            kind.load(folder, threads=1)


@pytest.mark.parametrize("gate", [0.95, "int8", {"kl": 0.005}])
def test_a_gate_that_is_none_is_refused(folder, report, gate):
    with pytest.raises(InvalidSettingError, match="gate must be a Gate, or None"):
        record(folder, report, gate)


def test_a_record_cannot_be_written_into_a_folder_that_cannot_hold_it(folder, report, monkeypatch):
    from seawall.inference.errors import ModelCacheError
    from seawall.inference.models import cache

    before = (folder / "manifest.json").read_bytes()
    monkeypatch.setattr(cache.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ModelCacheError, match="No space left"):
        record(folder, report, EASY)
    monkeypatch.undo()
    with pytest.raises(ModelCacheError, match="larger than 1 MiB"):
        cache.rewrite_facts(folder, lambda facts: {**facts, "diary": "x" * (1 << 20)})
    assert before == (folder / "manifest.json").read_bytes()
    assert verify(folder).passed
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("check_quality", [True, False])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_backend_refuses_a_file_that_is_not_the_one_that_was_sealed(folder, damage, check_quality):
    weights = max((path for path in folder.iterdir() if path.suffix != ".json"), key=lambda path: path.stat().st_size)
    content = weights.read_bytes()
    weights.unlink()
    if damage != "gone":
        end = bytes([content[-1] ^ 1]) if damage == "changed" else b""
        weights.write_bytes(content[:-1] + end)
    with pytest.raises(CorruptModelError, match=f"{weights.name} is"):
        Backend.load(folder / "model.onnx", threads=1, check_quality=check_quality)
