"""Compare the gRPC interface with the last release: what clients hold must keep working.

    python tools/check_proto.py             # exit status 1 and one line per break
    python tools/check_proto.py --update    # at a release: write the record anew

Broken: a field, enum value, message, enum or call that changed its name, number, type,
label or place in a oneof; one that is gone without its number *and* name being reserved.
Additions pass.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "baton" / "api" / "v1" / "released.json"

_Field = descriptor_pb2.FieldDescriptorProto


class Reserved(TypedDict):
    numbers: list[list[int]]
    """Pairs of first and last, both inside."""
    names: list[str]


class Interface(TypedDict):
    """messages: full name -> field number -> description; enums and rpcs alike."""

    messages: dict[str, dict[str, str]]
    enums: dict[str, dict[str, str]]
    rpcs: dict[str, str]
    reserved: dict[str, Reserved]


def describe(file: descriptor_pb2.FileDescriptorProto) -> Interface:
    result = Interface(messages={}, enums={}, rpcs={}, reserved={})
    for name, message in _messages(file.package, file.message_type):
        result["messages"][name] = {str(f.number): _field(message, f) for f in message.field}
        result["reserved"][name] = Reserved(
            numbers=[[r.start, r.end - 1] for r in message.reserved_range],
            names=list(message.reserved_name),
        )
        _describe_enums(result, name, message.enum_type)
    _describe_enums(result, file.package, file.enum_type)
    for service in file.service:
        for method in service.method:
            result["rpcs"][f"{file.package}.{service.name}/{method.name}"] = (
                f"({'stream ' * method.client_streaming}{method.input_type.lstrip('.')}) -> "
                f"{'stream ' * method.server_streaming}{method.output_type.lstrip('.')}"
            )
    return result


def breaks(released: Interface, current: Interface) -> list[str]:
    """One line per promise that ``current`` does not keep; empty when all is well."""
    found = []
    for what in ("messages", "enums"):
        for name, entries in released[what].items():
            if name not in current[what]:
                found.append(f"{name}: gone, and a message or enum cannot be reserved")
                continue
            found += _entry_breaks(name, entries, current[what][name], current["reserved"][name])
    for name, signature in released["rpcs"].items():
        now = current["rpcs"].get(name)
        if now != signature:
            found.append(f"{name}: was {signature}, is {now or 'gone'}")
    for name, reserved in released["reserved"].items():
        if name in current["reserved"]:
            found += _lost_reservations(name, reserved, current["reserved"][name])
    return found


def _entry_breaks(
    owner: str, before: Mapping[str, str], now: Mapping[str, str], reserved: Reserved
) -> Iterator[str]:
    for number, text in before.items():
        name = _name(text)
        if number in now:
            if now[number] != text:
                yield f"{owner} number {number}: was `{text}`, is `{now[number]}`"
            continue
        moved = [other for other, entry in now.items() if _name(entry) == name]
        if moved:
            yield f"{owner} `{text}`: moved from number {number} to {moved[0]}"
        elif name not in reserved["names"] or not _covers(reserved, int(number)):
            yield f'{owner} `{text}`: gone; write `reserved {number}; reserved "{name}";`'


def _lost_reservations(owner: str, before: Reserved, now: Reserved) -> Iterator[str]:
    for first, last in before["numbers"]:
        if not all(_covers(now, number) for number in {first, last}):
            yield f"{owner}: numbers {first} to {last} were reserved and are not any more"
    for name in before["names"]:
        if name not in now["names"]:
            yield f"{owner}: name {name} was reserved and is not any more"


def _covers(reserved: Reserved, number: int) -> bool:
    return any(first <= number <= last for first, last in reserved["numbers"])


def _name(entry: str) -> str:
    return entry.rsplit(" ", 1)[-1]


def _messages(
    prefix: str, messages: Sequence[descriptor_pb2.DescriptorProto]
) -> Iterator[tuple[str, descriptor_pb2.DescriptorProto]]:
    for message in messages:
        name = f"{prefix}.{message.name}"
        yield name, message
        yield from _messages(name, message.nested_type)


def _describe_enums(
    result: Interface, prefix: str, enums: Sequence[descriptor_pb2.EnumDescriptorProto]
) -> None:
    for enum in enums:
        name = f"{prefix}.{enum.name}"
        result["enums"][name] = {str(value.number): value.name for value in enum.value}
        result["reserved"][name] = Reserved(
            numbers=[[r.start, r.end] for r in enum.reserved_range],
            names=list(enum.reserved_name),
        )


def _field(message: descriptor_pb2.DescriptorProto, field: _Field) -> str:
    """Label, type and name; a field of a oneof says so in front."""
    label = "repeated" if field.label == _Field.LABEL_REPEATED else "singular"
    kind = field.type_name.lstrip(".") or _Field.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.proto3_optional:
        label = "optional"
    elif field.HasField("oneof_index"):
        label = f"oneof {message.oneof_decl[field.oneof_index].name}"
    return f"{label} {kind} {field.name}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the record of a release")
    options = parser.parse_args(arguments)

    sys.path.insert(0, str(ROOT))
    from baton.api.v1 import baton_pb2

    file = descriptor_pb2.FileDescriptorProto()
    baton_pb2.DESCRIPTOR.CopyToProto(file)
    current: Any = describe(file)
    if options.update:
        RECORD.write_text(json.dumps(current, indent=1, sort_keys=True) + "\n")
        print(f"wrote {RECORD.relative_to(ROOT)}")
        return 0
    found = breaks(json.loads(RECORD.read_text()), current)
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
