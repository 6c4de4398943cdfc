"""The whole configuration of one application: values, frozen, checked at birth.

What follows from a field is a property, never a second field. Names carry their units; `config.load` reads sizes
("256MiB") into `*_bytes` and durations ("30s") into `*_s`. Knows no file format, no Ray and no device.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ernie_cluster.config.auto_model import AutoModelConfig
from ernie_cluster.config.image_search import ImageSearchConfig
from ernie_cluster.config.keys import is_sha256
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.config.quantization import Method, Quantization, choose_method
from ernie_cluster.errors import ConfigError, UnknownModel

Role = Literal["vision", "prefill", "decode", "mixed"]
Device = Literal["auto", "cpu", "cuda"]

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

GPU_BLOCK_TOKENS = 256
"""KV blocks on a GPU are a multiple of so many tokens: the pages that torch's paged attention takes."""


def _check_range(owner: object, low: float, *names: str, high: float = math.inf) -> None:
    """Raise ConfigError unless each named field is finite and within [low, high]; None passes."""
    for name in names:
        value = getattr(owner, name)
        if value is None or (math.isfinite(value) and low <= value <= high):
            continue
        bound = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ConfigError(f"{name} = {value} must be {bound}")


def _check_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} = {value} must be greater than 0")


def _check_unique(what: str, values: Collection[str]) -> None:
    twice = sorted({v for v in values if list(values).count(v) > 1})
    if twice:
        raise ConfigError(f"{what} {', '.join(map(repr, twice))} appears more than once; give each its own")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine: the same for all replicas of a model. Sizes are per rank."""

    block_size: int = 16
    """Tokens per KV block, at least 1; a multiple of 256 where a pool that computes in bfloat16 has GPUs."""
    kv_cache_bytes: int = 256 * MIB
    """Bytes of KV cache per rank, at least 1; what does not fill a block is not used."""
    max_batch_tokens: int = 2048
    """Tokens per step, prefill chunks included; at least `max_num_seqs`, as each running sequence takes one."""
    max_num_seqs: int = 64
    """Sequences that run at the same time, at least 1."""
    enable_prefix_cache: bool = True
    """Keep full blocks of finished prompts and share them with prompts that begin alike."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and KV; auto is the checkpoint's own."""
    kv_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """Of K and V: int8 or fp8 (e4m3) take half of bfloat16's room, with a scale for each token and head; auto is `dtype`."""
    device: Device = "auto"
    """auto: cuda where the replica was given a GPU, else cpu."""
    num_threads: int = 0
    """CPU threads per rank; 0 = as many as the cores that the replica was given."""
    cuda_graphs: bool = True
    """Record decode steps as CUDA graphs, which takes seconds at the start; on GPUs only, in bfloat16, with dp = 1."""
    kv_placement: Literal["auto", "shared", "split"] = "auto"
    """Where `tp` ranks hold KV: shared = one memory with all heads, on the CPU of one host; split = each rank its own
    heads; auto = split on GPUs, else shared."""
    max_model_len: int | None = None
    """Most tokens of one sequence, prompt and output together, at least 2; None = the model's own bound."""

    def threads(self, num_cpus: float) -> int:
        """CPU threads of a rank that was given `num_cpus` cores."""
        return self.num_threads or max(1, int(num_cpus))

    def dtype_of(self, checkpoint_dtype: str) -> str:
        """Type of weights that are not quantised, and of activations, for a checkpoint stored as `checkpoint_dtype`."""
        return checkpoint_dtype if self.dtype == "auto" else self.dtype

    def kv_dtype_of(self, checkpoint_dtype: str) -> str:
        """Type of KV, as `KVLayout.from_model` takes it."""
        return self.dtype_of(checkpoint_dtype) if self.kv_dtype == "auto" else self.kv_dtype

    def __post_init__(self) -> None:
        _check_range(self, 1, "block_size", "kv_cache_bytes", "max_batch_tokens", "max_num_seqs")
        _check_range(self, 0, "num_threads")
        _check_range(self, 2, "max_model_len")
        if self.max_batch_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens = {self.max_batch_tokens} must be at least max_num_seqs = {self.max_num_seqs}: "
                "each running sequence takes one token of every step"
            )


