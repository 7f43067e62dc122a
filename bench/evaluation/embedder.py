"""An embedder for dense retrieval that needs no hub: wordllama's static embeddings as a sentence-transformers model.

pip install --no-deps sentence-transformers==6.2.0 scikit-learn threadpoolctl joblib wordllama==0.4.0.post1
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from deltamem_fast.errors import MissingPackageError
from deltamem_fast.model.libraries import require, told

from ..instrument import machine

DIRECTORY = machine.ROOT / "build" / "embedder"
WEIGHTS = "weights/l2_supercat_256.safetensors"  # float16 [32000, 256], a row a token; a text is the mean of its tokens
TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``python -m bench.evaluation embedder``: none."""


def run(options: argparse.Namespace) -> int:
    """Write it."""
    print(embedder(options.output))
    return 0


def embedder(directory: Path) -> Path:
    """Write the embedder, 33 MB, into a directory that is made; returns it.

    Raises:
        ImportError: a package is missing.
    """
    require(("sentence_transformers",), "embedder")
    package = find_spec("wordllama")  # whose files are read; it is not imported
    if package is None or not package.submodule_search_locations:
        raise MissingPackageError(
            "embedder: needs the files of wordllama; pip install --no-deps wordllama==0.4.0.post1"
        )
    files = Path(package.submodule_search_locations[0])
    with told("embedder"):
        from safetensors.torch import load_file
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(files / TOKENIZER))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        (weights,) = load_file(files / WEIGHTS).values()
        module = StaticEmbedding(tokenizer, embedding_weights=weights.float())
        SentenceTransformer(modules=[module], device="cpu").save(str(directory))
    return directory
