"""The gRPC interface keeps what the last release promised, and the stubs are current."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from baton.api.v1 import baton_pb2
from tools.check_proto import RECORD, Interface, breaks, describe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto()
    baton_pb2.DESCRIPTOR.CopyToProto(file)
    return file


@pytest.fixture
def released(file: descriptor_pb2.FileDescriptorProto) -> Interface:
    return describe(file)


def message(file: descriptor_pb2.FileDescriptorProto, name: str) -> descriptor_pb2.DescriptorProto:
    return next(m for m in file.message_type if m.name == name)


def test_the_last_release_still_works(file):
    assert breaks(json.loads(RECORD.read_text()), describe(file)) == []


def test_the_stubs_are_those_of_the_proto_file(file, tmp_path):
    compiled = tmp_path / "baton.binpb"
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "--proto_path=."),
            *(f"--descriptor_set_out={compiled}", "baton/api/v1/baton.proto"),
        ],
        check=True,
        cwd=ROOT,
    )
    current = descriptor_pb2.FileDescriptorSet.FromString(compiled.read_bytes()).file[0]
    for field in (f for m in current.message_type for e in (m, *m.nested_type) for f in e.field):
        field.ClearField("json_name")
    assert current == file, "run `make proto` and commit what it writes"


def test_an_addition_passes(file, released):
    message(file, "Usage").field.add(name="cached_tokens", number=3, type=5, label=1)
    assert breaks(released, describe(file)) == []


def test_a_renumbered_field_is_caught(file, released):
    message(file, "GenerateResponse").field[2].number = 30
    assert breaks(released, describe(file)) == [
        "baton.v1.GenerateResponse `singular int32 seq`: moved from number 3 to 30"
    ]


def test_a_reused_number_is_caught(file, released):
    message(file, "Usage").field[1].name = "cached_tokens"
    assert breaks(released, describe(file)) == [
        "baton.v1.Usage number 2: was `singular int32 completion_tokens`, "
        "is `singular int32 cached_tokens`"
    ]


def test_a_changed_type_is_caught(file, released):
    message(file, "Usage").field[0].type = descriptor_pb2.FieldDescriptorProto.TYPE_STRING
    (line,) = breaks(released, describe(file))
    assert "`singular int32 prompt_tokens`, is `singular string prompt_tokens`" in line


def test_a_removed_field_is_caught_unless_number_and_name_are_reserved(file, released):
    usage = message(file, "Usage")
    del usage.field[1]
    (line,) = breaks(released, describe(file))
    assert 'write `reserved 2; reserved "completion_tokens";`' in line
    usage.reserved_name.append("completion_tokens")
    assert breaks(released, describe(file))
    usage.reserved_range.add(start=2, end=3)
    assert breaks(released, describe(file)) == []
    kept = describe(file)
    usage.ClearField("reserved_range")
    assert "were reserved and are not any more" in breaks(kept, describe(file))[0]


def test_a_changed_enum_value_is_caught(file, released):
    file.enum_type[0].value[1].number = 9
    (line,) = breaks(released, describe(file))
    assert "FINISH_REASON_STOP`: moved from number 1 to 9" in line


def test_a_changed_call_is_caught(file, released):
    file.service[0].method[0].server_streaming = False
    (line,) = breaks(released, describe(file))
    assert line.startswith("baton.v1.Baton/Generate: was (baton.v1.GenerateRequest) -> stream")


def test_a_removed_message_is_caught(file, released):
    file.message_type.remove(message(file, "ErrorDetail"))
    (line,) = breaks(released, describe(file))
    assert line.startswith("baton.v1.ErrorDetail: gone")
