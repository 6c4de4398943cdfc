"""The API replica: the ASGI app around a `ClusterBackend`, one processor per model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

from fastapi import FastAPI

from ernie_cluster.actors import process
from ernie_cluster.actors.cluster_backend import ClusterBackend
from ernie_cluster.api.http_service import create_app
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.inputs.images import ImageLimits
from ernie_cluster.observe.log import setup_logging
from ernie_cluster.observe.metrics import PrometheusMetrics


def asgi_builder(app: str, config: ClusterConfig) -> Callable[[], FastAPI]:
    """What `serve.ingress` calls on the replica to get its ASGI app."""

    def build() -> FastAPI:
        process.share_interpreter()
        setup_logging(os.environ.get("ERNIE_LOG_LEVEL", "INFO"))
        processors = {m.name: make_processor(config, m.name) for m in config.models}
        return create_app(ClusterBackend(app, config), processors, api_limits(config), PrometheusMetrics())

    return build


def make_processor(config: ClusterConfig, model: str) -> ChatProcessor:
    """The input side of one model: tokenizer, template, pictures."""
    deployment, api = config.model(model), config.api
    processor = ChatProcessor.from_folder(
        deployment.path,
        served_name=model,
        max_model_len=deployment.engine.max_model_len,
        image_limits=ImageLimits(max_bytes=api.max_image_bytes, max_pixels=api.max_image_pixels),
        max_images=api.max_images if deployment.has_vision_pool else 0,
    )
    pixels = dataclasses.replace(
        processor.pixels,
        min_pixels=deployment.image_min_pixels or processor.pixels.min_pixels,
        max_pixels=deployment.image_max_pixels or processor.pixels.max_pixels,
    )
    return dataclasses.replace(processor, pixels=pixels)


def api_limits(config: ClusterConfig) -> ApiLimits:
    """The part of the configuration that the API knows."""
    api = config.api
    return ApiLimits(
        max_body_bytes=api.max_body_bytes,
        max_json_depth=api.max_json_depth,
        request_timeout_s=api.request_timeout_s,
        default_max_tokens=api.default_max_tokens,
        preprocess_threads=api.preprocess_threads,
    )
