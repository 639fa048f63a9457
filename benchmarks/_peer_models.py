"""The bundled model in the forms that the peers of `decode.py` and `speculation.py` read, made once from its GGUF file.

    hf             float32 safetensors, written by transformers from the GGUF file
    genai-int4/... by onnxruntime-genai's own builder from `hf`, with its defaults for the CPU
    f16.gguf       by llama.cpp's own quantizer from the GGUF file; that file itself serves as Q4_1

Nothing is fetched. All lie in `benchmarks/.peers/models`, which may be deleted at any time.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).parent / ".peers" / "models"
THREADS = 2
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
GENAI = ("int4", "int8", "fp32")


def prepared(gguf: Path) -> dict[str, Path]:
    """Where each form is, by name; makes what is missing, in a minute."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = {"q4": gguf, "hf": _made("hf", lambda path: _write_hf(gguf, path))}
    for precision in GENAI:
        name = f"genai-{precision}"
        found[name] = _made(name, lambda path, p=precision: _write_genai(found["hf"], path, p))  # type: ignore[misc]
    found["f16"] = _made("f16.gguf", lambda path: _write_f16(gguf, path))
    return found


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """The file or folder of that name; it gets its name when it is complete."""
    target = FOLDER / name
    if not target.exists():
        print(f"preparing {target.relative_to(FOLDER.parents[1])} for the peers", flush=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            made = Path(folder) / name
            make(made)
            made.rename(target)
    return target


def _write_hf(gguf: Path, folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "source, target = Path(sys.argv[1]), sys.argv[2]\n"
        "model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype='float32')\n"
        "model.hf_quantizer = None\n"  # with these two it refuses to save what it has expanded
        "vars(model.config).pop('quantization_config', None)\n"
        "model.save_pretrained(target)\n"
        "AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)\n"
    )
    _run("-c", code, str(gguf), str(folder))


def _write_genai(hf: Path, folder: Path, precision: str) -> None:
    build = ["-m", "onnxruntime_genai.models.builder", "-i", str(hf), "-o", str(folder), "-p", precision, "-e", "cpu"]
    with tempfile.TemporaryDirectory(dir=FOLDER) as cache:
        _run(*build, "-c", cache)
    config = folder / "genai_config.json"
    settings = json.loads(config.read_text())
    settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = THREADS
    config.write_text(json.dumps(settings, indent=1))


def _write_f16(gguf: Path, target: Path) -> None:
    code = (
        "import sys, llama_cpp as l\n"
        "wanted = l.llama_model_quantize_default_params()\n"
        "wanted.ftype, wanted.allow_requantize = l.LLAMA_FTYPE_MOSTLY_F16, True\n"
        "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), wanted))\n"
    )
    _run("-c", code, str(gguf), str(target))


def _run(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **OFFLINE}, check=False
    )
    if done.returncode:
        sys.exit(f"a peer's model could not be made:\n{done.stderr[-4000:]}")
