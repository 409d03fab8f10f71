"""open_clip's input pipeline beside ours: images per second and core.

    python benchmarks/pipeline.py --images FOLDER       writes benchmarks/results/pipeline.json

Both read the same shards in one process with one thread, in turn; the figure is the median over the
rounds. open_clip's side is its webdataset pipeline as `open_clip_train/data.py` builds it (tar
expander, ``decode("pilrgb")``, its transform and its tokenizer, batches), ours is
`TrainingBatches` as the training loop reads it. What each delivers differs: open_clip float32
images, augmented and normalised; we uint8 images, which the training device augments and
normalises, and both token ids. ``clipsys_later_epochs`` is ours once every image has been decoded:
the pixels are kept (``data.pixel_cache_gb``), which open_clip's pipeline has no counterpart of.
``run_of_3_epochs`` and ``run_of_10_epochs`` are whole runs of both, the first epoch included.
``stages_ms`` says where the time of our first epoch goes, and what bounds it: a JPEG's entropy code
must be read whatever is made of the image. Two sets of JPEGs:

    small     the images of FOLDER as they are (Flickr8k: 500 pixels on the longer side)
    large     the same, enlarged to 12 megapixels with noise, quality 90
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import PIL
import simplejpeg
import torch
import webdataset
from PIL import Image

from clipsys.images.decoding import EXTENSIONS, decode_image, decode_stored
from clipsys.images.preprocessing import Preprocessing
from clipsys.models.open_clip_models import build_model
from clipsys.shards.random_access import ShardReader
from clipsys.shards.samples import Sample, parse_sample
from clipsys.shards.writing import write_shards
from clipsys.training.data.batches import TrainingBatches
from clipsys.training.data.config import DataConfig
from clipsys.training.data.ordering import sample_order
from clipsys.training.data.samples import Decoder
from clipsys.training.data.shard_set import open_shards

SIZE = 224
RUNS = (3, 10)
BATCH = 8
LARGE = (4000, 3000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of JPEGs; default: drawn ones")
    parser.add_argument("--small", type=int, default=80, help="how many small images")
    parser.add_argument("--large", type=int, default=8, help="how many large images")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    small = _photographs(arguments.images, arguments.small)
    large = [_enlarged(data, seed) for seed, data in enumerate(small[: arguments.large])]
    report: dict[str, Any] = {
        "images": "photographs" if arguments.images else "drawn",
        "small": _compare(small, arguments.rounds),
        "large": _compare(large, arguments.rounds),
        "unit": "images/s, one process, one thread",
        "machine": f"{platform.machine()}, {_processor()}",
        "versions": {
            "open_clip": open_clip.__version__,
            "pillow": PIL.__version__,
            "simplejpeg": simplejpeg.__version__,
            "torch": torch.__version__,
            "webdataset": webdataset.__version__,
        },
    }
    out = Path(__file__).parent / "results" / "pipeline.json"
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def _compare(images: list[bytes], rounds: int) -> dict[str, Any]:
    tokenizer = build_model("RN50").tokenizer
    with tempfile.TemporaryDirectory() as folder:
        samples = (
            Sample(f"{number:06d}", data, "jpg", (f"a photograph of thing number {number}",))
            for number, data in enumerate(images)
        )
        write_shards(samples, folder)
        shard = str(Path(folder, "shard-00000.tar"))
        candidates: dict[str, Callable[[], Iterator[Any]]] = {
            "open_clip_train": lambda: _open_clip(shard, is_train=True),
            "open_clip_evaluation": lambda: _open_clip(shard, is_train=False),
            "clipsys_fast": lambda: iter(_clipsys(shard, tokenizer, "fast")),
            "clipsys_exact": lambda: iter(_clipsys(shard, tokenizer, "exact")),
            "clipsys_later_epochs": lambda: _later_epoch(kept),
        }
        kept = _clipsys(shard, tokenizer, "fast", epochs=2)
        _drain(iter(kept))
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(rounds + 1):
            for name, pipeline in candidates.items():
                seconds[name].append(_drain(pipeline()))
        runs = {f"run_of_{epochs}_epochs": _whole_run(shard, tokenizer, epochs) for epochs in RUNS}
        stages = _stages(shard, len(images), tokenizer, rounds)
    # The first round warms caches and lazy imports.
    rates = {name: len(images) / statistics.median(each[1:]) for name, each in seconds.items()}
    ratios = {
        f"fast_over_{name}": statistics.median(
            theirs / ours
            for theirs, ours in zip(seconds[name], seconds["clipsys_fast"], strict=True)
        )
        for name in ("open_clip_train", "open_clip_evaluation")
    }
    ratios["later_epochs_over_open_clip_train"] = statistics.median(
        theirs / ours
        for theirs, ours in zip(
            seconds["open_clip_train"], seconds["clipsys_later_epochs"], strict=True
        )
    )
    return {
        "num_images": len(images),
        "size": list(Image.open(io.BytesIO(images[0])).size),
        "mean_bytes": round(statistics.mean(map(len, images))),
        **{name: round(rate, 1) for name, rate in rates.items()},
        **{name: round(ratio, 2) for name, ratio in ratios.items()},
        **runs,
        "stages_ms": stages,
        "lowest_psnr_db": round(min(map(_psnr, images)), 1),
    }


def _drain(batches: Iterator[Any]) -> float:
    started = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - started


def _open_clip(shard: str, *, is_train: bool) -> Iterator[Any]:
    transform = open_clip.image_transform(SIZE, is_train=is_train)
    tokenizer = open_clip.get_tokenizer("RN50")
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList([shard]),
        webdataset.tarfile_to_samples(),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(BATCH),
    )
    return iter(pipeline)


def _whole_run(shard: str, tokenizer: Any, epochs: int) -> dict[str, float]:
    """Seconds of all epochs with both pipelines, each the better of two."""
    theirs, ours = [], []
    for _ in range(2):
        theirs.append(sum(_drain(_open_clip(shard, is_train=True)) for _ in range(epochs)))
        ours.append(_drain(iter(_clipsys(shard, tokenizer, "fast", epochs=epochs))))
    return {
        "open_clip_train_s": round(min(theirs), 3),
        "clipsys_s": round(min(ours), 3),
        "ratio": round(min(theirs) / min(ours), 2),
    }


def _stages(shard: str, count: int, tokenizer: Any, rounds: int) -> dict[str, float]:
    """Milliseconds per image of each part of `Decoder.row` and `Decoder.batch`."""
    preprocessing = Preprocessing((SIZE, SIZE))
    reader = ShardReader([shard], [count])
    samples = [parse_sample(reader.read(0, number)) for number in range(count)]
    side = preprocessing.fast_min_side
    stored = [decode_stored(sample.image, min_side=side) for sample in samples]
    parts: dict[str, Callable[[int], object]] = {
        "read_and_parse": lambda at: parse_sample(reader.read(0, at)),
        "hash": lambda at: hashlib.sha256(samples[at].image).digest(),
        "decode": lambda at: decode_stored(samples[at].image, min_side=side),
        "resize_and_crop": lambda at: preprocessing.fast_pixels(stored[at]),
        "tokenize": lambda at: tokenizer(list(samples[at].captions)),
        "bound_entropy_code": lambda at: simplejpeg.decode_jpeg(
            samples[at].image, "GRAY", min_factor=8, min_height=1, min_width=1
        ),
        "pillow_decode": lambda at: Image.open(io.BytesIO(samples[at].image)).load(),
    }
    result = {}
    for name, part in parts.items():
        times = [_drain(map(part, range(count))) for _ in range(rounds + 1)][1:]
        result[name] = round(1000 * statistics.median(times) / count, 3)
    return result


def _later_epoch(kept: TrainingBatches) -> Iterator[Any]:
    return (kept[number] for number in range(len(kept) // 2, len(kept)))


def _clipsys(shard: str, tokenizer: Any, decode: Any, *, epochs: int = 1) -> TrainingBatches:
    config = DataConfig(train=shard)
    shard_set = open_shards(config)
    decoder = Decoder(
        preprocessing=Preprocessing((SIZE, SIZE)),
        tokenizer=tokenizer,
        captions="random",
        positives="image",
        label_key=None,
        max_image_pixels=config.max_image_pixels,
        seed=0,
        decode=decode,
    )
    return TrainingBatches(
        shard_set,
        sample_order(config, shard_set, 0),
        decoder,
        batch_size=BATCH,
        rank=0,
        world_size=1,
        epochs=epochs,
        pixel_cache_bytes=10**9,
    )


def _photographs(folder: Path | None, count: int) -> list[bytes]:
    if folder is None:
        return [_drawn(seed) for seed in range(count)]
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in EXTENSIONS]
    return [path.read_bytes() for path in paths[:count]]


def _drawn(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
    return _encoded(np.asarray(shapes.resize((500, 375), Image.Resampling.BICUBIC)), rng, 6.0)


def _enlarged(data: bytes, seed: int) -> bytes:
    image = decode_image(data).resize(LARGE, Image.Resampling.BICUBIC)
    return _encoded(np.asarray(image), np.random.default_rng(seed), 4.0)


def _encoded(pixels: np.ndarray, rng: np.random.Generator, noise: float) -> bytes:
    noisy = pixels + rng.normal(0, noise, pixels.shape).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _psnr(data: bytes) -> float:
    """Of our fast pixels against open_clip's evaluation transform."""
    preprocessing = Preprocessing((SIZE, SIZE))
    reference = open_clip.image_transform(
        SIZE, is_train=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )(decode_image(data))
    stored = decode_stored(data, min_side=preprocessing.fast_min_side)
    error = torch.from_numpy(preprocessing.fast_pixels(stored)) / 255 - reference
    return float(-10 * torch.log10(error.square().mean().clamp(min=1e-12)))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
