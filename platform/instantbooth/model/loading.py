"""Loading models: in which numbers, and in silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging

Precision = Literal["fp32", "bf16", "fp16"]
"""In which numbers a model computes. Half precision is twice as fast or more on a GPU, and takes half the memory."""
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

BF16_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16")
"""Of CPUs that compute in bfloat16 themselves, as torch names them; the last is ARM's."""


def autocast(device: torch.device, precision: Precision = "bf16") -> torch.autocast:
    """Computes in these numbers what does not need float32; nothing in bf16 on a CPU that would emulate it.

    There a training step in bf16 takes 13 times as long as in float32 (measured on a CPU with AVX2).
    """
    emulated = precision == "bf16" and device.type == "cpu" and not _computes_bf16()
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32" and not emulated)


def _computes_bf16() -> bool:
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in BF16_CAPABILITIES)


@contextmanager
def silent_loading() -> Iterator[None]:
    """Without transformers' progress bars and load reports, and without diffusers' warnings.

    A model loads in a second, and where a part of a file is meant to be left out (a whole CLIP's text tower), the
    report would list every tensor of it.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    diffusers_verbosity = diffusers_logging.get_verbosity()
    logging.set_verbosity_error()
    diffusers_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        diffusers_logging.set_verbosity(diffusers_verbosity)
        if bars:
            logging.enable_progress_bar()


def load_whole(kind: Any, folder: Path, **settings: object) -> Any:
    """`kind.from_pretrained(folder)` of transformers or diffusers, in silence.

    ValueError where the folder's files lack some of the model's tensors, which both would leave random.
    """
    with silent_loading():
        model, found = kind.from_pretrained(folder, output_loading_info=True, **settings)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"its files lack {len(missing)} tensors of {type(model).__name__}, first {missing[0]}")
    return model
