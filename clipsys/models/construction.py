"""How open_clip is called to make a model: quietly, with the hub where one is needed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipsys.models import hub

if TYPE_CHECKING:
    from torch.overrides import TorchFunctionMode


@contextmanager
def quiet_open_clip() -> Iterator[None]:
    """A context in which open_clip says nothing.

    It logs its whole progress, and a warning about random weights, on the root logger.
    """
    root = logging.getLogger()

    def drop(record: logging.LogRecord) -> bool:
        return f"{os.sep}open_clip{os.sep}" not in record.pathname

    import transformers

    transformers_logging: Any = transformers.utils.logging

    # It draws a bar for each file, and lists weights that a tower has no use for.
    talk, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    filters = [(handler, drop) for handler in root.handlers]
    had_handlers = bool(root.handlers)
    if not had_handlers:  # logging.warning() would install a handler for good
        root.addHandler(logging.NullHandler())
    for handler, one in filters:
        handler.addFilter(one)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(talk)
        if bars:
            transformers_logging.enable_progress_bar()
        for handler, one in filters:
            handler.removeFilter(one)
        if not had_handlers:
            root.handlers.clear()


def without_random_values() -> TorchFunctionMode:
    """A context in which new layers are not filled with random numbers.

    For models whose weights are all loaded afterwards: drawing 150 million numbers takes longer
    than reading the file of a ViT-B/32.
    """
    from torch import Tensor
    from torch.nn import init
    from torch.overrides import TorchFunctionMode

    drawing = {Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.trunc_normal_}
    drawing |= {init.kaiming_uniform_, init.kaiming_normal_}
    drawing |= {init.xavier_uniform_, init.xavier_normal_}

    class WithoutRandomValues(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if func in drawing:
                return args[0] if args else kwargs["tensor"]  # torch.nn.init names it
            return func(*args, **kwargs)

    return WithoutRandomValues()


@contextmanager
def hub_for(config: Mapping[str, Any]) -> Iterator[str]:
    """A context in which the hub is asked, where an architecture needs a file of it.

    Yields:
        Why the hub cannot be reached; empty where it answers or is not needed.
    """
    text_model = config["text_cfg"].get("hf_model_name")
    local = not text_model or Path(text_model).expanduser().is_dir()
    if local and not config["vision_cfg"].get("timm_model_pretrained"):
        yield ""
        return
    with hub.quiet_hub() as unreachable:
        yield unreachable


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
