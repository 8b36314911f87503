"""What W&B has written offline, read back from a ``run-ID.wandb``: records of protobuf in LevelDB's log format."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _FILE_HEADER, _HEADER = 32768, 7, struct.Struct("<IHB")  # a checksum, the length, and the kind
_FULL, _LAST = 1, 4


def config_and_history(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings of the run, and all rows that it logged."""
    config: dict[str, Any] = {}
    rows = []
    for record in _records(file.read_bytes()):
        for item in (*record.config.update, *record.run.config.update):
            config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        if record.history.item:
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return config, rows


def _records(content: bytes) -> Iterator[Record]:
    place, parts = _FILE_HEADER, b""
    while place + _HEADER.size <= len(content):
        if _BLOCK - place % _BLOCK < _HEADER.size:  # nothing begins so close to a block's end
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = _HEADER.unpack_from(content, place)
        place += _HEADER.size
        parts += content[place : place + length]
        place += length
        if kind in (_FULL, _LAST):
            yield Record.FromString(parts)
            parts = b""
