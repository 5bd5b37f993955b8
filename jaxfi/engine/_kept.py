"""Networks and their programs, kept for the process's next campaign of the same network."""

from __future__ import annotations

import collections
import threading
from typing import Any

from jaxfi.engine._compilation import platform
from jaxfi.network._graph import Network, digest, is_known_by_digest

_MOST = 4  # networks
_KEPT: collections.OrderedDict[tuple, tuple[Network, dict]] = collections.OrderedDict()
_LOCK = threading.Lock()


def kept(network: Network) -> tuple[Network, dict[Any, Any]]:
    """The network that computes the same, operations, shapes and constants, if there was one, and
    the programs of its campaigns so far, to be added to: other parameters and faults run on them
    without compiling. The networks that were used last are kept."""
    if not is_known_by_digest(network):
        return network, {}
    key = digest(network), network.paths, platform()
    with _LOCK:
        found = _KEPT.pop(key, (network, {}))
        _KEPT[key] = found
        while len(_KEPT) > _MOST:
            _KEPT.popitem(last=False)
    return found
