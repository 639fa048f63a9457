"""The bootstrap: what it installs, when it does not, and what it says when it can't."""

import ast
import importlib.util
import os
import sys
import threading
from pathlib import Path

import pytest

import dev


class Steps(list):
    """Stands in for `dev.step`: notes the commands instead of running them."""

    def __call__(self, command, advice, env=None):
        self.append(list(command))

    def with_word(self, word):
        return [command for command in self if word in command]


@pytest.fixture
def steps(monkeypatch):
    recorded = Steps()
    monkeypatch.setattr(dev, "step", recorded)
    return recorded


@pytest.fixture
def environment(tmp_path):
    """An environment that looks created, with a Python that answers yes."""
    made = dev.Environment(tmp_path / ".venv")
    made.bin.mkdir(parents=True)
    made.python.write_text("#!/bin/sh\n")
    made.python.chmod(0o755)
    return made


NEEDS = dev.Needs(extras=("cpu", "cli"), groups=("test",))


def test_needs_are_installed_once(environment, steps):
    environment.ensure(NEEDS)
    environment.ensure(NEEDS)

    (install,) = steps
    assert f"{dev.ROOT}[cpu,cli]" in install
    assert f"{dev.ROOT / 'pyproject.toml'}:test" in install
    assert str(dev.ROOT / "constraints.txt") in install


def test_other_needs_are_installed_beside(environment, steps):
    environment.ensure(NEEDS)
    environment.ensure(dev.Needs(groups=("docs",)))
    environment.ensure(NEEDS)

    assert 2 == len(steps)


def test_changed_settings_are_installed_again(environment, steps, monkeypatch):
    environment.ensure(NEEDS)
    monkeypatch.setattr(sys, "version", "another Python")
    environment.ensure(NEEDS)

    assert 2 == len(steps)


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt", "peers.txt"])
def test_the_fingerprint_follows_every_file(tmp_path, monkeypatch, changed):
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    for name in ("pyproject.toml", "constraints.txt", "peers.txt"):
        (tmp_path / name).write_text("before")
    needs = dev.Needs(files=("peers.txt",))
    before = dev.fingerprint(needs, tmp_path)

    (tmp_path / changed).write_text("after")

    assert before != dev.fingerprint(needs, tmp_path)


def test_a_failed_install_is_tried_again(environment, monkeypatch):
    def fail(command, advice, env=None):
        raise dev.StepFailedError(advice)

    monkeypatch.setattr(dev, "step", fail)
    with pytest.raises(dev.StepFailedError, match="PIP_INDEX_URL"):
        environment.ensure(NEEDS)
    later = Steps()
    monkeypatch.setattr(dev, "step", later)
    environment.ensure(NEEDS)

    assert 1 == len(later)


def test_a_fresh_environment_is_made_without_ensurepip(tmp_path, steps, monkeypatch):
    """Debian without python3-venv has no ensurepip; the pip of the system reaches into the environment."""
    made = dev.Environment(tmp_path / ".venv")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "pip" or None)

    made.ensure(dev.Needs())

    venv, pip, install = steps
    assert "--without-pip" in venv
    assert [sys.executable, "-m", "pip", "--python", str(made.python)] == pip[:5]
    assert "--editable" in install


def test_without_a_system_pip_ensurepip_serves(tmp_path, steps, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "ensurepip" or None)

    dev.Environment(tmp_path / ".venv").ensure(dev.Needs())

    assert steps.with_word("ensurepip")


def test_without_any_pip_it_says_what_to_install(tmp_path, steps, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    with pytest.raises(dev.StepFailedError, match="apt install python3-pip"):
        dev.Environment(tmp_path / ".venv").ensure(dev.Needs())


def test_a_broken_environment_is_made_anew(environment, steps):
    environment.python.write_text("#!/bin/sh\nexit 1\n")

    environment.ensure(dev.Needs())

    assert steps.with_word("venv")


def test_two_at_once_install_once(environment, steps):
    ready = threading.Barrier(2)

    def ensure():
        ready.wait()
        environment.ensure(NEEDS)

    threads = [threading.Thread(target=ensure) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert 1 == len(steps)


def test_a_failed_step_names_the_command_and_the_cure():
    with pytest.raises(dev.StepFailedError, match=r"exit 3 from: .*\nbuy a disk"):
        dev.step([sys.executable, "-c", "raise SystemExit(3)"], "buy a disk")


def test_every_check_runs_even_if_one_fails(environment, monkeypatch, capfd):
    ran = []
    monkeypatch.setattr(dev, "ready", lambda _: environment)
    monkeypatch.setattr(dev.Environment, "run", lambda _, *command: ran.append(command) or len(ran) == 1)

    assert 1 == dev.main(["check"])
    assert len(dev.CHECKS) == len(ran)
    assert f"failed: {next(iter(dev.CHECKS))}\n" in capfd.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["check", "unknown"]])
def test_what_it_does_not_know_ends_with_help(arguments, capfd):
    assert 2 == dev.main(arguments)
    assert "python3 dev.py" in capfd.readouterr().out


def test_json_of_all_benchmarks_at_once_is_refused(capfd):
    with pytest.raises(SystemExit):
        dev.main(["bench", "--json", "all.json"])
    assert "needs the NAME" in capfd.readouterr().err


def test_bench_alone_runs_every_benchmark(monkeypatch):
    ran = []
    monkeypatch.setattr(dev, "bench_one", lambda name, json, peers: ran.append(name) or 0)

    assert 0 == dev.main(["bench"])
    assert "overhead" in ran
    assert not [name for name in ran if name.startswith("_")]


def test_benchmarks_with_the_same_peers_share_an_environment(monkeypatch):
    made = []
    monkeypatch.setattr(dev.Environment, "ensure", lambda self, needs: made.append((self.folder.name, needs.files)))
    monkeypatch.setattr(dev.Environment, "run", lambda self, *arguments: 0)

    for name in ("decode", "speculation"):
        assert 0 == dev.bench_one(name, None, peers=True)

    assert 2 * [("decode", ("benchmarks/peers-requirements/decode.txt",))] == made


def test_the_bootstrap_needs_the_standard_library_only():
    tree = ast.parse(Path(dev.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}

    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_ci_checks_first_and_closes_on_the_tests():
    script = dev.ROOT / ".ci" / "run"
    commands = [line.split() for line in script.read_text().splitlines() if "dev.py" in line]

    assert os.access(script, os.X_OK)
    assert ["check", "test"] == [command[-1] for command in commands]
