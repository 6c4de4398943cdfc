"""Machines that share nothing but a network answer as one process does."""

from __future__ import annotations

from ernie_cluster.actors.ingress import make_processor
from ernie_cluster.request import SamplingParams
from tests.e2e.application import chat_body
from tests.multinode.site import Site
from tests.tiny import make_worker, run_mixed

PROMPTS = (("Once upon a time", None), ("All work and no play. " * 30, None), ("What is to be seen?", 3))


def text_of_one_process(site: Site, text: str, picture: int | None, max_tokens: int) -> str:
    """What an engine in this process says, without a hand-over."""
    body = chat_body("tiny", text, picture=picture)
    processor = make_processor(site.config, "tiny")
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    request = processor.chat(body["messages"], request_id="one", sampling=sampling)
    worker, outcomes = make_worker()
    run_mixed(worker, [request])
    outcomes.drain()
    return processor.tokenizer.decode(outcomes.tokens["one"])


def test_answers_equal_those_of_one_process(site: Site) -> None:
    assert site.machines_of_api() == ["front", "prefill1"]
    for text, picture in PROMPTS:
        expected = text_of_one_process(site, text, picture, max_tokens=24)
        for machine in ("head", "front", "decode2"):
            assert site.door(machine).text("tiny", text, picture=picture, max_tokens=24) == expected


def test_each_pool_is_on_its_machines(site: Site) -> None:
    where = {
        role: {site.machine_of(r) for r in site.door().replicas_of(role)} for role in ("vision", "prefill", "decode")
    }
    assert where == {"vision": {"front"}, "prefill": {"prefill1", "prefill2"}, "decode": {"decode1", "decode2"}}
