"""The KV's own bytes, in sections with checksums."""

from __future__ import annotations

from kv_transfer.codecs.container import (
    Form,
    StreamWriter,
    header_for,
    read_raw,
    read_sections,
)
from kv_transfer.codecs.contract import (
    Array,
    Bytes,
    CodecError,
    KvGeometry,
    KvPart,
    Quality,
)


class RawCodec:
    name = "raw"
    quality = Quality.EXACT

    def __init__(self, geometry: KvGeometry) -> None:
        self._geometry = geometry

    def encode(self, kv: Array, part: KvPart) -> Bytes:
        writer = StreamWriter(header_for(self.name, self._geometry, kv))
        for layer in kv:
            writer.commit_raw(layer)
        return writer.finish()

    def decode(self, stream: Bytes, part: KvPart, out: Array) -> None:
        sections = read_sections(stream, header_for(self.name, self._geometry, out))
        for section, layer in zip(sections, out, strict=True):
            if section.form is not Form.RAW:
                raise CodecError("a section of a raw KV stream is coded")
            read_raw(section, layer)
