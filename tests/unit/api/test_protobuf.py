"""Strangers' messages: counted before they are parsed; and the generated code, held to the proto."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

import ernie_cluster
from ernie_cluster.api.limits import ApiLimits
from ernie_cluster.api.protobuf import num_items, parse_message
from ernie_cluster.errors import InvalidRequest
from ernie_cluster.proto.v1 import inference_pb2 as pb

MOST = 10**9
DESCRIPTOR = pb.TokenizeRequest.DESCRIPTOR

parts = st.builds(
    pb.Part,
    text=st.text(max_size=3),
) | st.builds(pb.Part, image=st.builds(pb.Image, data=st.binary(max_size=150)))
messages = st.builds(
    pb.Message, role=st.sampled_from([1, 2]), parts=st.lists(parts, max_size=4), reasoning=st.text(max_size=3)
)
chats = st.builds(
    pb.ChatRequest,
    model=st.text(max_size=3),
    messages=st.lists(messages, max_size=4),
    sampling=st.builds(
        pb.Sampling,
        seed=st.integers(-(2**63), 2**63 - 1),
        temperature=st.floats(allow_nan=False),
        logit_bias=st.dictionaries(st.integers(0, 2**32 - 1), st.floats(allow_nan=False), max_size=3),
        stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=5),
    ),
)
generations = st.builds(
    pb.GenerateRequest, tokens=st.builds(pb.TokenIds, ids=st.lists(st.integers(0, 2**32 - 1), max_size=9))
)
requests = st.builds(pb.TokenizeRequest, chat=chats) | st.builds(pb.TokenizeRequest, generate=generations)


def items_of(message: Message) -> int:
    """What `num_items` counts, counted on the parsed message: fields; a packed list is a field and its numbers."""
    count = 0
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
            count += sum(3 for _ in value)  # the entry, its key and its value
        elif descriptor.is_repeated and descriptor.message_type is None:
            is_packed = descriptor.cpp_type != descriptor.CPPTYPE_STRING
            count += len(value) + is_packed
        elif descriptor.is_repeated:
            count += sum(1 + items_of(inner) for inner in value)
        else:
            count += 1 + (items_of(value) if descriptor.message_type is not None else 0)
    return count


@settings(max_examples=25)
@given(requests)
def test_items_are_counted_without_parsing(request: pb.TokenizeRequest) -> None:
    assert num_items(memoryview(request.SerializeToString()), DESCRIPTOR, MOST) == items_of(request)


@settings(max_examples=25)
@given(requests, st.data())
def test_what_is_broken_is_counted_or_refused_but_never_crashes(
    request: pb.TokenizeRequest, data: st.DataObject
) -> None:
    raw = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(0, 3)) if raw else 0):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    broken = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    assert num_items(memoryview(broken), DESCRIPTOR, MOST) <= len(broken)
    with suppress(InvalidRequest):
        assert isinstance(parse_message(pb.TokenizeRequest, broken, ApiLimits()), pb.TokenizeRequest)


@pytest.mark.parametrize(
    ("raw", "is_too_much"),
    [
        (b"\x12\x00" * 90, False),  # messages, empty
        (b"\x12\x00" * 110, True),
        (b"\x12\x04" + b"\x1a\x00" * 2 + b"\x12\x00" * 97, False),  # two of its parts
        (b"\x12\x60" + b"\x1a\x00" * 48 + b"\x12\x00" * 60, True),
        (b"\x22\x01x" * 110, True),  # fields that nobody knows
        (b"\x0a\xc8\x01" + b"x" * 200, False),  # a long name
    ],
)
def test_too_many_items_are_refused(raw: bytes, is_too_much: bool) -> None:
    limits = ApiLimits(max_json_items=100)
    if is_too_much:
        with pytest.raises(InvalidRequest, match="more than 100"):
            parse_message(pb.ChatRequest, raw, limits)
    else:
        assert parse_message(pb.ChatRequest, raw, limits).ByteSize() == len(raw)


def test_no_message_holds_itself() -> None:
    def check(descriptor: object, above: tuple[object, ...]) -> None:
        assert descriptor not in above
        for field in descriptor.fields:  # type: ignore[attr-defined]
            if field.message_type is not None:
                check(field.message_type, (*above, descriptor))

    for message in pb.DESCRIPTOR.message_types_by_name.values():
        check(message, ())


@pytest.mark.skipif(importlib.util.find_spec("grpc_tools") is None, reason="needs grpcio-tools")
def test_generated_code_is_that_of_the_proto(tmp_path: Path) -> None:
    root = Path(ernie_cluster.__file__).parents[1]
    name = "ernie_cluster/proto/v1/inference"
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}", f"{name}.proto"],
        cwd=root,
        check=True,
    )
    fresh, kept = ((folder / f"{name}_pb2.py").read_text().splitlines() for folder in (tmp_path, root))
    assert [line for line in fresh if "AddSerializedFile" in line and line not in kept] == [], "run scripts/proto"
    stubs = (root / f"{name}_pb2_grpc.py").read_text()
    for service in pb.DESCRIPTOR.services_by_name.values():
        assert all(f"/{service.full_name}/{method.name}'" in stubs for method in service.methods), "run scripts/proto"
