"""Garbage on every port while requests run: the requests finish, and nothing is left."""

from __future__ import annotations

import socket

import zmq

from tests.support.clusters import assert_no_residue, running_cluster, settled, tiny_config
from tests.support.garbage import blobs, payloads, throw_bytes, throw_messages
from tests.support.reference_streams import ReferenceStreams


async def test_garbage_on_every_port(tmp_path):
    async with running_cluster(tiny_config(), tmp_path) as cluster:
        loads = await settled(cluster)
        message_ports = {int(w.address.rpartition(":")[2]) for w in loads.workers}
        router_pid = cluster.controller.router.pid
        ports = sorted(set(cluster.listening()))
        kv_ports = {p for pid, p in ports if pid != router_pid} - message_ports
        assert len(message_ports) == 2
        assert len(kv_ports) == 1, "the decode worker's"
        assert {p for pid, p in ports if pid == router_pid} == {
            int(cluster.grpc_address.rpartition(":")[2]),
            int(cluster.http_url.rpartition(":")[2]),
        }
        async with ReferenceStreams(cluster, num_streams=6, max_tokens=600) as streams:
            for seed, (_, port) in enumerate(ports):
                assert await throw_bytes(port, seed) == len(blobs(seed)), f"port {port}"
            for seed, port in enumerate(message_ports):
                address = f"tcp://127.0.0.1:{port}"
                for greet in (False, True):
                    sent = await throw_messages(address, zmq.DEALER, seed, greet=greet)
                    assert sent == len(payloads(seed))
            for port in kv_ports:
                await throw_messages(f"tcp://127.0.0.1:{port}", zmq.PUSH, 7, greet=False)
            assert streams.num_running > 0, "the garbage came while requests ran"
        streams.assert_exact()
        for _, port in ports:
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                pass
        await assert_no_residue(cluster)
    dropped = "".join(log.read_text() for log in tmp_path.glob("*.log"))
    assert "dropped" in dropped, "the workers saw the garbage and said so"
    assert "Traceback" not in dropped
