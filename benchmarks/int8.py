"""Encoding images in fp32, bf16, our int8 and torchao's int8, alternately in one process.

    python benchmarks/int8.py [--rounds 5]       writes benchmarks/results/int8.json

The peer is torchao's dynamic quantisation (`Int8DynamicActivationInt8WeightConfig`: scales for each
row and each output channel, as ours), applied to the same forward of the same tower, so that only
the products differ. ViT-B/32 of random weights: speed does not depend on them. A ResNet, which has
no int8 form, stands beside it in fp32 and bf16. The products of a block are compared one by one
too, there also with torchao's compiled by `torch.compile`, which it is made for.

Everything runs on one thread, as images are encoded where each thread takes its own, and is timed
by that thread's processor time: a machine that does something else as well gives the same ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.inference import image_tower
from clipsys.inference.int8 import Int8Linear
from clipsys.inference.threads import Arrangement, in_chunks, limited_threads
from clipsys.models.open_clip_models import build_model
from clipsys.probe import machine

MODEL, RESNET = "ViT-B-32", "RN50"
Encode = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    image_BCHW = torch.randn(arguments.batch, 3, 224, 224)
    tower = build_model(MODEL).model.eval().requires_grad_(False)
    resnet = build_model(RESNET).model.eval().requires_grad_(False)
    cores = machine.available_cores()
    report = {
        "batch": arguments.batch,
        MODEL: _compare(_ways(tower), image_BCHW, arguments.rounds),
        RESNET: _compare(_float_ways(resnet.encode_image), image_BCHW, arguments.rounds),
        "products, one thread": _products(arguments.rounds),
        "machine": {**machine.describe(), "cores": cores, "instructions": _instructions()},
    }
    print(f"this process waited {machine.waiting_s():.1f} s for cores", file=sys.stderr)
    out = Path(__file__).parent / "results" / "int8.json"
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def _float_ways(encode: Encode) -> dict[str, tuple[Encode, int]]:
    def in_bf16(image_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return encode(image_BCHW)

    chunk = image_tower.CPU_CHUNK
    return {"fp32": (encode, chunk), "bf16": (in_bf16, chunk)}


def _ways(model: Any) -> dict[str, tuple[Encode, int]]:
    """Name -> how to encode, and how many images pass together."""
    chunk = image_tower.INT8_CHUNK
    make = image_tower._ClassTokenTower
    ways = _float_ways(image_tower.image_encoder(model))
    ways["int8 of clipsys"] = (make(model.visual, Int8Linear), chunk)
    ways["int8 of torchao"] = (make(model.visual, _torchao), chunk)
    return ways


def _torchao(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = torch.nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None)
    layer.weight = torch.nn.Parameter(weight_OI.detach().contiguous(), requires_grad=False)
    if bias_O is not None:
        layer.bias = torch.nn.Parameter(bias_O.detach(), requires_grad=False)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    return layer.eval()


def _products(rounds: int) -> dict[str, Any]:
    """Milliseconds of each product of a block, for as many tokens as pass a thread at once."""
    rows_NI = {width: torch.randn(50 * image_tower.INT8_CHUNK, width) for width in (768, 3072)}
    report = {}
    for inputs, outputs in ((768, 2304), (768, 768), (768, 3072), (3072, 768)):
        weight_OI, bias_O = torch.randn(outputs, inputs) / 28, torch.randn(outputs)
        layer = _torchao(weight_OI, bias_O)
        ways: dict[str, Encode] = {
            "fp32": partial(F.linear, weight=weight_OI, bias=bias_O),
            "int8 of clipsys": Int8Linear(weight_OI, bias_O),
            "int8 of torchao": layer,
            "int8 of torchao, compiled": torch.compile(layer),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        errors = {}
        with torch.no_grad(), limited_threads(1):
            exact = ways["fp32"](rows_NI[inputs])
            for name, multiply in ways.items():
                errors[name] = float((multiply(rows_NI[inputs]) - exact).norm() / exact.norm())
            for _ in range(20 * rounds):
                for name, multiply in ways.items():
                    started = time.thread_time()
                    multiply(rows_NI[inputs])
                    times[name].append(1000 * (time.thread_time() - started))
        report[f"{inputs} x {outputs}"] = {
            name: {
                "milliseconds": round(statistics.median(own), 3),
                "relative_error": round(errors[name], 5),
            }
            for name, own in times.items()
        }
    return report


def _compare(
    ways: dict[str, tuple[Encode, int]], image_BCHW: torch.Tensor, rounds: int
) -> dict[str, Any]:
    """Images a second of one core, each way taking turns."""
    chunked = {
        name: in_chunks(encode, chunk, Arrangement(1)) for name, (encode, chunk) in ways.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode(), limited_threads(1):
        features = {name: encode(image_BCHW).float() for name, encode in chunked.items()}
        for _ in range(rounds):
            for name, encode in chunked.items():
                started = time.thread_time()
                encode(image_BCHW)
                rates[name].append(len(image_BCHW) / (time.thread_time() - started))
    exact_BD, usual = features["fp32"], statistics.median(rates["fp32"])
    return {
        name: {
            "images_per_core_s": round(statistics.median(own), 2),
            "times_fp32": round(statistics.median(own) / usual, 2),
            "cosine_with_fp32": round(
                float(F.cosine_similarity(features[name], exact_BD).min()), 6
            ),
        }
        for name, own in rates.items()
    }


def _instructions() -> dict[str, bool]:
    return {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "vnni": torch.cpu._is_vnni_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
