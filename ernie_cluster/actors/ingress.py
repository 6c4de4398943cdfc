"""The API replica: the ASGI app around a `ClusterBackend`, one processor per model."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from functools import partial

from fastapi import FastAPI

from ernie_cluster.actors import process
from ernie_cluster.actors.auto_model import AutoModel
from ernie_cluster.actors.cluster_backend import ClusterBackend
from ernie_cluster.api.cors import allow_origins
from ernie_cluster.api.decoders import DecoderLimits, Decoders
from ernie_cluster.api.fetcher import Fetcher
from ernie_cluster.api.grpc_server import GrpcServer
from ernie_cluster.api.guard import Guard
from ernie_cluster.api.http_service import create_app
from ernie_cluster.api.image_search import ImageSearcher
from ernie_cluster.api.keys import KeyRing
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.playground.routes import PATHS, add_playground
from ernie_cluster.api.service import Service
from ernie_cluster.api.tls import Certificate
from ernie_cluster.api.tracing import otlp_tracer
from ernie_cluster.api.zeros import begin_at_zero
from ernie_cluster.config.api import ApiConfig
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.errors import ConfigError
from ernie_cluster.inputs.chat import ChatProcessor
from ernie_cluster.inputs.clip import VideoLimits
from ernie_cluster.inputs.fetch import FetchRules
from ernie_cluster.inputs.image_folder import ImageFolder
from ernie_cluster.inputs.image_index import ImageIndex, Maker
from ernie_cluster.inputs.images import ImageLimits
from ernie_cluster.inputs.media_cache import MediaCache, cached
from ernie_cluster.inputs.messages import MapMedia, PromptLimits
from ernie_cluster.observe.metrics import Metrics, PrometheusMetrics


def asgi_builder(app: str, config: ClusterConfig) -> Callable[[], FastAPI]:
    """What `serve.ingress` calls on the replica to get its ASGI app."""

    def build() -> FastAPI:
        process.share_interpreter()
        process.log_lines()
        map_media = media_mapper(config)
        processors = {m.name: make_processor(config, m.name, map_media) for m in config.models}
        metrics = PrometheusMetrics()
        begin_at_zero(metrics, processors)
        guard, tracing = make_guard(config.api, metrics), config.api.tracing
        fetcher = Fetcher(fetch_rules(config.api))
        api = create_app(
            ClusterBackend(app, config, metrics),
            processors,
            api_limits(config),
            metrics,
            guard,
            fetcher,
            config.api.builtin_tools,
            make_searcher(config, processors),
            beside=make_grpc(config.api, guard),
            alias=None if config.auto_model is None else AutoModel(config.auto_model, time.monotonic),
            tracer=None if tracing is None else otlp_tracer(tracing.endpoint, tracing.sample_ratio),
        )
        face_browsers(api, config.api)
        process.started()
        return api

    return build


def make_grpc(api: ApiConfig, guard: Guard) -> Callable[[Service], GrpcServer] | None:
    """The other face of a service, where there is to be one; raises ConfigError when its certificate cannot be used."""
    if api.grpc_port is None:
        return None
    credentials = None if api.grpc_tls is None else Certificate(api.grpc_tls).credentials()
    return partial(GrpcServer, guard=guard, host=api.host, port=api.grpc_port, credentials=credentials)


def face_browsers(app: FastAPI, api: ApiConfig) -> None:
    """The page that we serve, and the pages of others that may call. To be called last."""
    if api.playground:
        add_playground(app)
    if api.cors_origins:
        allow_origins(app, api.cors_origins)


def make_guard(api: ApiConfig, metrics: Metrics) -> Guard:
    """The door of this replica; raises ConfigError when the keys cannot be read."""
    return Guard(
        None if api.keys_file is None else KeyRing(api.keys_file, time.monotonic),
        admin_sha256=api.admin_key_sha256,
        takes_keyless_orders=api.takes_keyless_orders,
        isolate_prefix_cache=api.isolate_prefix_cache,
        metrics=metrics,
        clock=time.monotonic,
        pages=PATHS if api.playground else (),
    )


def media_mapper(config: ClusterConfig) -> MapMedia:
    """How pictures and videos are prepared; the processes live as long as this one, and are only there to be used."""
    api, can_see = config.api, any(m.has_vision_pool for m in config.models)
    map_media: MapMedia = map
    if api.decode_processes and can_see:
        limits = DecoderLimits(api.decode_timeout_s, api.decode_memory_bytes)
        map_media = Decoders(api.decode_processes, limits).map
    return cached(MediaCache(api.media_cache_bytes), map_media) if api.media_cache_bytes else map_media


def fetch_rules(api: ApiConfig) -> FetchRules:
    """What may be fetched for a request; all of it together no more than a body may bring along."""
    return FetchRules(
        hosts=api.media_hosts,
        folder=api.media_folder,
        allow_private=api.media_allow_private,
        max_image_bytes=api.max_image_bytes,
        max_video_bytes=api.max_video_bytes,
        max_total_bytes=api.max_body_bytes,
        max_urls=api.max_images + api.max_videos,
        timeout_s=api.media_timeout_s,
    )


def make_processor(config: ClusterConfig, model: str, map_media: MapMedia = map) -> ChatProcessor:
    """The input side of one model: tokenizer, template, pictures."""
    deployment, api = config.model(model), config.api
    processor = ChatProcessor.from_folder(
        deployment.path,
        served_name=model,
        max_model_len=deployment.engine.max_model_len,
        limits=prompt_limits(api, can_see=deployment.has_vision_pool),
        map_media=map_media,
    )
    pixels = dataclasses.replace(
        processor.pixels,
        min_pixels=deployment.image_min_pixels or processor.pixels.min_pixels,
        max_pixels=deployment.image_max_pixels or processor.pixels.max_pixels,
    )
    max_model_len = min(processor.max_model_len, _longest_sequence(deployment, processor.config))
    return dataclasses.replace(processor, pixels=pixels, max_model_len=max_model_len)


def _longest_sequence(deployment: ModelDeployment, shape: ModelConfig) -> int:
    """Tokens that the KV cache of a replica holds, where the model could go further."""
    engine, dtype = deployment.engine, deployment.engine.kv_dtype_of(shape.dtype)
    tps = (pool.tp for pool in deployment.pools if pool.role in ("decode", "mixed"))
    layouts = (KVLayout.from_model(shape, engine.block_size, dtype, tp) for tp in tps)
    return max(layout.num_tokens(engine.kv_cache_bytes) for layout in layouts)


def make_searcher(config: ClusterConfig, processors: Mapping[str, ChatProcessor]) -> ImageSearcher | None:
    """What the tool `image_search` searches; None where the operator names nothing.

    Raises:
        ConfigError: the index cannot be read or was made with another model, or the folder is not there.
    """
    search, model = config.api.image_search, config.search_model
    if search is None or model is None:
        return None
    processor = processors[model.name]
    try:
        index = ImageIndex.load(search.index, Maker.of(model.path, processor.pixels))
    except ConfigError as e:
        raise ConfigError(f"api.image_search.index: {e}") from None
    if not os.path.isdir(search.folder):
        raise ConfigError(f"api.image_search.folder: {search.folder} is no folder on this machine")
    folder = ImageFolder(search.folder, config.api.max_image_bytes)
    return ImageSearcher(index, folder, processor, search.max_results, search.max_pixels)


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
        client_idle_timeout_s=api.client_idle_timeout_s,
        keep_alive_s=api.keep_alive_s,
        default_max_tokens=api.default_max_tokens,
        preprocess_threads=api.preprocess_threads,
        media_threads=api.media_threads,
        max_tool_rounds=api.max_tool_rounds,
        max_tool_pixels=api.max_tool_pixels,
    )
