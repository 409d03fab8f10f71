"""Gives rclip the text tower of a model folder, as the ONNX file that it would have downloaded.

    RCLIP_DATADIR=FOLDER PEER/bin/python benchmarks/rclip_text_model.py MODEL VOCABULARY

Run by the interpreter that has rclip, which needs `onnx` and `safetensors` beside it. rclip's own
model comes from a hub; for its speed any weights of the same architecture serve. The graph is what
an export of open_clip's ViT-B/32 text tower holds: full length, float32.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

HEADS, LENGTH = 8, 77


class Graph:
    """Nodes and weights in the making."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def constant(self, array: Any) -> str:
        """Adds a weight."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def apply(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node; returns its output's name."""
        name = f"x{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def linear(self, x: str, weight: Any, bias: Any) -> str:
        """``x @ weight.T + bias``."""
        return self.apply(
            "Add", self.apply("MatMul", x, self.constant(weight.T)), self.constant(bias)
        )


def text_graph(state: dict[str, Any]) -> Graph:
    graph = Graph()
    width = state["positional_embedding"].shape[1]
    layers = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("transformer.resblocks."))
    x = graph.apply("Gather", graph.constant(state["token_embedding.weight"]), "input")
    x = graph.apply("Add", x, graph.constant(state["positional_embedding"]))
    mask = graph.constant(np.triu(np.full((LENGTH, LENGTH), -np.inf, np.float32), 1))
    split = graph.constant(np.array([0, LENGTH, 3, HEADS, width // HEADS]))
    joined = graph.constant(np.array([0, LENGTH, width]))
    scale = graph.constant(np.float32((width // HEADS) ** -0.5))

    def norm(x: str, name: str) -> str:
        weights = (graph.constant(state[f"{name}.{one}"]) for one in ("weight", "bias"))
        return graph.apply("LayerNormalization", x, *weights, epsilon=1e-5)

    for layer in range(layers):
        own = {
            name.removeprefix(prefix): array
            for prefix in (f"transformer.resblocks.{layer}.",)
            for name, array in state.items()
            if name.startswith(prefix)
        }
        y = norm(x, f"transformer.resblocks.{layer}.ln_1")
        y = graph.linear(y, own["attn.in_proj_weight"], own["attn.in_proj_bias"])
        y = graph.apply("Transpose", graph.apply("Reshape", y, split), perm=[2, 0, 3, 1, 4])
        parts = [graph.apply("Gather", y, graph.constant(np.int64(n)), axis=0) for n in range(3)]
        turned = graph.apply("Transpose", parts[1], perm=[0, 1, 3, 2])
        scores = graph.apply("Mul", graph.apply("MatMul", parts[0], turned), scale)
        scores = graph.apply("Softmax", graph.apply("Add", scores, mask), axis=-1)
        y = graph.apply("Transpose", graph.apply("MatMul", scores, parts[2]), perm=[0, 2, 1, 3])
        y = graph.apply("Reshape", y, joined)
        y = graph.linear(y, own["attn.out_proj.weight"], own["attn.out_proj.bias"])
        x = graph.apply("Add", x, y)
        y = norm(x, f"transformer.resblocks.{layer}.ln_2")
        y = graph.linear(y, own["mlp.c_fc.weight"], own["mlp.c_fc.bias"])
        y = graph.apply("Gelu", y)
        y = graph.linear(y, own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
        x = graph.apply("Add", x, y)
    x = norm(x, "ln_final")
    end = graph.apply("ArgMax", "input", axis=1, keepdims=1)
    x = graph.apply("GatherND", x, end, batch_dims=1)
    projected = graph.apply("MatMul", x, graph.constant(state["text_projection"]))
    graph.nodes.append(helper.make_node("Identity", [projected], ["output"]))
    return graph


def main(model: Path, vocabulary: Path) -> None:
    from rclip import model_download

    folder = Path(os.environ["RCLIP_DATADIR"])
    graph = text_graph(load_file(model / "open_clip_model.safetensors"))
    made = helper.make_graph(
        graph.nodes,
        "text",
        [helper.make_tensor_value_info("input", TensorProto.INT64, ["batch", LENGTH])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", "width"])],
        graph.weights,
    )
    out = folder / model_download.MODEL_SUBDIR / model_download.TEXTUAL_ONNX
    out.parent.mkdir(parents=True, exist_ok=True)
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), out)
    # Never opened by a text query; only has to be there.
    out.with_name(model_download.VISUAL_ONNX).touch()
    target = folder / model_download.TOKENIZER_VOCAB
    target.parent.mkdir(exist_ok=True)
    shutil.copy(vocabulary, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
