"""What a run does not print."""

import errno
import os
import threading

import pytest
from tensorboard.summary.writer.event_file_writer import _AsyncWriter

from srlora_pl.run.messages import quieten


class Full:
    """A file on a full disk."""

    def write(self, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        pass


def test_a_full_disk_is_told_by_the_main_thread_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest has its own
    quieten()
    writer = _AsyncWriter(Full())
    writer._byte_queue.put(b"event")
    writer._worker.join(10)
    with pytest.raises(OSError, match="No space left on device"):
        writer.write(b"another")
    assert capsys.readouterr().err == ""


def test_other_threads_keep_their_tracebacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest has its own
    quieten()
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join(10)
    assert "ZeroDivisionError" in capsys.readouterr().err
