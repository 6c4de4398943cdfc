"""Start and stop an application on a Ray cluster, saying what is being waited for."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayActorError
from ray.serve.schema import ApplicationStatusOverview, LoggingConfig

from ernie_cluster.actors.app import APP_NAME, build_app
from ernie_cluster.actors.channels import check_nixl
from ernie_cluster.actors.environment import local_cluster
from ernie_cluster.actors.find_router import find_router, router_name
from ernie_cluster.actors.messages import NAMESPACE
from ernie_cluster.api.backend import ModelStatus
from ernie_cluster.api.tls import Certificate
from ernie_cluster.config.checks import label_selector
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.errors import ConfigError, ReplicaError
from ernie_cluster.policy.sizing.check import check_fit
from ernie_cluster.policy.sizing.gpus import of_ray_types

log = logging.getLogger(__name__)

Report = Callable[[str], None]

_GPU_TYPE = "accelerator_type:"
_POLL_S = 0.2
_ROUTE_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 20.0
"""What answers get to come to their end when the whole application stops."""


def check(config: ClusterConfig) -> None:
    """What can be known before anything starts; raises ConfigError or CheckpointError."""
    if config.api.grpc_tls is not None:
        Certificate(config.api.grpc_tls)
    for model in config.models:
        shape = ModelConfig.from_folder(model.path)
        model.check_media(is_multimodal=shape.is_multimodal)
        method = model.method(shape.quantization)
        for pool in model.pools:
            pool.dims.check(shape)
            if method is not None and pool.role != "vision":
                pool.dims.check_blocks(shape, method)
            _check_gang(model, pool)


def _check_gang(model: ModelDeployment, pool: PoolConfig) -> None:
    """What ranks of one replica cannot do on GPUs."""
    where = f"model {model.name!r}, pool {pool.role}"
    if not pool.num_gpus or model.engine.device == "cpu":
        return
    if pool.tp > 1 and model.engine.kv_placement == "shared":
        raise ConfigError(
            f"{where}: tp = {pool.tp} on GPUs with engine.kv_placement = shared; a GPU's memory holds the KV of its own "
            "rank: use split or auto"
        )
    if pool.dims.world > 1 and pool.num_gpus <= 0.5:
        raise ConfigError(
            f"{where}: tp * dp = {pool.dims.world} ranks with num_gpus = {pool.num_gpus:g} each; they would share a "
            "GPU, and NCCL takes no two ranks on one: set num_gpus to 1, or to more than a half beside a smaller share"
        )


def check_machines(config: ClusterConfig) -> None:
    """Hold the pools against the machines of the Ray cluster that was joined; raises ConfigError for what cannot fit."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    types = {key.removeprefix(_GPU_TYPE) for resources in machines for key in resources if key.startswith(_GPU_TYPE)}
    memory = sum(resources.get("memory", 0) for resources in machines)
    shapes = {model.name: ModelConfig.from_folder(model.path) for model in config.models}
    check_fit(config, shapes, of_ray_types(types), int(memory) or None)


