from __future__ import annotations

import numpy as np
import pytest

from instantbooth.errors import ParameterError
from instantbooth.parameters import check_range


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("adapter_scale", 0),
        ("adapter_scale", 2.0),
        ("guidance_scale", np.float32(7.5)),
        ("num_inference_steps", np.int64(1000)),
        ("seed", 2**63 - 1),
    ],
)
def test_both_ends_and_numpy_numbers_are_in_range(name: str, value: object) -> None:
    check_range(name, value)


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("adapter_scale", 2.001, "lower it to 2 or less"),
        ("concept_scale", -0.1, "raise it to 0 or more"),
        ("guidance_scale", float("nan"), "pass a number"),
        ("guidance_scale", float("inf"), "lower it to 30 or less"),
        ("guidance_scale", "7.5", "pass a number"),
        ("guidance_scale", None, "pass a number"),
        ("num_inference_steps", 25.0, "pass a whole number"),
        ("num_inference_steps", True, "pass a whole number"),
        ("num_images_per_prompt", 0, "raise it to 1 or more"),
        ("seed", 10**400, "lower it"),
    ],
)
def test_a_bad_number_is_named_with_rule_and_fix(name: str, value: object, fix: str) -> None:
    with pytest.raises(ParameterError, match=f"^{name} must be a (whole )?number from .* is .*; {fix}"):
        check_range(name, value)


def test_an_unknown_parameter_is_suggested() -> None:
    with pytest.raises(ParameterError, match="Did you mean 'adapter_scale'"):
        check_range("adaptor_scale", 1)
