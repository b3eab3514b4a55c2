"""From the times of single requests to the numbers of a report. Formulas: protocol/slo.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from baton.protocol.slo import RequestTimes, Slo, goodput_rps, percentile
from benchmarks.load_job import RequestRecord


class Quantiles(msgspec.Struct, frozen=True):
    """NaN (null in JSON) where there is no value."""

    p50: float
    p90: float
    p99: float
    num: int


class Segment(msgspec.Struct, frozen=True):
    """One deployment under one rate, once. ``cpu``: shares of the machine in the window."""

    deployment: str
    rate_rps: float
    repeat: int
    warmup_s: float
    window_s: float
    records: tuple[RequestRecord, ...]
    cpu: dict[str, float]


class Summary(msgspec.Struct, frozen=True):
    """One deployment under one rate, all repeats together.

    Latencies are of the requests that were answered in full. attainment: the share of all
    requests of the windows that met both limits; errors met none.
    output_tokens_per_s: of all tokens that reached the client inside the windows.
    client_lag_ms: how late the client sent; it is part of TTFT, which counts from when the
      request was due.
    goodput_rps_of_repeats: what one repeat alone would have said, for a feeling of the noise.
    """

    deployment: str
    rate_rps: float
    num_requests: int
    num_ok: int
    errors: dict[str, int]
    ttft_ms: Quantiles
    tpot_ms: Quantiles
    tbt_ms: Quantiles
    second_token_gap_ms: Quantiles
    goodput_rps: float
    goodput_rps_of_repeats: tuple[float, ...]
    attainment: float
    output_tokens_per_s: float
    hop_ms: dict[str, Quantiles]
    client_lag_ms: Quantiles
    cpu: dict[str, float]


class Ratio(msgspec.Struct, frozen=True):
    """One deployment over the baseline at one rate; NaN where the baseline has 0 or nothing."""

    deployment: str
    baseline: str
    rate_rps: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    tbt_p50: float
    tbt_p99: float
    second_token_gap_p50: float
    second_token_gap_p99: float
    goodput: float
    output_tokens_per_s: float


def quantiles(values: Sequence[float]) -> Quantiles:
    p50, p90, p99 = (percentile(values, q) for q in (50, 90, 99))
    return Quantiles(p50, p90, p99, len(values))


def request_times(record: RequestRecord) -> RequestTimes:
    return RequestTimes(record.arrival_s, record.token_times_s, ok=not record.error)


def summarise(segments: Sequence[Segment], slo: Slo) -> Summary:
    """Of one deployment and one rate, at least one segment."""
    window_s = sum(segment.window_s for segment in segments)
    measured = [_measured(segment) for segment in segments]
    records = [record for of_segment in measured for record in of_segment]
    complete = [request_times(r) for r in records if not r.error]
    requests = list(map(request_times, records))
    tbt_s = [r.tbt_s for r in complete if len(r.token_times_s) > 1]
    hop_names = dict.fromkeys(name for r in records for name in r.hop_ms)
    return Summary(
        deployment=segments[0].deployment,
        rate_rps=segments[0].rate_rps,
        num_requests=len(records),
        num_ok=len(complete),
        errors=dict(Counter(r.error for r in records if r.error)),
        ttft_ms=_ms(r.ttft_s for r in complete),
        tpot_ms=_ms(r.tpot_s for r in complete if r.tpot_s is not None),
        tbt_ms=_ms(gap for gaps in tbt_s for gap in gaps),
        second_token_gap_ms=_ms(gaps[0] for gaps in tbt_s),
        goodput_rps=goodput_rps(requests, slo, window_s),
        goodput_rps_of_repeats=tuple(
            goodput_rps(map(request_times, of_segment), slo, segment.window_s)
            for segment, of_segment in zip(segments, measured, strict=True)
        ),
        attainment=_over(sum(r.meets(slo) for r in requests), len(requests)),
        output_tokens_per_s=sum(map(_tokens_in_window, segments)) / window_s,
        hop_ms={
            name: quantiles([r.hop_ms[name] for r in records if name in r.hop_ms])
            for name in hop_names
        },
        client_lag_ms=_ms(r.sent_s - r.arrival_s for r in records),
        cpu=mean_shares([segment.cpu for segment in segments]),
    )


def ratio(of: Summary, baseline: Summary) -> Ratio:
    assert of.rate_rps == baseline.rate_rps
    return Ratio(
        deployment=of.deployment,
        baseline=baseline.deployment,
        rate_rps=of.rate_rps,
        ttft_p50=_over(of.ttft_ms.p50, baseline.ttft_ms.p50),
        ttft_p99=_over(of.ttft_ms.p99, baseline.ttft_ms.p99),
        tpot_p50=_over(of.tpot_ms.p50, baseline.tpot_ms.p50),
        tpot_p99=_over(of.tpot_ms.p99, baseline.tpot_ms.p99),
        tbt_p50=_over(of.tbt_ms.p50, baseline.tbt_ms.p50),
        tbt_p99=_over(of.tbt_ms.p99, baseline.tbt_ms.p99),
        second_token_gap_p50=_over(of.second_token_gap_ms.p50, baseline.second_token_gap_ms.p50),
        second_token_gap_p99=_over(of.second_token_gap_ms.p99, baseline.second_token_gap_ms.p99),
        goodput=_over(of.goodput_rps, baseline.goodput_rps),
        output_tokens_per_s=_over(of.output_tokens_per_s, baseline.output_tokens_per_s),
    )


def mean_shares(of_segments: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for shares in of_segments for name in shares)
    return {name: sum(s.get(name, 0.0) for s in of_segments) / len(of_segments) for name in names}


def _measured(segment: Segment) -> list[RequestRecord]:
    return [record for record in segment.records if record.is_measured]


def _tokens_in_window(segment: Segment) -> int:
    begin, end = segment.warmup_s, segment.warmup_s + segment.window_s
    return sum(begin <= at < end for record in segment.records for at in record.token_times_s)


def _ms(seconds: Iterable[float]) -> Quantiles:
    return quantiles([1e3 * value for value in seconds])


def _over(value: float, base: float) -> float:
    return value / base if base else math.nan
