"""The ``baton`` command against a real gRPC server that plays scripts."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from baton.checkpoint.find import resolve
from baton.cli import main
from baton.protocol.config import RouterConfig
from baton.protocol.errors import Overloaded, PeerError
from router.chat_template import ChatTemplate
from router.grpc_server import GrpcServer
from router.tokenizer import Tokenizer
from router.validation import Validator
from tests.support.scripted_frontend import MODEL, Script, ScriptedFrontend, tokens

EXAMPLE = Path(__file__).parents[3] / "deploy" / "examples" / "local.yaml"
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Served:
    address: str
    frontend: ScriptedFrontend


@contextmanager
def served(script: Script) -> Iterator[Served]:
    """A server in a thread with a loop of its own, as the CLI's calls block."""
    # The tokenizer is baton-tiny's, so the vocabulary is too.
    frontend = ScriptedFrontend(script, model=dataclasses.replace(MODEL, vocab_size=2_048))
    ready = threading.Event()
    ports: list[int] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        folder = resolve("baton-tiny")
        config = RouterConfig(grpc_port=0)
        tokenizer = Tokenizer.load(folder)
        validator = Validator(frontend.model, tokenizer, ChatTemplate.load(folder), config)
        server = GrpcServer(frontend, validator, tokenizer, config)
        ports.append(await server.start())
        ready.set()
        await stop.wait()
        await server.stop(grace_s=1.0)

    def work() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=work, name="scripted-server")
    thread.start()
    try:
        assert ready.wait(DEADLINE_S)
        yield Served(f"127.0.0.1:{ports[0]}", frontend)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert not frontend.running


@pytest.fixture
def server() -> Iterator[Served]:
    with served(Script(choices=(tokens("one ", "two ", "three"),))) as running:
        yield running


def baton(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, list(args), input=stdin, prog_name="baton")


def test_complete_streams_the_text(server: Served) -> None:
    result = baton("complete", "count", "--address", server.address)
    assert (result.exit_code, result.stdout) == (0, "one two three\n")


def test_complete_sends_what_was_asked_and_leaves_the_rest_to_the_router(server: Served) -> None:
    args = ["--max-tokens", "7", "--temperature", "0", "--seed", "3", "--stop", "a", "--stop", "b"]
    assert baton("complete", "count", *args, "--address", server.address).exit_code == 0
    (spec,) = server.frontend.specs
    assert (spec.sampling.max_tokens, spec.sampling.temperature, spec.sampling.seed) == (7, 0, 3)
    assert spec.stop == ("a", "b")
    assert spec.sampling.top_p == 1.0


def test_complete_reads_standard_input(server: Served) -> None:
    given = baton("complete", "def f(x):", "--address", server.address)
    read = baton("complete", "-", "--address", server.address, stdin="def f(x):")
    assert given.exit_code == read.exit_code == 0
    first, second = server.frontend.specs
    assert first.prompt_ids == second.prompt_ids


def test_complete_as_json_with_timeline_on_stderr(server: Served) -> None:
    result = baton("complete", "x", "--json", "--timeline", "--address", server.address)
    answer = json.loads(result.stdout)
    assert answer["choices"][0]["text"] == "one two three"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3
    assert "prefill" in result.stderr
    assert "TTFT 5.0 ms, TPOT 2.0 ms, 3 tokens" in result.stderr


def test_error_in_mid_stream_keeps_the_text_and_is_one_line() -> None:
    error = PeerError("decode worker d-0 is lost", hop="decode", retryable=False)
    with served(Script(error=error, error_after=2)) as server:
        result = baton("complete", "x", "--address", server.address)
    assert (result.exit_code, result.stdout) == (1, "ab\n")
    assert result.stderr == "error: decode worker d-0 is lost [hop: decode]\n"


def test_shed_request_says_that_it_may_be_sent_again() -> None:
    with served(Script(error=Overloaded("1024 requests are queued", hop="router"))) as server:
        result = baton("complete", "x", "--address", server.address)
    assert result.exit_code == 1
    assert "the same call may succeed later" in result.stderr


def test_refused_option_names_the_field(server: Served) -> None:
    result = baton("complete", "x", "--temperature", "-1", "--address", server.address)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: temperature is -1")


@pytest.mark.parametrize("args", [["complete", "x"], ["status"], ["chat"]])
def test_no_server_names_the_address_and_the_way_out(args: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refused for certain
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = baton(*args, "--address", address)
    assert result.exit_code == 4
    assert address in result.stderr
    assert "baton serve" in result.stderr
    assert result.stderr.count("\n") == 1


def test_status_shows_workers_and_their_faults(server: Served) -> None:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["status", "--address", server.address])
    assert result.exit_code == 0
    for shown in ("serving", "d-0", "decode", "2%", "1.0 TiB", "6 B", "zeromq", "0.2s"):
        assert shown in result.stdout
    remark = "d-0: 4 preempted, 10 swapped out, 3 parked, 5 held back by a full peer"
    assert remark in result.stdout
    spared = "d-0: tokens spared by prefix cache 750 of 1000 (75%), by guesses 33 of 40 (82%)"
    assert spared in result.stdout
    assert "d-0: integrity: free + held != total" in result.stdout
    assert "d-0 -> d-1: shared_memory, 5.9 KiB (same host)" in result.stdout
    assert "d-0 <- peers: zeromq, 1.0 TiB" in result.stdout
    assert "  frames: kv1 7, raw 2; the link is taken for 25 MiB/s" in result.stdout
    assert "  4 hand-overs, predicted to 25%" in result.stdout