@dataclass(frozen=True, slots=True)
class EplbConfig:
    """Expert-parallel load balancing: experts of a gang move to where the ranks have equally much to do."""

    enabled: bool = False
    """Move experts, between two steps, by the tokens that each has had. Answers stay the same. For gangs only."""
    interval_steps: int = 1000
    """Steps between two decisions, at least 1; each looks at the tokens since the one before."""
    redundant_experts: int = 0
    """Slots of each rank, layer and modality for copies of hot experts, at least 0, while `enabled`; each costs the memory
    of an expert. With 0 experts change places only."""
    min_gain: float = 0.05
    """A layer's experts stay unless the fullest rank would lose at least this part of its load, 0 to 1."""

    def __post_init__(self) -> None:
        _check_range(self, 1, "interval_steps")
        _check_range(self, 0, "redundant_experts")
        _check_range(self, 0, "min_gain", high=1)


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """All replicas of one role of one model."""

    role: Role
    """What the replicas do at first; vision: pictures to embeddings, mixed: prefill and decode in one place."""
    num_replicas: int = 1
    """Replicas, at least 1; each is a gang of `tp * dp` ranks."""
    num_cpus: float = 1.0
    """CPU cores per rank, more than 0; fractions share a core."""
    num_gpus: float = 0.0
    """GPUs per rank, 0 to 1; fractions share a GPU."""
    tp: int = 1
    """Tensor-parallel ranks, at least 1; 1 in vision pools."""
    dp: int = 1
    """Data-parallel groups of `tp` ranks, at least 1; 1 in vision pools."""
    eplb: EplbConfig = EplbConfig()
    """Where experts stand; only where `tp * dp` is more than 1."""
    quantization: Literal["auto", Quantization] = "auto"
    """auto = the model's; another one is refused, see `ModelDeployment`."""

    def __post_init__(self) -> None:
        _check_range(self, 1, "num_replicas")
        _check_positive(self, "num_cpus")
        _check_range(self, 0, "num_gpus", high=1)
        world = self.dims.world  # checks both
        if self.role == "vision" and world > 1:
            raise ConfigError(
                f"vision pool: tp * dp = {self.tp} * {self.dp} = {world} must be 1; "
                "a picture is encoded on one rank, so raise num_replicas instead"
            )
        if self.eplb.enabled and world == 1:
            raise ConfigError(
                f"{self.role} pool: eplb.enabled with tp * dp = 1: one rank has all experts; raise tp or dp, or turn it off"
            )

    @property
    def dims(self) -> ParallelDims:
        """How one replica's ranks split the model."""
        return ParallelDims(self.tp, self.dp, self.eplb.redundant_experts if self.eplb.enabled else 0)


