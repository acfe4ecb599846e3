"""Rendezvous on the loopback interface for the ranks of one machine; torch's own listens on all interfaces."""

from __future__ import annotations

import os
import socket

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "loopback"
ADDRESS = "127.0.0.1"


class LoopbackRendezvous(RendezvousHandler):
    """Rendezvous of a single node: complete from the start, with a store that only this machine can reach."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self.run_id = parameters.run_id
        self.rounds = 0
        self.closed = False
        listener = socket.create_server((ADDRESS, 0))
        port = listener.getsockname()[1]
        # The store takes over the socket, and closes it.
        self.store = dist.TCPStore(ADDRESS, port, is_master=True, multi_tenant=True, master_listen_fd=listener.detach())
        self.place = RendezvousStoreInfo(ADDRESS, port)

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        self.rounds += 1
        return RendezvousInfo(dist.PrefixStore(f"round {self.rounds}", self.store), 0, 1, self.place)

    def is_closed(self) -> bool:
        return self.closed

    def set_closed(self) -> None:
        self.closed = True

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.run_id

    def shutdown(self) -> bool:
        self.closed = True
        return True


def register() -> None:
    """Register the backend with torch's launcher."""
    rendezvous_handler_registry.register(BACKEND, LoopbackRendezvous)


def stay_on_this_machine() -> None:
    """Make gloo and NCCL use the loopback interface, unless the environment names another."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback:
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