def test_status_as_json(server: Served) -> None:
    report = json.loads(baton("status", "--json", "--address", server.address).stdout)
    assert report["health"] == "serving"
    assert report["model"]["name"] == "scripted"
    (worker,) = report["workers"]
    assert worker["num_parked"] == 3
    assert (worker["num_cache_hit_tokens"], worker["num_cache_queried_tokens"]) == (750, 1_000)
    assert (worker["num_accepted_draft_tokens"], worker["num_draft_tokens"]) == (33, 40)
    assert worker["num_swapped_out"] == 10
    unknown = {"codecs": "", "bytes_per_s": 0, "num_predicted": 0}
    unknown |= {"predicted_s": 0.0, "actual_s": 0.0, "error_s": 0.0}
    near = {"peer": "d-1", "transport": "shared_memory", "reason": "same host", "num_bytes": 6_000}
    assert worker["kv_links"][:2] == [
        near | unknown,
        {"peer": "", "transport": "zeromq", "reason": "", "num_bytes": 2**40} | unknown,
    ]
    assert worker["kv_links"][2]["codecs"] == "kv1 7, raw 2"


@pytest.mark.parametrize(
    ("unused", "line"),
    [
        ("num_draft_tokens", "d-0: tokens spared by prefix cache 750 of 1000 (75%)"),
        ("num_cache_queried_tokens", "d-0: tokens spared by guesses 33 of 40 (82%)"),
    ],
)
def test_status_has_no_share_of_nothing(server: Served, unused: str, line: str) -> None:
    loads = server.frontend.current_loads
    fresh = dataclasses.replace(loads.workers[0], **{unused: 0})
    server.frontend.current_loads = dataclasses.replace(loads, workers=(fresh,))
    result = baton("status", "--address", server.address)
    assert line in result.stdout.splitlines()


def test_chat_keeps_the_conversation_until_reset(server: Served) -> None:
    result = baton("chat", "--address", server.address, stdin="hello\n\nagain\n/reset\nhello\n")
    assert result.exit_code == 0
    assert result.stdout.count("one two three") == 3
    first, second, third = (spec.prompt_ids for spec in server.frontend.specs)
    assert len(second) > len(first)
    assert third == first


def test_chat_forgets_a_turn_that_failed() -> None:
    with served(Script(error=PeerError("lost", retryable=False), error_after=1)) as server:
        result = baton("chat", "--address", server.address, stdin="hello\nhello\n")
        first, second = (spec.prompt_ids for spec in server.frontend.specs)
    assert result.exit_code == 0
    assert first == second
    assert result.stderr.count("error: lost") == 2


def test_ctrl_c_ends_a_running_completion_in_the_server_too() -> None:
    with served(Script(stall_after=1)) as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "baton.cli", "complete", "x", "--address", server.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=DEADLINE_S)
    assert first + rest == b"a\n"
    assert process.returncode == 130
    assert err == b"interrupted\n"
    assert len(server.frontend.closed) == 1


def test_ctrl_c_in_a_chat_stops_the_answer_and_the_chat_goes_on() -> None:
    with served(Script(stall_after=1)) as server:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "baton.cli", "chat", "--address", server.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("hello\n")
        process.stdin.flush()
        said = process.stdout.readline()
        while not said.endswith("> a"):
            said += process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate("/reset\n", timeout=DEADLINE_S)
    assert (process.returncode, err) == (0, "")
    assert rest.startswith(" [stopped]\n> ")
    assert len(server.frontend.closed) == 1


def test_validate_tells_a_good_file_from_a_bad_one(tmp_path: Path) -> None:
    good = baton("validate", "-f", str(EXAMPLE))
    assert good.exit_code == 0
    assert "is valid: model baton-tiny" in good.stdout
    bad_file = tmp_path / "bad.yaml"
    bad_file.write_text(EXAMPLE.read_text().replace("replicas:", "replicsa:") + "\nrooter: {}\n")
    bad = baton("validate", str(bad_file))
    assert bad.exit_code == 3
    lines = bad.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"error: {bad_file}:") for line in lines)
    assert "did you mean replicas?" in lines[0]
    report = json.loads(baton("validate", "--json", str(bad_file)).stdout)
    assert report["ok"] is False
    assert [p["path"] for p in report["problems"]] == [
        "pools[0].replicsa",
        "pools[1].replicsa",
        "rooter",
    ]


def test_missing_file_is_one_line() -> None:
    result = baton("validate", "gone.yaml")
    assert result.exit_code == 3
    assert result.stderr == "error: gone.yaml: cannot be read: No such file or directory\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["complet"], "no command 'complet'; commands: calibrate, chat, complete"),
        (["validate"], "name the file: baton validate"),
        (["status", "--json", "--watch", "1"], "leave out --watch"),
        (["complete"], "Missing argument 'PROMPT'"),
    ],
)
def test_wrong_usage(args: list[str], said: str) -> None:
    result = baton(*args)
    assert result.exit_code == 2
    assert said in result.stderr


def test_help_teaches_with_examples() -> None:
    for command in ("chat", "complete", "status", "validate"):
        assert "Examples:\n    baton " in baton(command, "--help").stdout
    assert "Exit codes" in baton("--help").stdout


def test_commands_load_only_what_they_need() -> None:
    script = (
        "import sys, click\n"
        "from baton.cli.root import main\n"
        "assert 'grpc' not in sys.modules and 'rich' not in sys.modules\n"
        "for name in ('chat', 'complete', 'status'):\n"
        "    main.get_command(click.Context(main), name)\n"
        "heavy = {'torch', 'ray', 'zmq', 'msgspec', 'numpy', 'cluster', 'router', 'yaml'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
