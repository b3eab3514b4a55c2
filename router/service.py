"""The router process: core, gRPC and HTTP servers put together."""

from __future__ import annotations

import asyncio
import os
import time

import zmq.asyncio

from baton.checkpoint.find import resolve
from baton.checkpoint.spec import load_spec
from baton.protocol.clock import MonotonicClock
from baton.protocol.config import ModelConfig
from baton.protocol.errors import ConfigError
from baton.protocol.ids import new_incarnation
from baton.protocol.spec import RouterInfo, RouterSpec, RouterStatus, WorkerInfo
from router.chat_template import ChatTemplate
from router.core import RouterCore
from router.decider import RouterDecider
from router.detokenizer import Detokenizer
from router.frontend import GenerateSpec, ModelInfo
from router.grpc_server import GrpcServer
from router.http_server import HttpServer
from router.metrics import MeteredFrontend, RouterMetrics
from router.tokenizer import Tokenizer
from router.validation import Validator


class RouterService:
    """``start``, then tell it about workers; ``stop`` drains first."""

    def __init__(self, spec: RouterSpec) -> None:
        self._spec = spec
        folder = resolve(spec.model.path)
        tokenizer = Tokenizer.load(folder)
        chat_template = ChatTemplate.load(folder)
        model = _model_info(spec.model)
        validator = Validator(model, tokenizer, chat_template, spec.config, spec.kv_quality)
        incarnation = new_incarnation()
        epoch = time.time_ns()
        self._context = zmq.asyncio.Context()

        def make_detokenizer(request: GenerateSpec) -> Detokenizer:
            return Detokenizer(
                tokenizer,
                request.stop,
                request.skip_special_tokens,
                request.prompt_ids[-4:],
                request.sampling.min_tokens,
            )

        decider = RouterDecider(
            spec.router_id,
            epoch,
            spec.config,
            make_detokenizer,
            is_deterministic=spec.model.deterministic,
        )
        self.core = RouterCore(
            self._context,
            decider,
            model,
            MonotonicClock(),
            router_id=spec.router_id,
            incarnation=incarnation,
        )
        metrics = RouterMetrics(self.core)
        frontend = MeteredFrontend(self.core, metrics)
        self._grpc = GrpcServer(frontend, validator, tokenizer, spec.config)
        self._http = HttpServer(frontend, validator, tokenizer, spec.config, metrics)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> RouterInfo:
        """Bind both ports and serve. Raises ConfigError for a port in use."""
        self._task = asyncio.get_running_loop().create_task(self.core.run(), name="router core")
        await asyncio.sleep(0)
        try:
            grpc_port = await self._grpc.start()
            http_port = await self._http.start()
        except ConfigError:
            await self.stop(0.0)
            raise
        host = self._spec.config.host
        return RouterInfo(
            router_id=self._spec.router_id,
            grpc_address=f"{host}:{grpc_port}",
            http_address=f"{host}:{http_port}",
            pid=os.getpid(),
        )

    def announce(self, info: WorkerInfo) -> None:
        self.core.announce(info)

    def worker_gone(self, worker_id: str, incarnation: str) -> None:
        self.core.worker_gone(worker_id, incarnation)

    def status(self) -> RouterStatus:
        workers = self.core.loads().workers
        down = tuple((w.worker_id, w.incarnation) for w in workers if w.state == "down")
        return RouterStatus(not_ready=self.core.ready() or "", down=down)

    async def wait(self) -> None:
        """Until the core has ended; raises what it raised."""
        assert self._task is not None, "start comes first"
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()

    async def stop(self, drain_s: float) -> None:
        """Admit nothing new, let what runs finish for at most ``drain_s``, then end it all."""
        if self._task is None:
            return
        await self.core.drain(drain_s)
        await self._grpc.stop(0.2)
        await self._http.stop(0.2)
        self._task.cancel()
        await asyncio.wait([self._task])
        self._context.destroy(linger=0)


def _model_info(config: ModelConfig) -> ModelInfo:
    folder = resolve(config.path)
    spec = load_spec(folder, config.max_model_len)
    limit = config.max_model_len or spec.max_position_embeddings
    if limit > spec.max_position_embeddings:
        raise ConfigError(
            f"model.max_model_len is {limit}, the checkpoint has "
            f"{spec.max_position_embeddings} positions; lower it",
            param="model.max_model_len",
        )
    return ModelInfo(
        name=config.served_name or folder.name,
        architecture=spec.architecture,
        max_model_len=limit,
        vocab_size=spec.vocab_size,
        dtype=config.dtype,
        eos_token_ids=tuple(spec.eos_token_ids),
        created_unix_s=int(time.time()),
    )
