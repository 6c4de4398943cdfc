"""Which folder may be searched, and by whose eyes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ernie_cluster.config.api import ApiConfig
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.image_search import ImageSearchConfig
from ernie_cluster.config.load import dump_config, load_config
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.config.presets import tiny_mixed
from ernie_cluster.errors import ConfigError

SEARCH = ImageSearchConfig("/photos.index", "/photos")
BLIND = ModelDeployment("blind", "/b", (PoolConfig("mixed"),))
(SEEING,) = tiny_mixed("/t").models
OTHER = replace(SEEING, name="other")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("index", "photos.index", "index = 'photos.index' must be an absolute path"),
        ("folder", "", "folder = '' must be an absolute path"),
        ("max_results", 0, "max_results = 0 must be at least 1"),
        ("max_pixels", 783, "max_pixels = 783 must be at least 784"),
    ],
)
def test_what_cannot_work_is_refused(name: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(SEARCH, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wish", "models", "found"),
    [
        (None, (BLIND, SEEING, OTHER), SEEING),
        ("other", (BLIND, SEEING, OTHER), OTHER),
        ("blind", (BLIND, SEEING), None),
        ("none", (SEEING,), None),
        (None, (BLIND,), None),
    ],
)
def test_a_served_model_with_eyes_compares(
    wish: str | None, models: tuple[ModelDeployment, ...], found: ModelDeployment | None
) -> None:
    api = ApiConfig(image_search=replace(SEARCH, model=wish))
    if found is None:
        with pytest.raises(ConfigError, match=r"api\.image_search compares with .* there is none"):
            ClusterConfig(models, api=api)
    else:
        assert ClusterConfig(models, api=api).search_model == found
    assert ClusterConfig(models).search_model is None


def test_it_is_read_from_the_environment_and_printed() -> None:
    env = {"ERNIE__API__IMAGE_SEARCH__INDEX": "/photos.index", "ERNIE__API__IMAGE_SEARCH__FOLDER": "/photos"}
    config = load_config(None, env, ["models.0.preset=tiny", "models.0.path=/t", "api.image_search.max_results=2"])
    assert config.api.image_search == replace(SEARCH, max_results=2)
    assert "image_search:\n    index: /photos.index" in dump_config(config)
