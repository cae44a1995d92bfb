"""Every rank learns which host has which ranks."""

import socket

import torch

from headway.launch.place import find_hosts
from headway.parallel.mesh import Layout, World


def hosts(rank: int, world: int) -> dict[str, list[int]]:
    real = socket.gethostname
    socket.gethostname = lambda: f"knoten-ö{rank % 2}"
    try:
        return find_hosts(World(rank, world, rank, torch.device("cpu"), "gloo", Layout(shard=world), None))
    finally:
        socket.gethostname = real


def test_hosts_have_their_ranks(pool):
    assert pool(hosts, ranks=3) == [{"knoten-ö0": [0, 2], "knoten-ö1": [1]}] * 3
    assert hosts(0, 1) == {"knoten-ö0": [0]}
