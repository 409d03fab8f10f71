"""Matrix products in 8-bit integers, for processors that multiply those faster than floats.

    x (N, I) float32 --scale of each row--> uint8 --.
                                                     >-- exact int32 sums --> float32 (N, O)
    W (O, I) float32 --scale of each row--> int8 ---'

Weights have a scale for each output channel, activations one for each token, found as they come
("dynamic, per token, per channel": Xiao et al., SmoothQuant, arXiv 2211.10438, table 2). A token
whose activations are a hundred times those of the rest, as vision transformers have them (Darcet et
al., arXiv 2309.16588), so costs the others no precision, nothing has to be calibrated, and a row's
result does not depend on what else is in the batch.

torchao's dynamic quantisation (0.18) has the same scales. Beside it, on one core of an AMD EPYC
with AVX512-BF16 and VNNI (`benchmarks/int8.py`, results/int8.json), ViT-B/32 encodes 13 images/s in
fp32, 51 in bf16, 46 with torchao's int8 and 85 with this one. The four products of a block take
0.57 to 2.0 ms here, 1.0 to 3.4 ms with torchao's, and 0.62 to 2.2 ms with torchao's under
`torch.compile`: compiling a whole tower takes a minute, and would not make it faster than this.

It is an approximation, so it is compared with the exact tower on the first images that come, and
given up where they do not agree: `clipsys.inference.checking`.

N rows (tokens), I input and O output channels, B images.
"""

from __future__ import annotations

import torch

#: Stands for zero in the unsigned bytes that the processor multiplies with signed ones.
_ZERO = 128
#: A float of this size is a whole number: adding it rounds, and the last byte of the sum's bits is
#: the rounded number. One pass instead of a product, a rounding and a conversion.
_ROUNDS = 1.5 * 2**23


def is_fast() -> bool:
    """Whether this processor has instructions for sums of 8-bit products (VNNI)."""
    return torch.cpu._is_vnni_supported() and hasattr(torch.ops.onednn, "qlinear_pointwise")


class Int8Linear:
    """``x @ weight.T + bias`` on the CPU, in int8 with float32 results.

    Args:
        weight_OI: float32.
        bias_O: float32; None: zeros.
    """

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        num_outputs = len(weight_OI)
        self._scale_O = _scales(weight_OI).flatten()
        quantised_OI = (weight_OI / self._scale_O[:, None]).round().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(quantised_OI, None)
        # As a row: with a scalar instead the sum takes twice as long.
        self._rounds_I = torch.full((weight_OI.shape[1],), _ROUNDS + _ZERO)
        self._zeros_O = torch.zeros(num_outputs, dtype=torch.int64)
        self._bias_O = torch.zeros(num_outputs) if bias_O is None else bias_O.detach()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """(…, I) float32 -> (…, O) float32."""
        rows_NI = inputs.reshape(-1, inputs.shape[-1])
        scale_N1 = _scales(rows_NI)
        rounded_NI = torch.addcmul(self._rounds_I, rows_NI, scale_N1.reciprocal())
        bytes_NI = rounded_NI.view(torch.int32).to(torch.uint8)
        products_NO: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            *(bytes_NI, 1.0, _ZERO, self._weight, self._scale_O, self._zeros_O, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        torch.addcmul(self._bias_O, products_NO, scale_N1, out=products_NO)
        return products_NO.view(*inputs.shape[:-1], -1)


def _scales(rows_NI: torch.Tensor) -> torch.Tensor:
    """What one step of int8 is worth in each row: (N, 1)."""
    # Two passes that write nothing are faster than abs() and one.
    largest_N1 = torch.maximum(rows_NI.amax(1, keepdim=True), rows_NI.amin(1, keepdim=True).neg_())
    return largest_N1.clamp_min_(1e-12).div_(127)
