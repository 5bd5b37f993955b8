"""TensorBoard's files against those that tensorboardX writes and its definitions read."""

from __future__ import annotations

import struct

import pytest

from jaxfi.training.events import scalar_events

tensorboard = pytest.importorskip("tensorboardX")

SCALARS = {"train_loss": 1.25, "Prüfverlust": -3.5e-7, "accuracy": float("nan"), "x" * 300: 0.0}
TIME = 1_700_000_000.125


def records(content: bytes) -> list[bytes]:
    """The TFRecords, their lengths and checksums checked by tensorboardX's own functions."""
    from tensorboardX.record_writer import masked_crc32c

    found = []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        body = content[12 : 12 + length]
        assert content[8:12] == struct.pack("<I", masked_crc32c(content[:8]))
        assert content[12 + length : 16 + length] == struct.pack("<I", masked_crc32c(body))
        found.append(body)
        content = content[16 + length :]
    return found


@pytest.mark.parametrize("step", [0, 1, 127, 128, 300, 10**6, 2**40])
def test_events_are_what_the_definitions_read(step: int) -> None:
    from tensorboardX.proto.event_pb2 import Event

    first, second = map(Event.FromString, records(scalar_events(step, TIME, SCALARS)))
    assert (first.wall_time, first.file_version) == (TIME, "brain.Event:2")
    assert (second.wall_time, second.step) == (TIME, step)
    values = [(value.tag, value.simple_value) for value in second.summary.value]
    expected = [(t, struct.unpack("<f", struct.pack("<f", v))[0]) for t, v in SCALARS.items()]
    assert repr(values) == repr(expected)


def test_the_file_is_that_of_tensorboardX(tmp_path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 0.5, 7, walltime=TIME)
    (path,) = tmp_path.iterdir()
    theirs = records(path.read_bytes())
    ours = records(scalar_events(7, TIME, {"loss": 0.5}))
    assert ours[1] == theirs[-1]
    assert Event.FromString(ours[0]).file_version == Event.FromString(theirs[0]).file_version
