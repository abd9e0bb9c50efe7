"""LmConfig: what shapes a language model may have."""

import pytest

from ep_runtime.errors import CheckpointError, ConfigError
from ep_runtime.lm.config import LmConfig


def test_default_shape_is_the_one_that_ships() -> None:
    config = LmConfig()
    assert (config.layers, config.hidden, config.num_experts, config.topk) == (4, 256, 16, 4)
    assert config.head_dim * config.heads == config.hidden


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("hidden", 200, "multiple of 128"),
        ("heads", 3, "divisor of hidden"),
        ("topk", 17, "num_experts = 16"),
        ("topk", 0, "1 to num_experts"),
        ("layers", 0, "at least 1"),
        ("inner", -4, "at least 1"),
        ("max_context", 1, "at least 2"),
        ("layers", 4.0, "a whole number"),
        ("max_context", 2.5, "a whole number"),
        ("norm_eps", float("nan"), "finite number above 0"),
        ("norm_eps", -10.0, "finite number above 0"),
        ("rope_base", float("inf"), "finite number above 0"),
        ("rope_base", "x", "finite number above 0"),
    ],
)
def test_impossible_shape_is_refused_with_value_and_limit(
    field: str, value: int, told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        LmConfig(**{field: value})
    assert str(value) in str(caught.value)


def test_json_round_trip() -> None:
    config = LmConfig(layers=2, hidden=128, heads=2, max_context=64)
    assert LmConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"layers": 4}',
        LmConfig().to_json().replace('"layers": 4', '"layers": 0'),
        LmConfig().to_json().replace('"layers": 4', '"layers": "four"'),
        LmConfig().to_json().replace('"layers"', '"storeys"'),
        LmConfig().to_json().replace("10000.0", "NaN"),
    ],
)
def test_json_of_something_else_is_a_checkpoint_error(text: str) -> None:
    with pytest.raises(CheckpointError):
        LmConfig.from_json(text)
