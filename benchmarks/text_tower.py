"""open_clip's text tower beside ours, which cuts batches to their longest caption.

    python benchmarks/text_tower.py          writes benchmarks/results/text_tower.json

Both run in turn in one process, on the same weights (random: speed does not depend on them) and the
same captions; the figure is the median of the ratios.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from clipsys.inference.text_tower import text_encoder
from clipsys.models.open_clip_models import build_model

MODEL = "ViT-B-32"
BATCH = 32
ROUNDS = 5
CAPTION = "a brown dog runs over wet grass behind two children in red coats"


def main() -> None:
    torch.manual_seed(0)
    parts = build_model(MODEL)
    model = parts.model.eval()
    captions = [" ".join(CAPTION.split()[: 6 + number % 8]) for number in range(BATCH)]
    tokens_BL = parts.tokenizer(captions)
    ours, theirs = text_encoder(model), model.encode_text
    with torch.inference_mode():
        difference = (ours(tokens_BL) - theirs(tokens_BL)).abs().max().item()
        rounds = [(_seconds(theirs, tokens_BL), _seconds(ours, tokens_BL)) for _ in range(ROUNDS)]
    report = {
        "model": MODEL,
        "batch": BATCH,
        "tokens": [tokens_BL.shape[1], int(tokens_BL.argmax(dim=1).max()) + 1],
        "open_clip_texts_per_s": BATCH / statistics.median(theirs for theirs, _ in rounds),
        "clipsys_texts_per_s": BATCH / statistics.median(ours for _, ours in rounds),
        "ratio": statistics.median(theirs / ours for theirs, ours in rounds),
        "largest_difference": difference,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    out = Path(__file__).parent / "results" / "text_tower.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


def _seconds(encode: Callable[[torch.Tensor], torch.Tensor], tokens_BL: torch.Tensor) -> float:
    started = time.perf_counter()
    encode(tokens_BL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
