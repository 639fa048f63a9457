"""The `seawall` command, as a person types it."""

from __future__ import annotations

import pytest

from seawall.cli import main


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAWALL_CACHE", str(tmp_path))
    return tmp_path


def test_the_list_names_each_model_its_size_and_what_to_type_to_get_it(capsys):
    assert main(["models", "list"]) == 0
    line = capsys.readouterr().out
    assert "smollm2-135m  98 MB  Apache-2.0" in line


def test_a_model_whose_source_was_removed_is_listed_with_what_was_made_of_it(capsys, tmp_path):
    made = tmp_path / "magika" / "original-v1-0123"
    made.mkdir(parents=True)
    (made / "manifest.json").write_text("{}")
    assert main(["models", "list"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line.endswith(f"  {made}")


def test_an_unknown_model_is_one_line_that_names_the_known_ones(capsys):
    assert main(["models", "add", "smollm9"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("seawall: unknown model 'smollm9'")
    assert "smollm2-135m" in error


def test_a_source_that_is_not_the_model_is_refused_and_nothing_is_left(capsys, tmp_path):
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"GGUF" + bytes(100))
    assert main(["models", "add", "smollm2-135m", "--source", str(fake)]) == 1
    assert "fake.gguf" in capsys.readouterr().err
    assert not list(tmp_path.rglob("weights*"))


def test_wrong_usage_exits_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["models", "add"])
    assert caught.value.code == 2
    assert "usage: seawall" in capsys.readouterr().err