def start_ray(config: ClusterConfig, address: str | None, report: Report) -> None:
    """Join the cluster at `address`, or start one on this machine when it is None.

    Raises:
        ConfigError: no cluster there; or Ray could not start here, twice; or what is wished for is not installed here.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it would report every call of ours on the terminal
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
    if address is not None:
        report(f"joining the Ray cluster at {address}")
        try:
            ray.init(address, **quiet)
        except (ConnectionError, ValueError) as e:
            raise ConfigError(f"no Ray cluster at {address}: {e}; start one with `ray start --head`") from None
        return
    pools = [(p.num_cpus, p.num_gpus, p.num_replicas) for m in config.models for p in m.pools]
    wanted = math.ceil(sum(cpus * replicas for cpus, _, replicas in pools))
    if config.scaling is not None and config.budget_unit == "cores":
        wanted = max(wanted, math.ceil(config.budget))
    cores = os.cpu_count() or 1
    if wanted > cores:
        report(f"the pools ask for {wanted} cores, this machine has {cores}: they will share")
    check_nixl(config.transport)
    report("starting Ray on this machine")
    for attempt in (1, 2):
        try:
            with local_cluster():
                ray.init("local", num_cpus=max(wanted, cores), include_dashboard=False, **quiet)
            return
        except Exception as e:
            ray.shutdown()
            if attempt == 2:
                raise ConfigError(f"Ray did not start on this machine: {e}") from None
            report("Ray did not start in time, the machine may be busy; trying once more")


def start(config: ClusterConfig, report: Report, *, timeout_s: float, app_name: str = APP_NAME) -> None:
    """Deploy the application and wait until every pool has a replica and the API answers.

    Raises:
        ReplicaError: a replica cannot start; the message says why.
        ConfigError: the pools cannot fit on these machines, or are not ready within `timeout_s`.
    """
    check_machines(config)
    deadline = time.monotonic() + timeout_s
    if config.api.is_open_to_strangers:
        report(
            f"warning: api.keys_file is not set, so whoever reaches {config.api.host}:{config.api.port} may use the models"
        )
    for whose, labels in unmatched_labels(config):
        report(f"no node has the labels {', '.join(labels)} of {whose} yet; it waits for one (`ray start --labels`)")
    report("starting Serve")
    find_router(app_name, config)  # its process starts while Serve's do
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    http = {"host": config.api.host, "port": config.api.port, "request_timeout_s": None}
    doors = "EveryNode" if config.api.listen_on == "every_node" else "HeadOnly"
    _start_serve(report, proxy_location=doors, http_options=http, logging_config=quiet)
    serve.run_many(
        [serve.RunTarget(build_app(config, app_name), app_name, "/", quiet)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    said: set[str] = set()
    waiting_for = ""
    while True:
        try:
            router = find_router(app_name, config)  # another one if it was there with another configuration
            replicas, status = _told_by(router, config, timeout_s, deadline)
        except RayActorError:
            time.sleep(_POLL_S)
            continue
        for info, _ in replicas:
            if info.replica_id not in said:
                said.add(info.replica_id)
                report(f"{info.role} replica of {info.model!r} is ready on node {info.node_id[:8]}")
        missing = [f"{s.name}: {s.detail}" for s in status if not s.is_ready]
        application = serve.status().applications.get(app_name)
        if not missing and (application is None or application.status != "RUNNING"):
            missing = ["the API replica"]
        if not missing:
            break
        if application is not None and (reason := _failure(application)):
            raise ReplicaError(reason)
        if time.monotonic() > deadline:
            raise ConfigError(f"not ready after {timeout_s:g} s; waiting for {', '.join(missing)}")
        if waiting_for != (waiting_for := "; ".join(missing)):
            report(f"waiting for {waiting_for}")
        time.sleep(_POLL_S)
    _wait_for_route(config, time.monotonic() + _ROUTE_TIMEOUT_S)


def _start_serve(report: Report, **options: Any) -> None:
    """Serve with its proxies; ConfigError when they do not start, twice."""
    for attempt in (1, 2):
        try:
            serve.start(**options)
            return
        except RayActorError as e:
            serve.shutdown()
            if attempt == 2:
                raise ConfigError(f"Serve's proxy did not start; is this machine very busy? Ray says: {e}") from None
            report("Serve's proxy did not start in time, the machine may be busy; trying once more")


def unmatched_labels(config: ClusterConfig) -> list[tuple[str, tuple[str, ...]]]:
    """Who has `node_labels` that no node of the Ray cluster has all of, and which."""
    machines = [node["Labels"] for node in ray.nodes() if node["Alive"]]
    wanted = [("the API and the router", config.api.node_labels)]
    wanted += [(f"pool {p.role} of {m.name!r}", p.node_labels) for m in config.models for p in m.pools]
    return [
        (whose, labels)
        for whose, labels in wanted
        if labels and not any(label_selector(labels).items() <= machine.items() for machine in machines)
    ]


def _told_by(
    router: Any, config: ClusterConfig, timeout_s: float, deadline: float
) -> tuple[list[Any], list[ModelStatus]]:
    """Replicas and models, as the router knows them, which may have to wait for its node."""
    try:
        replicas, status = ray.get(
            [router.replicas.remote(), router.status.remote()], timeout=max(0.0, deadline - time.monotonic())
        )
    except GetTimeoutError:
        where = ", ".join(config.api.node_labels) or "any node"
        raise ConfigError(
            f"not ready after {timeout_s:g} s: the router has not started; its node must have api.node_labels = {where}"
        ) from None
    return replicas, status


def stop(report: Report, app_name: str = APP_NAME) -> None:
    """Delete the application, and end the Ray cluster if `start_ray` started it. May follow a start that failed."""
    report("stopping")
    try:
        serve.delete(app_name, _blocking=False)
        _wait_for_end(app_name, time.monotonic() + _STOP_TIMEOUT_S)
        ray.kill(ray.get_actor(router_name(app_name), NAMESPACE))
    except Exception as e:  # it never came so far, or a part of it is gone already
        log.info("stopping: %s", e)
    finally:
        ray.shutdown(wait_for_processes=True)  # ends a cluster that this process has started, Serve with it


def _wait_for_end(app_name: str, deadline: float) -> None:
    """Until all replicas are gone, or what runs has had its time."""
    while app_name in serve.status().applications and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _wait_for_route(config: ClusterConfig, deadline: float) -> None:
    """The proxy hears of the API replica a moment later. It may be out of reach from here: then do without."""
    host = "127.0.0.1" if config.api.host == "0.0.0.0" else config.api.host
    while time.monotonic() < deadline:
        connection = HTTPConnection(host, config.api.port, timeout=1)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(_POLL_S)


def _failure(application: ApplicationStatusOverview) -> str:
    """What the first deployment that Serve gave up on said last, or "". A replica that ran and stopped is none: it is replaced."""
    for name, deployment in application.deployments.items():
        did_run = deployment.status_trigger == "HEALTH_CHECK_FAILED"
        if deployment.status in ("DEPLOY_FAILED", "UNHEALTHY") and not did_run:
            return f"{name}: {_last_words(deployment.message)}"
    return application.message if application.status == "DEPLOY_FAILED" else ""


def _last_words(message: str) -> str:
    """The cause without its trace, where it is an error of ours; else all of it."""
    last = message.strip().rpartition("\n")[2]
    words = re.sub(r"ernie_cluster\.errors\.\w+: ", "", last)
    return message if words == last else words