@dataclass(frozen=True, slots=True)
class ModelDeployment:
    """One served model.

    That a model with pictures has a vision pool can be checked only beside its checkpoint: see `check_media`.
    """

    name: str
    """What clients put into the field `model`; letters, digits and any of `. _ : / @ + -`."""
    path: str
    """Checkpoint folder with config.json, tokenizer and *.safetensors, the same on every node; or a repository of the
    Hugging Face hub as `owner/name` or `owner/name@revision`, which `serve` fetches into the hub's cache."""
    pools: tuple[PoolConfig, ...]
    """One per role: mixed, or prefill and decode, or all three; and vision where pictures are to be served."""
    engine: EngineConfig = EngineConfig()
    """The same for all pools."""
    quantization: Literal["auto", Quantization] = "auto"
    """How the decoder's matrices are held, in all pools alike: none, wint8, wint4 (experts in 4 bits, the rest in 8) or fp8
    (Hopper); auto = as the checkpoint stores them. A plain checkpoint is quantised while it is loaded."""
    image_min_pixels: int | None = None
    """Smaller pictures are enlarged to this, at least 1; None = the checkpoint's preprocessor_config.json."""
    image_max_pixels: int | None = None
    """Larger pictures are shrunk to this, at least `image_min_pixels`; None = the checkpoint's own."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.:/@+-]+", self.name):
            raise ConfigError(f"name = {self.name!r} must be letters, digits or any of . _ : / @ + -")
        if not self.path:
            raise ConfigError("path is empty; name a checkpoint folder")
        self._check_pools()
        self._check_quantization()
        _check_range(self, 1, "image_min_pixels", "image_max_pixels")
        if self.image_min_pixels and self.image_max_pixels and self.image_max_pixels < self.image_min_pixels:
            raise ConfigError(
                f"image_max_pixels = {self.image_max_pixels} must be at least image_min_pixels = {self.image_min_pixels}"
            )

    def _check_pools(self) -> None:
        _check_unique("pool role", [p.role for p in self.pools])
        roles = {p.role for p in self.pools}
        missing = {"prefill", "decode"} - roles
        if len(missing) == 1:
            lone = ({"prefill", "decode"} & roles).pop()
            raise ConfigError(f"pools of {self.name!r}: {lone} needs {missing.pop()} beside it; add it, or use mixed")
        if missing and "mixed" not in roles:
            raise ConfigError(f"pools of {self.name!r}: {sorted(roles)} cannot serve; add mixed, or prefill and decode")
        for pool in self.pools:
            if self.engine.device == "cuda" and not pool.num_gpus:
                raise ConfigError(
                    f"pools of {self.name!r}: {pool.role} has num_gpus = 0 but engine.device is cuda; "
                    "give it GPUs, or set device to auto"
                )
            self._check_blocks(pool)

    def _check_blocks(self, pool: PoolConfig) -> None:
        has_gpu = pool.num_gpus > 0 and self.engine.device != "cpu" and self.engine.dtype != "float32"
        if has_gpu and pool.role != "vision" and self.engine.block_size % GPU_BLOCK_TOKENS:
            raise ConfigError(
                f"engine.block_size = {self.engine.block_size} of {self.name!r}: {pool.role} has GPUs, whose attention takes "
                f"blocks of a multiple of {GPU_BLOCK_TOKENS} tokens; set it to {GPU_BLOCK_TOKENS}"
            )

    def _check_quantization(self) -> None:
        """One for all pools. KV and tokens of one pool are continued by another; with other weights there, an answer would
        depend on which replicas took part in it, and one that goes on after a failure would change."""
        for pool in self.pools:
            if pool.quantization not in ("auto", self.quantization):
                raise ConfigError(
                    f"pools of {self.name!r}: {pool.role} has quantization = {pool.quantization}, the model has "
                    f"{self.quantization}; KV that one pool computes is continued by another, so all pools need the same "
                    "weights: set quantization on the model, or serve it under two names"
                )

    def pool(self, role: Role) -> PoolConfig | None:
        """The pool of this role, or None."""
        return next((p for p in self.pools if p.role == role), None)

    def method(self, stored: Quantization) -> Method | None:
        """How its weights are held, None for plain ones, beside a checkpoint that is stored so.

        Raises:
            ConfigError: the two differ, or a pool runs where the method does not.
        """
        try:
            method = choose_method(self.quantization, stored)
        except ConfigError as e:
            raise ConfigError(f"model {self.name!r}: {e}") from None
        on_cpu = [p.role for p in self.pools if p.role != "vision" and (not p.num_gpus or self.engine.device == "cpu")]
        if method is not None and method.is_fp8 and on_cpu:
            raise ConfigError(
                f"model {self.name!r}: quantization = fp8 needs Hopper GPUs or newer ones, and pool {on_cpu[0]} runs on CPU; "
                "use wint8 or wint4"
            )
        return method

    def check_media(self, *, is_multimodal: bool) -> None:
        """Hold the pools against the checkpoint.

        Raises:
            ConfigError: a vision pool for a model without eyes. (A multimodal model without one serves text only.)
        """
        if self.pool("vision") and not is_multimodal:
            raise ConfigError(
                f"pools of {self.name!r}: the checkpoint {self.path} is text-only; remove the vision pool"
            )

    @property
    def has_vision_pool(self) -> bool:
        """Whether pictures can be served."""
        return self.pool("vision") is not None


@dataclass(frozen=True, slots=True)
class TransportConfig:
    """How KV and embeddings travel between replicas."""

    kind: Literal["auto", "local", "ipc", "nccl", "shared_memory", "nixl", "object_store"] = "auto"
    """auto: between GPUs CUDA IPC inside a node and NCCL between nodes, where cupy is installed; else shared memory
    inside a node, and the object store, which always works. A named one is used where it can be. local: one process.
    nixl: the receiver reads from the sender's host memory; never chosen by auto, and to be installed on every node."""
    piece_bytes: int = 4 * MIB
    """Largest piece that is sent and checksummed at once, at least 1."""
    staging_bytes: int = 64 * MIB
    """Buffer per pair of replicas for what is on its way, at least `piece_bytes`; between GPUs at both ends, on them."""

    def __post_init__(self) -> None:
        _check_range(self, 1, "piece_bytes")
        if self.staging_bytes < self.piece_bytes:
            raise ConfigError(
                f"staging_bytes = {self.staging_bytes} must be at least piece_bytes = {self.piece_bytes}: "
                "it has to hold one piece"
            )


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Limits of admission and routing."""

    reserve_output_tokens: int = 256
    """Output tokens (or `max_tokens` if fewer) for which decode blocks are reserved at the start; at least 1."""
    lease_timeout_s: float = 30.0
    """A lease without a sign of life for this long is taken back; more than `heartbeat_timeout_s`."""
    snapshot_interval_s: float = 0.1
    """A replica whose load changes tells so this often, more than 0; one at rest tells once a second that it lives."""
    heartbeat_timeout_s: float = 5.0
    """A replica without a snapshot for this long is not used; more than `snapshot_interval_s`. The end of its process is
    noticed at once; this is for what hangs, and must outlast the longest pause of a busy machine."""
    max_queued_tokens: int = 131_072
    """A replica with this many prompt (vision: media) tokens waiting takes no more; at least 1."""
    retry_after_s: float = 1.0
    """What a refused client is told to wait at least, more than 0; longer where the queues say so."""
    max_waiting: int = 1000
    """Requests that may wait for a place when there is none; 0 = all are refused at once."""
    max_wait_s: float = 30.0
    """How long batch work, of a priority above 0, waits for a place; at least 0."""
    interactive_wait_s: float = 0.0
    """The same for all other requests; 0 = they are told at once when to come back."""
    local_decode_tokens: int = 0
    """Prompts of up to this many tokens may be answered by the prefill replica that computes them, where that is cheaper
    than a hand-over; 0 = none are."""
    max_attempts: int = 2
    """Tries per request, the first included, when replicas are lost; at least 1."""

    def __post_init__(self) -> None:
        _check_range(self, 1, "reserve_output_tokens", "max_queued_tokens", "max_attempts")
        _check_range(self, 0, "local_decode_tokens", "max_waiting", "max_wait_s", "interactive_wait_s")
        _check_positive(self, "snapshot_interval_s", "heartbeat_timeout_s", "lease_timeout_s", "retry_after_s")
        for longer, shorter in (
            ("heartbeat_timeout_s", "snapshot_interval_s"),
            ("lease_timeout_s", "heartbeat_timeout_s"),
        ):
            if getattr(self, longer) <= getattr(self, shorter):
                raise ConfigError(
                    f"{longer} = {getattr(self, longer)} must be more than {shorter} = {getattr(self, shorter)}"
                )


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """PEM files, the same absolute paths where `serve` runs and on each node with an API replica.

    A pair that is renewed counts for the connections that come after."""

    certificate: str
    """The server's certificate, and behind it those that lead to its CA."""
    key: str
    """Private key of that certificate, not encrypted."""
    client_ca: str | None = None
    """CAs, one of which must have signed a certificate that each client has to show; None = clients show none."""

    def __post_init__(self) -> None:
        for name in ("certificate", "key", "client_ca"):
            path = getattr(self, name)
            if path is not None and not os.path.isabs(path):
                raise ConfigError(f"{name} = {path!r} must be an absolute path: each API replica reads it")


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """The front door, and what it lets in."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = all interfaces."""
    port: int = 8000
    """HTTP port, 1 to 65535."""
    grpc_port: int | None = None
    """gRPC port on each machine with an API replica, 1 to 65535, another one than `port`; None = no gRPC."""
    grpc_tls: TlsConfig | None = None
    """What gRPC is encrypted with; None = not at all. HTTP goes through Serve's proxy, which speaks no TLS: for HTTPS set a
    proxy of your own before `port`."""
    num_replicas: int = 1
    """API replicas, at least 1."""
    max_body_bytes: int = 32 * MIB
    """Largest request body, at least 1."""
    max_image_bytes: int = 20 * MIB
    """Largest encoded picture, fetched or inline; at least 1."""
    max_image_pixels: int = 50_000_000
    """Largest picture by width * height before decoding, at least 1."""
    max_images: int = 32
    """Most pictures per request; 0 refuses all."""
    max_video_bytes: int = 20 * MIB
    """Largest encoded video, at least 1."""
    max_video_frames: int = 5000
    """Most frames of a video, before sampling; at least 2."""
    max_videos: int = 4
    """Most videos per request; 0 refuses all."""
    max_json_depth: int = 32
    """Deepest nesting of a request body, at least 8: chat messages with tools need that much."""
    request_timeout_s: float = 600.0
    """Deadline of a request that brings none, and the most that one may ask for; more than 0."""
    default_max_tokens: int | None = None
    """Most output tokens of a request that does not say, at least 1, all rounds of tools together; None = what is left of
    the context for a chat, 256 for a text without a template, which seldom comes to an end by itself."""
    preprocess_threads: int = 2
    """Threads per API replica that parse and tokenise (and decode, see `decode_processes`), at least 1."""
    decode_processes: int = 1
    """Processes per API replica that decode and resize pictures and videos; 0 leaves it to `preprocess_threads`, where
    nothing bounds the time and memory of one file."""
    decode_timeout_s: float = 30.0
    """Most that one picture or video may take to decode, more than 0."""
    decode_memory_bytes: int = 2 * GIB
    """Address space of a decoding process, at least 512 MiB: the libraries take 300 MB of it."""
    media_cache_bytes: int = 256 * MIB
    """Patches of pictures and videos kept per API replica for when they come again; 0 keeps none."""
    media_hosts: tuple[str, ...] = ()
    """Hosts from which http(s) URLs are fetched, as `images.example.com`, `*.example.com` (its subdomains), `*` (all) or
    `store.internal:9000`; none: nothing is fetched."""
    media_folder: str | None = None
    """Folder below which `file://` URLs may read, an absolute path on each node with an API replica; None = no files."""
    media_allow_private: bool = False
    """Whether `media_hosts` may have private and loopback addresses."""
    media_timeout_s: float = 20.0
    """Most that fetching one URL may take, more than 0."""
    builtin_tools: tuple[Literal["image_zoom_in_tool", "calculator", "image_search"], ...] = ()
    """Tools that the server runs itself, offered to the model in chats that say nothing of tools; others ask for them by
    name."""
    max_tool_rounds: int = 6
    """Times that one answer may call such tools and go on, at least 1."""
    max_tool_pixels: int = 16_000_000
    """Pixels of all pictures that they may add to one answer's prompt, as the model sees them; at least 1."""
    image_search: ImageSearchConfig | None = None
    """What the tool `image_search` finds; None = it is not on offer."""
    keys_file: str | None = None
    """YAML list of `ApiKey`, an absolute path on each node with an API replica; a change of it counts after a second.
    None = no key is needed."""
    admin_key_sha256: str | None = None
    """SHA-256 of the key that `/metrics` needs, as `ernie-cluster key` prints it; None = it needs none."""
    isolate_prefix_cache: bool = False
    """Cache each key's prompts and pictures for it alone, so that no answer's speed tells what others have sent."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may call the API from a browser, such as https://chat.example; "*" = all, empty = none."""
    playground: bool = True
    """Serve a page to try the models in a browser, at `/`; it is open to see, and asks its user for a key."""

    def __post_init__(self) -> None:
        if not self.host:
            raise ConfigError("host is empty; use 127.0.0.1, or 0.0.0.0 for all interfaces")
        _check_range(self, 1, "port", "grpc_port", high=65535)
        if self.grpc_tls is not None and self.grpc_port is None:
            raise ConfigError(
                "grpc_tls is for gRPC, and grpc_port is not set; set it, or for HTTPS a proxy of your own before port = "
                f"{self.port}: Serve's speaks no TLS"
            )
        if self.grpc_port == self.port:
            raise ConfigError(f"grpc_port = {self.grpc_port} is the HTTP port, too; choose another")
        _check_range(
            self, 1, "num_replicas", "max_body_bytes", "max_image_bytes", "max_image_pixels", "max_video_bytes"
        )
        _check_range(self, 2, "max_video_frames")
        _check_range(self, 1, "default_max_tokens", "preprocess_threads", "max_tool_rounds", "max_tool_pixels")
        _check_unique("builtin_tools:", self.builtin_tools)
        if "image_search" in self.builtin_tools and self.image_search is None:
            raise ConfigError("builtin_tools has image_search, which needs image_search.index and image_search.folder")
        _check_range(self, 0, "max_images", "max_videos", "decode_processes", "media_cache_bytes")
        _check_range(self, 512 * MIB, "decode_memory_bytes")
        _check_range(self, 8, "max_json_depth")
        _check_positive(self, "request_timeout_s", "decode_timeout_s", "media_timeout_s")
        for host in self.media_hosts:
            if not MEDIA_HOST.fullmatch(host):
                raise ConfigError(
                    f"media_hosts has {host!r}; a host is named as images.example.com, *.example.com or host:port, "
                    "without http:// and path"
                )
        if self.media_folder is not None and not os.path.isabs(self.media_folder):
            raise ConfigError(
                f"media_folder = {self.media_folder!r} must be an absolute path: each API replica reads it"
            )
        self._check_access()

    def _check_access(self) -> None:
        if self.keys_file is not None and not os.path.isabs(self.keys_file):
            raise ConfigError(f"keys_file = {self.keys_file!r} must be an absolute path: each API replica reads it")
        if self.admin_key_sha256 is not None and not is_sha256(self.admin_key_sha256):
            raise ConfigError(
                "admin_key_sha256 must be 64 hexadecimal digits, not the key itself; `ernie-cluster key` prints them"
            )
        if self.isolate_prefix_cache and self.keys_file is None:
            raise ConfigError("isolate_prefix_cache = true needs keys_file: without keys all clients are one")
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(f'cors_origins: {origin!r} must be like https://chat.example:8443, or "*"')

    @property
    def is_open_to_strangers(self) -> bool:
        """Anybody who can reach this machine may use the models."""
        return self.keys_file is None and not _is_loopback(self.host)


