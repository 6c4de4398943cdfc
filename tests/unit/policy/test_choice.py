"""Which model answers what leaves it open."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.config.auto_model import AutoModelConfig
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.errors import ConfigError
from ernie_cluster.policy.choice import Errand, choose_model

CONFIG = AutoModelConfig("424b", "28b", long_prompt_tokens=1000, large_media_bytes=5000, ttft_s=2.0)
QUICK = Errand(prompt_tokens=20, media_bytes=300, wants_thinking=False, may_overflow=True)
THOUGHT = replace(QUICK, wants_thinking=True)


@pytest.mark.parametrize(
    ("errand", "large_s", "small_s", "model", "words"),
    [
        (QUICK, None, None, "28b", "no thought"),
        (QUICK, None, 50.0, "28b", "no thought"),
        (THOUGHT, None, None, "424b", "thinking was asked for"),
        (replace(QUICK, prompt_tokens=1000), 1.0, 0.1, "424b", "about 1000 prompt tokens"),
        (replace(QUICK, media_bytes=5000), 2.0, None, "424b", "5000 bytes"),
        (THOUGHT, 2.5, 0.3, "28b", "2.5 s, later than 2 s"),
        (THOUGHT, 2.5, None, "28b", "later than 2 s"),
        (THOUGHT, 2.5, 3.0, "424b", "28b after 3.0 s"),
        (replace(THOUGHT, may_overflow=False), 9.0, 0.1, "424b", "asks for no smaller one"),
    ],
)
def test_choices(errand: Errand, large_s: float | None, small_s: float | None, model: str, words: str) -> None:
    choice = choose_model(errand, {"424b": large_s, "28b": small_s}, CONFIG)
    assert choice.model == model
    assert words in choice.reason


@given(
    st.builds(Errand, st.integers(0, 3000), st.integers(0, 9000), st.booleans(), st.booleans()),
    st.floats(0, 9),
    st.floats(0, 9),
)
def test_only_who_allows_it_gets_less_than_suits(errand: Errand, large_s: float, small_s: float) -> None:
    suits = choose_model(errand, {}, CONFIG).model
    chosen = choose_model(errand, {"424b": large_s, "28b": small_s}, CONFIG).model
    if chosen != suits:
        assert (suits, chosen) == ("424b", "28b")
        assert errand.may_overflow
        assert small_s < large_s
        assert large_s > CONFIG.ttft_s


def served(*names: str) -> tuple[ModelDeployment, ...]:
    return tuple(ModelDeployment(n, "folder", (PoolConfig("mixed"),)) for n in names)


def test_the_alias_names_served_models_and_is_none_itself() -> None:
    assert ClusterConfig(served("28b", "424b"), auto_model=CONFIG).auto_model == CONFIG
    with pytest.raises(ConfigError, match=r"auto_model.large = '424b' is not served; known: 28b"):
        ClusterConfig(served("28b"), auto_model=CONFIG)
    with pytest.raises(ConfigError, match="is a served model, too"):
        ClusterConfig(served("28b", "424b", "ernie-auto"), auto_model=CONFIG)
    for wrong, words in (
        ({"small": "424b"}, "name two served models"),
        ({"ttft_s": 0}, "ttft_s = 0"),
        ({"long_prompt_tokens": 0}, "long_prompt_tokens = 0"),
        ({"name": "a b"}, "must be letters"),
    ):
        with pytest.raises(ConfigError, match=words):
            replace(CONFIG, **wrong)  # type: ignore[arg-type]
