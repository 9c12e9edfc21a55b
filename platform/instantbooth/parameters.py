"""What a caller may choose for a generated image: numbers and the range of each, samplers, reference images."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass

from instantbooth.errors import ParameterError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Range:
    """Both ends are allowed."""

    low: float
    high: float
    whole: bool = False


SAMPLERS: tuple[str, ...] = ("ddim", "euler", "dpmsolver++")
MAX_REFERENCES = 16
"""Reference images of a subject in a manifest or a request; the library itself takes any number."""

RANGES = {
    "num_inference_steps": Range(low=1, high=1000, whole=True),
    "guidance_scale": Range(low=0, high=30),
    "adapter_scale": Range(low=0, high=2),
    "concept_scale": Range(low=0, high=2),
    "num_images_per_prompt": Range(low=1, high=16, whole=True),
    "seed": Range(low=0, high=2**63 - 1, whole=True),
    "attempt": Range(low=0, high=1000, whole=True),
}


def check_bounds(config: object, bounds: Mapping[str, tuple[float, float]]) -> None:
    """ParameterError for a field of a configuration that is not within its bounds; both ends are allowed."""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if not low <= value <= high:
            rule = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise ParameterError(f"{name} must be {rule}, is {value:g}; correct it")


def check_range(name: str, value: object) -> None:
    """Raises ParameterError unless `value` is a finite number (no bool, NumPy's are welcome) in the range of `name`."""
    if fault := range_fault(name, value):
        raise ParameterError(f"{name} {fault}")


def range_fault(name: str, value: object) -> str | None:
    """Rule, value and fix in words where `value` is not in the range of `name`; None where it is."""
    if name not in RANGES:
        raise ParameterError(f"there is no parameter {name!r}. {did_you_mean(name, RANGES)}")
    limits = RANGES[name]
    kind = "a whole number" if limits.whole else "a number"
    rule = f"must be {kind} from {limits.low} to {limits.high}, is {value!r}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if limits.whole else numbers.Real):
        return f"{rule}; pass {kind}"
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(number, float) and math.isnan(number):
        return f"{rule}; pass {kind}"
    if number < limits.low:
        return f"{rule}; raise it to {limits.low} or more"
    if number > limits.high:
        return f"{rule}; lower it to {limits.high} or less"
    return None
