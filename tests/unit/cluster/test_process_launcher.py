import asyncio
import sys

from cluster.process_launcher import _Child

ANSWERS = """
import sys
sys.stdin.readline()
print('{"loaded": [1, 4]}')
print('{"loaded": [4, 4]}')
print('{"router": {"router_id": "r", "grpc_address": "a", "http_address": "b", "pid": 7}}')
"""


async def test_what_is_said_of_loading_comes_before_the_answer() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        ANSWERS,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    child = _Child("r", process)
    seen: list[tuple[int, int]] = []
    reply = await child.ask(b"{}", lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (4, 4)]
    assert reply.router is not None
    assert reply.router.pid == 7
    assert await child.wait() == "exit code 0"
    await child.end()
