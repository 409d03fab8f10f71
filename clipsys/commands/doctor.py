"""`clipsys doctor`: what this machine has, and what would go wrong on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from typing import Literal

from clipsys.errors import ClipsysError
from clipsys.probe.machine import available_cores

#: The model whose speed stands for others of its kind.
_EXAMPLE = "ViT-B-32"

Grade = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    grade: Grade
    subject: str
    text: str


def examine() -> list[Finding]:
    """Looks at devices, codecs, FAISS, DeepSpeed, threads and disk."""
    return [
        Finding("ok", "system", f"Python {platform.python_version()}, {platform.platform()}"),
        *_devices(),
        *_speed(),
        *_codecs(),
        *_faiss(),
        *_untested(),
        *_deepspeed(),
        *_threads(),
        *_disk(),
    ]


def _devices() -> list[Finding]:
    import torch

    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    findings = [Finding("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")]
    for index in range(cuda):
        properties = torch.cuda.get_device_properties(index)
        text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        findings.append(Finding("ok", f"cuda:{index}", text))
    if not cuda and not torch.backends.mps.is_available():
        findings.append(Finding("note", "device", "no GPU; training and encoding use the CPU"))
    if shutil.which("nvidia-smi") and not cuda:
        text = "an NVIDIA driver is installed, but torch sees no GPU; install a CUDA build of torch"
        findings.append(Finding("problem", "device", text))
    return findings


def _speed() -> list[Finding]:
    """What the products of a ViT-B/32 run at on this processor, and what follows for a run."""
    import torch

    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return []
    from open_clip.model import CLIP

    from clipsys.inference import int8
    from clipsys.models.architectures import architecture_config
    from clipsys.models.devices import encoding_work
    from clipsys.probe import cache
    from clipsys.probe.figures import choose_precision
    from clipsys.probe.machine import processor
    from clipsys.probe.probing import probe

    with torch.device("meta"):  # shapes without values: nothing is downloaded or computed
        model = CLIP(**architecture_config(_EXAMPLE))
    work = encoding_work(model, _EXAMPLE, (224, 224), with_int8=int8.is_fast())
    figures = probe(work)
    if figures is None:
        text = "not measured (CLIPSYS_PROBE=off): precision auto is fp32"
        return [Finding("note", "speed", text)]
    auto = choose_precision({n: r for n, r in figures.gflops.items() if n != "int8"})
    text = f"{processor()}, {_EXAMPLE}: {figures}"
    stored = "not stored: the machine is busy" if figures.busy else f"stored in {cache.folder()}"
    where = f"precision auto is {auto}, fast is {figures.precision}; {stored}"
    return [Finding("ok", "speed", text), Finding("ok", "speed", where)]


def _codecs() -> list[Finding]:
    from PIL import features

    from clipsys.images.decoding import known_formats

    known = known_formats()
    findings = [
        Finding(
            "ok",
            "images",
            f"Pillow {_version('pillow')}, {len(known)} formats, HEIC by pillow-heif, "
            f"JPEG by simplejpeg {_version('simplejpeg')}",
        )
    ]
    for codec, name in (("jpg", "JPEG"), ("zlib", "PNG"), ("webp", "WebP"), ("avif", "AVIF")):
        if not features.check(codec):
            grade: Grade = "problem" if codec in ("jpg", "zlib") else "note"
            findings.append(Finding(grade, "images", f"this Pillow was built without {name}"))
    return findings


def _faiss() -> list[Finding]:
    installed = [
        name
        for name in ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12")
        if _version(name)
    ]
    if len(installed) > 1:
        names = " and ".join(installed)
        text = f"{names} overwrite one another; uninstall all of them and install clipsys again"
        return [Finding("problem", "faiss", text)]
    try:
        import faiss
    except ImportError as error:
        return [Finding("problem", "faiss", f"cannot be imported ({error}); install clipsys again")]
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    use = "flat, IVF-Flat and IVF-SQ8 indexes use them" if gpus else "indexes are on the CPU"
    if gpus and os.environ.get("CLIPSYS_INDEX_DEVICE") == "cpu":
        use = "CLIPSYS_INDEX_DEVICE=cpu keeps indexes off them"
    text = f"{faiss.__version__} ({', '.join(installed)}), {gpus} GPUs; {use}"
    return [Finding("ok", "faiss", text)]


#: What no machine with a GPU has run yet; `make gpu` does.
UNTESTED = "the loss in Triton kernels, FAISS on GPUs, and NCCL between ranks"


def _untested() -> list[Finding]:
    text = f"untested: {UNTESTED}; `make gpu` tests and measures them on one NVIDIA GPU"
    return [Finding("note", "GPU paths", text)]


def _deepspeed() -> list[Finding]:
    version = _version("deepspeed")
    if version is None:
        return [Finding("problem", "deepspeed", "not installed; training needs it")]
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler:
        return [Finding("ok", "deepspeed", f"{version}, C++ compiler {compiler}")]
    text = f"{version}, no C++ compiler: training works, DeepSpeed's compiled extras do not"
    return [Finding("note", "deepspeed", text)]


def _threads() -> list[Finding]:
    cores = available_cores()
    asked = os.environ.get("OMP_NUM_THREADS")
    if asked and asked.isdigit() and int(asked) > cores:
        text = f"OMP_NUM_THREADS is {asked}, more than the {cores} cores; unset it"
        return [Finding("note", "OpenMP", text)]
    return [Finding("ok", "OpenMP", f"{cores} cores, OMP_NUM_THREADS {asked or 'not set'}")]


def _disk() -> list[Finding]:
    findings = []
    for subject, folder in (("disk", "."), ("shared memory", "/dev/shm")):
        if os.path.isdir(folder):  # noqa: PTH112
            free = shutil.disk_usage(folder).free / 2**30
            low = free < 1
            text = f"{free:.1f} GiB free"
            if low and subject == "shared memory":
                text += "; decoding workers pass images through it: set data.workers=0 if they fail"
            findings.append(Finding("note" if low else "ok", subject, text))
    return findings


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def doctor() -> None:
    """Say what this machine has, and what would go wrong."""
    findings = examine()
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        mark = {"ok": "ok  ", "note": "note", "problem": "FAIL"}[finding.grade]
        print(f"{mark}  {finding.subject:{width}}  {finding.text}")
    problems = [finding for finding in findings if finding.grade == "problem"]
    if problems:
        raise ClipsysError(f"{len(problems)} problem(s) found; see the lines marked FAIL")
