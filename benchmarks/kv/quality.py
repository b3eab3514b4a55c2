"""One method on one context: what it costs on the wire and what it does to the continuation."""

from __future__ import annotations

import msgspec
import torch
from torch.nn.functional import cross_entropy

from benchmarks.kv.methods import Method
from cluster.calibrate.reader import Context, Reader
from kv_transfer.codecs.contract import KvPart


class Sample(msgspec.Struct, frozen=True):
    """bits, bits_without_tables: per element of KV. loss: change of the mean negative log
    likelihood of the continuation's tokens, in nats. divergence: mean nats from what the model
    says after the KV as it was. agreement: part of the tokens whose likeliest is the same."""

    method: str
    identity: str
    num_tokens: int
    context: int
    bits: float
    bits_without_tables: float
    loss: float
    divergence: float
    agreement: float


def measure(reader: Reader, context: Context, number: int, method: Method, identity: str) -> Sample:
    kv = reader.to_array(context.kv)
    arrived = method.run(kv, KvPart(0, 0, kv.shape[2]))
    base = context.log_probs
    if (arrived.kv == kv).all():
        changed = base
    else:
        changed = reader.log_probs(context, reader.from_array(arrived.kv))
    return Sample(
        method=method.name,
        identity=identity,
        num_tokens=kv.shape[2],
        context=number,
        bits=arrived.bits / kv.size,
        bits_without_tables=arrived.bits_without_tables / kv.size,
        loss=_loss(changed, context) - _loss(base, context),
        divergence=(base.exp() * (base - changed)).sum(-1).mean().item(),
        agreement=(base.argmax(-1) == changed.argmax(-1)).float().mean().item(),
    )


def _loss(log_probs: torch.Tensor, context: Context) -> float:
    return cross_entropy(log_probs, context.targets).item()
