"""The section ``engine`` of a recipe: how a run is carried out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from clipsys.config import Settings


class EngineConfig(Settings):
    """How the run is carried out."""

    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    precision: Literal["auto", "fp32", "bf16", "bf16_params", "fp16"] = Field(
        "auto",
        description="auto is fp32 or bf16, on a CPU whichever is measured to be faster; bf16 is "
        "autocast over fp32 parameters; bf16_params and fp16 (with loss "
        "scaling) have parameters of 16 bits and fp32 masters in the optimizer",
    )
    gradient_clipping: float = Field(1.0, ge=0, description="largest global norm; 0 clips nothing")
    channels_last: bool = Field(
        False,
        description="feed images in the layout that convolutions prefer; the weights keep "
        "theirs, since DeepSpeed flattens them",
    )
    grad_checkpointing: bool = Field(
        False, description="compute the activations of transformer blocks twice to save memory"
    )
    threads: PositiveInt | None = Field(
        None,
        le=1024,  # OpenMP ends the process where the system gives it no more
        description="threads of each process on a CPU; default OMP_NUM_THREADS, else what is "
        "measured to be fastest where precision is auto, else a thread for each core",
    )
    compile: bool = Field(False, description="torch.compile both towers; needs a C++ compiler")
    cache_on_host: bool = Field(
        False, description="keep the outputs of micro-batches in the host's memory"
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="average of the weights that is evaluated and exported; 0: none",
    )
    bucket_mb: PositiveFloat | None = Field(
        None,
        description="gradients that are exchanged at once; with ZeRO stage 1 to 3; default 200 MB "
        "(100 MB of 16 bits), or all gradients where they are smaller",
    )
    overlap_comm: bool | None = Field(
        None,
        description="exchange gradients while others are computed, with a second bucket at stages "
        "1 and 2; default at stage 3 only",
    )
    offload_optimizer: bool = Field(
        False,
        description="keep the optimizer's state in the host's memory and step there; a GPU with "
        "ZeRO stage 1 to 3",
    )
    offload_parameters: bool = Field(
        False,
        description="keep weights in the host's memory until a layer needs them; a GPU with ZeRO "
        "stage 3",
    )
    device: str = Field("auto", description="auto, cpu, cuda or mps")
