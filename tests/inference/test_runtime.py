"""ONNX Runtime is silenced, sized to the process, and its errors are typed."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import onnxruntime
import pytest

from seawall.inference import errors
from seawall.inference.runtime import ort
from seawall.inference.runtime.threads import (
    available_threads,
    cgroup_folders,
    quota_v1,
    quota_v2,
    smallest_quota,
    thread_count,
)

SOURCE = Path(errors.__file__).parents[2]


def python(code, home, **environment):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ORT_", "XDG_", "SEAWALL_"))}
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "HOME": str(home), "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_the_package_loads_no_optional_package(tmp_path):
    done = python(
        "import sys, seawall.inference as i; i.errors, dir(i)\n"
        "print([n for n in ('numpy', 'onnxruntime', 'gguf', 'onnx', 'tokenizers', 'jinja2') if n in sys.modules])",
        tmp_path,
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_session_leaves_no_file_no_thread_and_no_socket_in_a_fresh_home(gguf, tmp_path):
    from seawall.inference.models import cache_folder

    done = python(
        "import os\n"
        "from seawall.inference import Decoder\n"
        "with Decoder.load('smollm2-135m', threads=1) as d, d.start([5, 6], max_tokens=2) as s:\n"
        "    list(s)\n"
        "    print(len(os.listdir('/proc/self/task')))\n"
        "    links = [os.path.realpath(f'/proc/self/fd/{name}') for name in os.listdir('/proc/self/fd')]\n"
        "    print([link for link in links if 'socket:' in link])",
        tmp_path,
        SEAWALL_CACHE=str(cache_folder()),
        OPENBLAS_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )
    assert done.returncode == 0, done.stderr
    assert ["1", "[]"] == done.stdout.splitlines()
    assert list(tmp_path.rglob("*")) == []


def test_telemetry_is_off_before_the_import_unless_it_is_asked_for(tmp_path):
    code = "import os\nfrom seawall.inference.runtime import ort\nprint(os.environ.get('ORT_DISABLE_TELEMETRY'))"
    assert python(code, tmp_path).stdout == "1\n"
    assert python(code, tmp_path, ORT_DISABLE_TELEMETRY="0").stdout == "1\n"
    probe = (
        "import os, sys, types\nos.environ['SEAWALL_ORT_TELEMETRY'] = '1'\nsys.modules['onnxruntime'] = None\n"
        "try:\n    import seawall.inference.runtime.ort\nexcept ImportError as e:\n    print(e)\n"
        "print(os.environ.get('ORT_DISABLE_TELEMETRY'))"
    )
    assert python(probe, tmp_path).stdout.splitlines()[-1] == "None"


def test_a_runtime_that_was_imported_first_is_warned_about(tmp_path):
    probe = (
        "import sys, types, warnings\nsys.modules['onnxruntime'] = types.ModuleType('onnxruntime')\n"
        "warnings.simplefilter('error')\nimport seawall.inference.runtime.ort"
    )
    done = python(probe, tmp_path)
    assert "RuntimeWarning: onnxruntime was imported before seawall" in done.stderr
    assert "RuntimeWarning" not in python(probe, tmp_path, ORT_DISABLE_TELEMETRY="1").stderr


@pytest.mark.parametrize(
    ("package", "module", "name"),
    [
        ("numpy", "generate.decoder", "numpy"),
        ("numpy", "quantize", "numpy"),
        ("ml_dtypes", "quantize", "ml_dtypes"),
        ("onnxruntime", "runtime.ort", "onnxruntime"),
        ("gguf", "models.gguf_file", "gguf"),
        ("onnx", "models.graph", "onnx"),
        ("tokenizers", "models.tokenizer", "tokenizers"),
        ("jinja2", "models.template", "jinja2"),
    ],
)
def test_a_missing_package_says_which_extra_to_install(tmp_path, package, module, name):
    done = python(f"import sys\nsys.modules[{package!r}] = None\nimport seawall.inference.{module}", tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("seawall.inference.errors.MissingExtraError: inference needs the package")
    assert name in last
    assert last.endswith("pip install 'seawall[cpu]'")


@pytest.mark.parametrize("package", ["numpy", "onnxruntime"])
@pytest.mark.parametrize(
    "name", ["seawall.inference import Decoder", "seawall.inference import Backend", "seawall import Backend"]
)
def test_the_convenient_names_say_so_as_well(tmp_path, package, name):
    done = python(f"import sys\nsys.modules[{package!r}] = None\nfrom {name}", tmp_path)
    assert "MissingExtraError: inference needs the package" in done.stderr


@pytest.mark.parametrize("command", ["generate hi", "serve x --port=0", "models list", "models add x", "verify x"])
def test_so_does_each_command(tmp_path, command):
    script = "import sys\nsys.modules['numpy'] = None\nfrom seawall.cli import main\n"
    done = python(f"{script}sys.exit(main({command.split()!r}))", tmp_path)
    assert done.stderr == "seawall: inference needs the package 'numpy': pip install 'seawall[cpu]'\n"


def test_two_installed_runtimes_are_refused():
    ort.check_single_distribution(["onnxruntime 1.32.0"])
    with pytest.raises(errors.RuntimeMisuseError, match="uninstall all of them"):
        ort.check_single_distribution(["onnxruntime 1.32.0", "onnxruntime-gpu 1.31.1"])
    assert len(ort.installed_distributions()) == 1


def test_a_file_that_is_no_model_is_a_typed_error(tmp_path, capfd):
    for content in (b"", b"not a model"):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(errors.RuntimeFailure, match=r"bad\.onnx") as caught:
            ort.build_session(tmp_path / "bad.onnx", threads=1)
        assert caught.value.__cause__ is not None
    with pytest.raises(errors.RuntimeMisuseError):
        ort.build_session(tmp_path / "missing.onnx", threads=1)
    assert capfd.readouterr() == ("", "")


def test_errors_of_the_runtime_are_sorted_by_what_helps():
    state = onnxruntime.capi.onnxruntime_pybind11_state
    assert isinstance(ort.typed("running", state.InvalidArgument("x")), errors.RuntimeMisuseError)
    assert isinstance(ort.typed("running", RuntimeError("Exiting due to terminate flag")),
                      errors.GenerationCancelledError)  # fmt: skip
    exhausted = ort.typed("running", state.RuntimeException("Failed to allocate memory for requested buffer"))
    assert isinstance(exhausted, errors.RuntimeExhaustedError)
    assert exhausted.retryable
    other = ort.typed("running", state.Fail("x"))
    assert (type(other), other.kind, other.retryable) == (errors.RuntimeFailure, "Fail", False)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("max 100000\n", None), ("200000 100000\n", 2.0), ("50000 100000", 0.5), ("150000", 1.5), ("", None),
     ("junk 1", None), ("1 0", None), ("-1 100000", None)],
)  # fmt: skip
def test_cgroup_v2_quotas(text, cpus):
    assert quota_v2(text) == cpus


def test_cgroup_v1_quotas():
    assert quota_v1("-1\n", "100000\n") is None
    assert quota_v1("250000\n", "100000\n") == 2.5


def test_the_tightest_quota_among_a_cgroup_and_its_parents_binds():
    files = {"app/web/cpu.max": "max 100000", "app/cpu.max": "150000 100000", "cpu.max": "800000 100000"}
    assert smallest_quota("0::/app/web\n", files.get) == 1.5
    assert smallest_quota("0::/\n", {}.get) is None


def test_a_version_1_quota_is_found_under_either_name_of_its_controller():
    lines = "11:memory:/a\n4:cpu,cpuacct:/docker/x\n"
    for mount in ("cpu,cpuacct", "cpu"):
        files = {f"{mount}/docker/x/cpu.cfs_quota_us": "50000", f"{mount}/docker/x/cpu.cfs_period_us": "100000"}
        assert smallest_quota(lines, files.get) == 0.5
    inside = {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}
    assert smallest_quota(lines, inside.get) == 3.0


def test_cgroup_folders_of_nonsense_are_the_roots():
    assert cgroup_folders("") == (["/"], ["cpu/"])
    assert cgroup_folders("garbage\n:::\n0::/../..\n")[0][0] == "/"


def test_threads_are_cpus_bounded_by_the_quota_and_never_none():
    assert [thread_count(*case) for case in ((8, None), (8, 2.5), (2, 9.0), (4, 0.1))] == [8, 3, 2, 1]
    assert 1 <= available_threads() <= len(os.sched_getaffinity(0))
    assert threading.active_count() >= 1


def test_the_runtimes_log_goes_to_logging_once_it_is_asked_for(tmp_path):
    done = python(
        "import logging, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from tests.inference import onnx_models as models\n"
        "from seawall.inference import Backend, log_runtime\n"
        "records = []\n"
        "class Keep(logging.Handler):\n"
        "    def emit(self, record): records.append(record)\n"
        "logging.getLogger('seawall.onnxruntime').addHandler(Keep())\n"
        "logging.getLogger('seawall.onnxruntime').setLevel(logging.INFO)\n"
        "def load():\n"
        "    with Backend.load(models.linear().SerializeToString(), threads=1, memory_limit=1 << 24) as backend:\n"
        "        backend.warm_up()\n"
        "load(); print(len(records))\n"
        "log_runtime(logging.INFO); load(); seen = len(records); print(seen > 5, {r.levelname for r in records})\n"
        "print(any('Session successfully initialized' in r.getMessage() for r in records))\n"
        "log_runtime(logging.CRITICAL); load(); print(len(records) - seen)\n",
        tmp_path,
    )
    assert ["0", "True {'INFO'}", "True", "0"] == done.stdout.splitlines(), done.stderr
    assert "" == done.stderr


@pytest.mark.parametrize("level", ["INFO", -1, 20.0, None])
def test_a_level_that_is_none_is_refused(level):
    with pytest.raises(errors.InvalidSettingError, match="level"):
        ort.log_runtime(level)


def test_a_runtime_that_cannot_hand_its_log_over_says_so(monkeypatch):
    monkeypatch.delattr(ort._ort, "set_default_logger_callback")
    with pytest.raises(errors.RuntimeMisuseError, match=r"1\.32 has"):
        ort.log_runtime()


def test_a_run_tells_its_graph_id_which_costs_an_exception_where_it_is_missing():
    assert ort.run_options().get_run_config_entry("gpu_graph_id") == "0"
