"""The dashboard of what clients see."""

from __future__ import annotations

from ernie_cluster.render.watch.objectives import BAD, FIRST_TOKEN_S, OBJECTIVES
from ernie_cluster.render.watch.panels import Board, Panel, Query, Row
from ernie_cluster.render.watch.promql import per_s, quantile, series, share

_QUANTILES = (0.5, 0.9, 0.99)


def quantiles(histogram: str) -> tuple[Query, ...]:
    """The middle, nine in ten, and 99 in 100."""
    return tuple(Query(quantile(q, histogram), f"p{q * 100:g}") for q in _QUANTILES)


_FIRST = "ernie_time_to_first_token_seconds"
_IN_TIME = f'le="{FIRST_TOKEN_S}"'

_REQUESTS = (
    Panel(
        "Requests by outcome",
        "Requests that ended, by how. `overloaded` and `rate_limited` were told when to come back.",
        "reqps",
        (Query(per_s("ernie_request_total", "outcome"), "{{outcome}}"),),
        is_stacked=True,
    ),
    Panel(
        "Errors of ours",
        f"Part of the requests that failed through no fault of their client's: {BAD.replace('|', ', ')}.",
        "percentunit",
        (
            Query(
                share(
                    per_s("ernie_request_total", "model", f'outcome=~"{BAD}"'),
                    per_s("ernie_request_total", "model", f'outcome=~"success|{BAD}"'),
                ),
                "{{model}}",
            ),
        ),
    ),
    Panel(
        "In flight",
        "Requests that were accepted and have not ended.",
        "short",
        (Query(f"sum by (model) ({series('ernie_requests_in_flight')})", "{{model}}"),),
        is_stacked=True,
    ),
    Panel(
        "Refusals by reason",
        "Requests that were sent away: for want of room, over a client's limit, and at the door before any work.",
        "reqps",
        (
            Query(per_s("ernie_request_total", "outcome", 'outcome=~"overloaded|rate_limited"'), "{{outcome}}"),
            Query("sum by (reason) (rate(ernie_request_refused_total[$__rate_interval]))", "door: {{reason}}"),
        ),
        is_stacked=True,
    ),
    Panel(
        "Waiting for a place",
        "Requests that the router holds until a replica has room, or a sleeping model is awake.",
        "short",
        (Query(f"max by (model) ({series('ernie_held_requests')})", "{{model}}"),),
    ),
    Panel(
        "Unread tokens",
        "Output that waits for slow clients; those that read nothing for `api.client_idle_timeout_s` are ended.",
        "short",
        (Query(f"sum by (model) ({series('ernie_unread_tokens')})", "{{model}}"),),
    ),
)

_LATENCY = (
    Panel("Time to first token", "From acceptance to the first token that is sent.", "s", quantiles(_FIRST)),
    Panel(
        "Time between tokens",
        "Gap between neighbouring tokens: shows stutter.",
        "s",
        quantiles("ernie_inter_token_latency_seconds"),
    ),
    Panel(
        "Time of a whole request",
        "From acceptance to its end, however it ended.",
        "s",
        quantiles("ernie_e2e_request_latency_seconds"),
    ),
    Panel(
        "Time per output token",
        "One number per request: its pace after the first token.",
        "s",
        quantiles("ernie_time_per_output_token_seconds"),
    ),
    Panel(
        "Preparing",
        "Pictures fetched and decoded, template and tokenizer: all before the router is asked.",
        "s",
        quantiles("ernie_preprocess_seconds"),
    ),
    Panel(
        "First token by model",
        "What nine requests in ten do not exceed.",
        "s",
        (Query(quantile(0.9, _FIRST, "model"), "{{model}}"),),
    ),
)

_GOOD = (
    Panel(
        "Goodput",
        f"Answers whose first token came within {FIRST_TOKEN_S:g} s, beside all that had one.",
        "reqps",
        (
            Query(per_s(f"{_FIRST}_bucket", "", _IN_TIME), "in time"),
            Query(per_s(f"{_FIRST}_count"), "all"),
        ),
    ),
    Panel(
        "First tokens in time",
        f"Part of the first tokens that came within {FIRST_TOKEN_S:g} s.",
        "percentunit",
        (
            Query(
                share(per_s(f"{_FIRST}_bucket", "model", _IN_TIME), per_s(f"{_FIRST}_count", "model")),
                "{{model}}",
            ),
        ),
    ),
    Panel(
        "Budgets that burn",
        "How fast the room for error of a month is used up, over an hour, by the recorded series of the alerts; "
        "1 = in exactly a month.",
        "short",
        tuple(Query(f"{series(o.record('1h'))} / {1 - o.share:.6g}", f"{o.name} {{{{model}}}}") for o in OBJECTIVES),
    ),
)

_TOKENS = (
    Panel(
        "Tokens per second",
        "Prompt tokens, media included; those of them that a prefix cache had; output.",
        "cps",
        (
            Query(per_s("ernie_prompt_tokens_total"), "prompt"),
            Query(per_s("ernie_cached_prompt_tokens_total"), "prompt, cached"),
            Query(per_s("ernie_generation_tokens_total"), "output"),
        ),
    ),
    Panel("Prompt length", "Tokens per prompt, media included.", "short", quantiles("ernie_request_prompt_tokens")),
    Panel("Output length", "Tokens per answer.", "short", quantiles("ernie_request_generation_tokens")),
)

SERVICE = Board(
    "ernie-service",
    "ERNIE / Service",
    "What clients see: requests, latency, goodput, tokens.",
    (Row("Requests", _REQUESTS), Row("Latency", _LATENCY), Row("Goodput", _GOOD), Row("Tokens", _TOKENS)),
    models_of="ernie_request_total",
)
