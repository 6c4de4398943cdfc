"""Environment that Ray's processes need on every node, whoever starts them."""

from __future__ import annotations

# RAY_AUTH_MODE is left alone: Ray's own default, a token, keeps strangers from a replica's inner ports
SETTINGS = {
    "RAY_worker_niceness": "0",  # Ray runs actors at nice 15: on a busy laptop decode would starve
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a replica without GPUs keeps its environment
    # one loop per Serve process, without hops between threads: 2 ms less per request; nothing of ours blocks it
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # the head remembers this many calls of actors for Ray's dashboard, 100,000 by itself: half an hour of them is 30 MiB, nobody looks
    "RAY_task_events_max_num_task_in_gcs": "10000",
    # torch: large pages for large tensors; weights are read half as fast again, for the first touch of memory is what takes
    "THP_MEM_ALLOC_ENABLE": "1",
    # in place of the Python proxy, whose way there and back takes 20 ms: this one's takes 2
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # who neither sends nor reads for so long is cut off, in place of after an hour; who waits for an answer is not. Longer than
    # api.client_idle_timeout_s, so that the API ends the request first and can say why
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "120",
}
"""For every cluster; one that is started elsewhere needs them set on all nodes before `ray start`."""
