"""Linux assigns a reserved port to no other socket, and the program that gets it can listen there."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from datetime import timedelta

from megatron_r1.platform.ports import reserve_ports

BIND_AND_CONNECT = """
import socket
server = socket.create_server(("127.0.0.1", 0))
assigned = set()
for _ in range(2_000):
    with socket.create_connection(server.getsockname()) as client, server.accept()[0] as accepted:
        assigned.add(client.getsockname()[1])
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("", 0))
        assigned.add(bound.getsockname()[1])
print(*assigned)
"""


def test_no_connection_or_server_of_another_program_gets_a_reserved_port():
    reserved = reserve_ports(300)
    assert len(set(reserved)) == 300
    output = subprocess.run([sys.executable, "-c", BIND_AND_CONNECT], capture_output=True, text=True, check=True).stdout
    assigned = {int(port) for port in output.split()}
    assert len(assigned) > 2_000 and not assigned & set(reserved)


def test_torch_and_asyncio_can_listen_there():
    import torch.distributed as dist

    first, second, third = reserve_ports(3)
    for port, libuv in ((first, True), (second, False)):
        store = dist.TCPStore("127.0.0.1", port, is_master=True, timeout=timedelta(seconds=20), use_libuv=libuv)
        store.set("key", "value")
        assert store.port == port and store.get("key") == b"value"

    async def serve() -> None:
        async with await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", third):
            _, writer = await asyncio.open_connection("127.0.0.1", third)
            writer.close()

    asyncio.run(serve())
