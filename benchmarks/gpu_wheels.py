"""Collects what a machine for ``make gpu`` may lack, for one that has PyTorch and no network.

    make gpu-wheels                               or: python benchmarks/gpu_wheels.py --python 3.12

writes gpu-wheels/, some 30 MB: DeepSpeed, open_clip, FAISS for CPUs and what they need, in the
versions of constraints.txt; and gpu-wheels-faiss/, some 730 MB: FAISS for GPUs with its CUDA 12
libraries. Copy one or both, then ``make gpu WHEELS="gpu-wheels gpu-wheels-faiss"``: nothing is
installed for good. Without the second folder indexes are searched on the CPU, and the report says
so. PyTorch, Triton, timm, transformers, pytest and the like must be there.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "annotated-doc", "annotated-types", "braceexpand", "click", "faiss-cpu", "ftfy", "hjson",
    "open_clip_torch", "pillow_heif", "pydantic", "pydantic_core", "simplejpeg", "typer",
    "typing-extensions", "typing-inspection", "wcwidth", "webdataset",
)  # fmt: skip
#: Published as source only; pure Python once built.
SOURCES = ("deepspeed",)
FAISS_ON_GPUS = (
    "faiss-gpu",
    "nvidia-cublas-cu12",
    "nvidia-cuda-runtime-cu12",
    "nvidia-curand-cu12",
)
#: pip compares the number of each tag exactly.
_PLATFORMS = (
    "manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64",
    "manylinux2014_x86_64", "manylinux1_x86_64",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default="3.12", help="version of Python on that machine")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-wheels")
    parser.add_argument("--without-faiss-gpu", action="store_true", help="the small folder alone")
    arguments = parser.parse_args()
    versions = pinned_versions()
    download(PACKAGES, versions, arguments.out, arguments.python)
    _pip("wheel", "--wheel-dir", str(arguments.out), *_requirements(SOURCES, versions))
    folders = [arguments.out]
    if not arguments.without_faiss_gpu:
        folders.append(arguments.out.with_name(f"{arguments.out.name}-faiss"))
        download(FAISS_ON_GPUS, versions, folders[1], arguments.python)
    for folder in folders:
        wheels = list(folder.glob("*.whl"))
        size_mb = sum(wheel.stat().st_size for wheel in wheels) / 1e6
        print(f"{folder}: {len(wheels)} wheels, {size_mb:,.0f} MB")


def pinned_versions() -> dict[str, str]:
    """The versions of constraints.txt; FAISS for CPUs is that for GPUs."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    versions = {_name(name): version for name, version in pins.items()}
    return versions | {"faiss-cpu": versions["faiss-gpu"]}


def download(packages: Sequence[str], versions: dict[str, str], folder: Path, python: str) -> None:
    """Wheels for x86-64 Linux and one version of Python, whatever this machine is."""
    platforms = [option for name in _PLATFORMS for option in ("--platform", name)]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    abis = ["--abi", f"cp{python.replace('.', '')}", "--abi", "abi3", "--abi", "none"]
    requirements = _requirements(packages, versions)
    _pip("download", "--dest", str(folder), *target, *abis, *platforms, *requirements)


def _requirements(packages: Sequence[str], versions: dict[str, str]) -> list[str]:
    return [f"{package}=={versions[_name(package)]}" for package in packages]


def _name(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _pip(verb: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--no-deps", *arguments]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"error: pip {verb} failed; its message is above")


if __name__ == "__main__":
    main()