MEDIA_HOST = re.compile(
    r"(?P<name>\*|\[[0-9A-Fa-f:.]+\]|(?:\*\.)?[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?)(?::(?P<port>[0-9]{1,5}))?"
)
"""An entry of `ApiConfig.media_hosts`."""

_ORIGIN = re.compile(r"https?://[^/\s?#@]+")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Everything that one application serves, and how."""

    models: tuple[ModelDeployment, ...]
    """Served models, at least one, with different names."""
    router: RouterConfig = RouterConfig()
    """Limits of admission and routing, the same for all models."""
    api: ApiConfig = ApiConfig()
    """The front door."""
    transport: TransportConfig = TransportConfig()
    """How KV and embeddings travel."""
    auto_model: AutoModelConfig | None = None
    """A name that stands for two of the models; None = there is none."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("models is empty; name at least one, for example {preset: tiny, path: FOLDER}")
        _check_unique("model name", [m.name for m in self.models])
        if self.auto_model is not None:
            self.auto_model.check(tuple(m.name for m in self.models))
        if self.api.image_search is not None and self.search_model is None:
            wish = self.api.image_search.model
            whose = "any served model" if wish is None else f"a served model {wish!r}"
            raise ConfigError(f"api.image_search compares with the vision pool of {whose}, and there is none")

    @property
    def search_model(self) -> ModelDeployment | None:
        """The deployment that compares pictures for `image_search`."""
        if self.api.image_search is None:
            return None
        wish = self.api.image_search.model
        return next((m for m in self.models if m.has_vision_pool and wish in (None, m.name)), None)

    def model(self, name: str) -> ModelDeployment:
        """The deployment that serves `name`.

        Raises:
            UnknownModel: none does; the message lists those that are served.
        """
        for deployment in self.models:
            if deployment.name == name:
                return deployment
        raise UnknownModel(f"model {name!r} is not served here; known: {', '.join(m.name for m in self.models)}")
