"""Ctrl-C and SIGTERM end a program soon, whatever it is doing."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

STOPPED = "stopped: what is finished is saved; the same command continues it"
_PATIENCE = 1.0  # seconds until a program that does not listen is ended
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def stop_soon(message: str = STOPPED) -> None:
    """From now on, SIGTERM and Ctrl-C raise KeyboardInterrupt, and a second later end the program.

    Python handles a signal between two steps of its own, but a compilation can take minutes. A
    thread is told of the signal at once, and ends the program in its stead, with `message`. That is
    safe, as a kill is: all files are whole or absent. The thread also ends a program whose Python
    lost the KeyboardInterrupt, as it does in a callback (JAX has one in the garbage collection).
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = sys.unraisablehook
    sys.unraisablehook = lambda lost: None if lost.exc_type is KeyboardInterrupt else report(lost)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, message), daemon=True).start()


def stop_now(message: str = STOPPED) -> None:
    """Ends the program without waiting for what its threads are doing."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


def _watch(reader: int, message: str) -> None:
    while os.read(reader, 1)[0] not in _SIGNALS:
        pass
    time.sleep(_PATIENCE)
    stop_now(message)
