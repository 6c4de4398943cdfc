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
from ernie_cluster.config.cluster import ApiConfig, ClusterConfig
from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.inputs.images import ImageLimits
from ernie_cluster.inputs.messages import PromptLimits
from ernie_cluster.inputs.video import VideoLimits
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
        limits=prompt_limits(api, can_see=deployment.has_vision_pool),
    )
    pixels = dataclasses.replace(
        processor.pixels,
        min_pixels=deployment.image_min_pixels or processor.pixels.min_pixels,
        max_pixels=deployment.image_max_pixels or processor.pixels.max_pixels,
    )
    return dataclasses.replace(processor, pixels=pixels)


def prompt_limits(api: ApiConfig, *, can_see: bool) -> PromptLimits:
    """What one request may hold; without a vision pool no pictures and no videos."""
    return PromptLimits(
        image=ImageLimits(max_bytes=api.max_image_bytes, max_pixels=api.max_image_pixels),
        max_images=api.max_images if can_see else 0,
        video=VideoLimits(max_bytes=api.max_video_bytes, max_frames=api.max_video_frames),
        max_videos=api.max_videos if can_see else 0,
    )


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
