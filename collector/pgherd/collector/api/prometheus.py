"""The Prometheus HTTP API, as Grafana and every other client of Prometheus speaks it. Mounted under /prometheus.

Source: Prometheus documentation, "HTTP API", 3.x. Rules and alerts have a router of their own.
Every answer is `{"status": …}` with Prometheus' errorType and HTTP status, errors of pgherd included.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from pgherd.collector.api.prometheus_json import dump, encode_result
from pgherd.collector.api.prometheus_request import Parameters, decode_label_name, read_parameters
from pgherd.collector.api.query_pool import QueryPool
from pgherd.collector.config import QueryConfig
from pgherd.promql.annotations import Annotations
from pgherd.promql.engine import Limits, evaluate_instant, evaluate_range
from pgherd.promql.parse import formatted, parse
from pgherd.promql.source import TIME_MAX_MS, CatalogSource
from pgherd.promql.values import Matrix, Value, Vector
from pgherd.promql.windows import Checkpoint
from pgherd.proto.clock import Clock
from pgherd.proto.errors import ConfigError, PgherdError
from pgherd.proto.selectors import Matcher

T = TypeVar("T")

# The level of the API that this follows. Clients choose their requests by it; "revision" says what really answers.
PROMETHEUS_LEVEL = "3.0.0"
TRUNCATED = "results truncated due to limit"

_ERROR_TYPES: Mapping[str, tuple[str, int]] = {
    "promql.parse": ("bad_data", 400),
    "usage.invalid": ("bad_data", 400),
    "promql.unsupported": ("execution", 422),
    "promql.execution": ("execution", 422),
    "promql.limit": ("execution", 422),
    "query.timeout": ("timeout", 503),
    "query.overloaded": ("unavailable", 503),
}


@dataclass(frozen=True, slots=True)
class Success:
    """A successful answer: `data` is JSON."""

    data: bytes
    warnings: tuple[str, ...] = ()
    infos: tuple[str, ...] = ()


Handler = Callable[[Parameters], Awaitable[Success]]


def prometheus_router(source: CatalogSource, pool: QueryPool, config: QueryConfig, clock: Clock, version: str) -> APIRouter:
    """Routes `/api/v1/…` over a source; `version` is pgherd's own.

    The caller owns the pool (its `close`), who may ask (the router's dependencies) and compression.
    """
    api = PrometheusApi(source, pool, config, clock, version)
    router = APIRouter()

    def add(path: str, methods: Sequence[str], handler: Callable[[Request], Handler], *parameters: str) -> None:
        async def endpoint(request: Request) -> Response:
            return await _answer(request, handler(request))

        for method in methods:
            router.add_api_route(
                path,
                endpoint,
                methods=[method],
                response_class=Response,
                name=f"prometheus {path}",
                operation_id=f"prometheus {method} {path}",
                openapi_extra=_described(path, method, parameters),
            )

    both, get = ("GET", "POST"), ("GET",)
    evaluation = ("query", "timeout", "limit", "lookback_delta", "stats")
    browsing = ("match[]", "start", "end", "limit")
    add("/api/v1/query", both, lambda _: api.query, *evaluation, "time")
    add("/api/v1/query_range", both, lambda _: api.query_range, *evaluation, "start", "end", "step")
    add("/api/v1/query_exemplars", both, lambda _: api.query_exemplars, "query", "start", "end")
    add("/api/v1/format_query", both, lambda _: api.format_query, "query")
    add("/api/v1/series", both, lambda _: api.series, *browsing)
    add("/api/v1/labels", both, lambda _: api.labels, *browsing)
    add("/api/v1/label/{name:path}/values", get, lambda request: api.values_of(request.path_params["name"]), *browsing)
    add("/api/v1/metadata", get, lambda _: api.metadata, "metric", "limit", "limit_per_metric")
    add("/api/v1/status/buildinfo", get, lambda _: api.buildinfo)
    return router


def _described(path: str, method: str, parameters: Sequence[str]) -> dict[str, Any]:
    """The route's parameters for OpenAPI: strings all, since that is how Prometheus' clients send times and numbers."""
    schemas: dict[str, dict[str, Any]] = {
        name: {"type": "array", "items": {"type": "string"}} if name.endswith("[]") else {"type": "string"}
        for name in parameters
    }
    places: list[dict[str, Any]] = [{"name": name, "in": "query", "schema": schema} for name, schema in schemas.items()]
    if "{" in path:
        places.append({"name": "name", "in": "path", "required": True, "schema": {"type": "string"}})
    described: dict[str, Any] = {"parameters": places}
    if method == "POST":
        form = {"schema": {"type": "object", "properties": schemas}}
        described["requestBody"] = {"content": {"application/x-www-form-urlencoded": form}}
    return described


async def _answer(request: Request, handler: Handler) -> Response:
    """Run a handler; errors become Prometheus' JSON."""
    try:
        success = await handler(await read_parameters(request))
    except PgherdError as error:
        return _error_response(error)
    members = b'{"status":"success","data":' + success.data
    if success.warnings:
        members += b',"warnings":' + dump(success.warnings)
    if success.infos:
        members += b',"infos":' + dump(success.infos)
    return Response(members + b"}", media_type="application/json")


def _error_response(error: PgherdError) -> Response:
    # What the store or the machine can't do now (or any more) is "unavailable": the query itself may be fine.
    error_type, status = _ERROR_TYPES.get(error.code, ("unavailable", 503))
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    document = {"status": "error", "errorType": error_type, "error": message}
    return Response(dump(document), status_code=status, media_type="application/json")


class PrometheusApi:
    """The handlers. Reading the store and evaluating happen in the pool's threads."""

    def __init__(self, source: CatalogSource, pool: QueryPool, config: QueryConfig, clock: Clock, version: str) -> None:
        self._source = source
        self._pool = pool
        self._config = config
        self._clock = clock
        self._version = version

    async def query(self, parameters: Parameters) -> Success:
        """An expression at one moment, now unless `time` says otherwise."""
        expr = parameters.text("query")
        at_ms = parameters.time_ms("time", self._now_ms())
        limit = parameters.limit()
        lookback_ms = self._lookback_ms(parameters)

        def work(checkpoint: Checkpoint) -> Success:
            limits, notes = self._limits(lookback_ms, checkpoint), Annotations()
            return _result(evaluate_instant(expr, at_ms, self._source, limits, notes), notes, limit, checkpoint)

        return await self._evaluated(work, parameters)

    async def query_range(self, parameters: Parameters) -> Success:
        """An expression at every step between `start` and `end`."""
        expr = parameters.text("query")
        start_ms, end_ms = parameters.time_ms("start"), parameters.time_ms("end")
        step_ms = parameters.duration_ms("step")
        limit = parameters.limit()
        lookback_ms = self._lookback_ms(parameters)

        def work(checkpoint: Checkpoint) -> Success:
            limits, notes = self._limits(lookback_ms, checkpoint), Annotations()
            value = evaluate_range(expr, start_ms, end_ms, step_ms, self._source, limits, notes)
            return _result(value, notes, limit, checkpoint)

        return await self._evaluated(work, parameters)

    async def query_exemplars(self, parameters: Parameters) -> Success:
        """Always empty: pgherd's agents record no exemplars."""
        parse(parameters.text("query"))
        parameters.range_ms(-TIME_MAX_MS, TIME_MAX_MS)
        return Success(b"[]")

    async def format_query(self, parameters: Parameters) -> Success:
        """The expression laid out for reading."""
        return Success(dump(formatted(parameters.text("query"))))

    async def series(self, parameters: Parameters) -> Success:
        """Label sets of the series that any `match[]` selects."""
        selectors = parameters.matchers()
        if not selectors:
            raise ConfigError("usage.invalid", "no match[] parameter provided")

        def work(matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> Iterable[tuple[tuple[str, str], ...]]:
            return (tuple(sorted(labels.items())) for labels in self._source.series(matchers, start_ms, end_ms))

        return await self._browse(parameters, selectors, work, dict)

    async def labels(self, parameters: Parameters) -> Success:
        """Names of labels, of all series or those that any `match[]` selects."""
        return await self._browse(parameters, parameters.matchers() or [()], self._source.label_names, str)

    def values_of(self, name: str) -> Handler:
        """The handler for the values of one label."""

        async def label_values(parameters: Parameters) -> Success:
            label = decode_label_name(name)

            def work(matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> Iterable[str]:
                return self._source.label_values(label, matchers, start_ms, end_ms)

            return await self._browse(parameters, parameters.matchers() or [()], work, str)

        return label_values

    async def metadata(self, parameters: Parameters) -> Success:
        """Type, help and unit by metric name."""
        limit, per_metric = parameters.limit(), parameters.limit("limit_per_metric")
        metric = parameters.text("metric")

        def work(checkpoint: Checkpoint) -> Success:
            found = self._source.metadata()
            checkpoint()
            names = sorted(found) if not metric else [metric] if metric in found else []
            entries = {
                name: [{"type": str(found[name].kind), "help": found[name].help, "unit": found[name].unit}][:per_metric]
                for name in names[:limit]
            }
            return Success(dump(entries))

        return await self._pool.run(work, self._config.timeout)

    async def buildinfo(self, _parameters: Parameters) -> Success:
        """What answers: the API level in `version`, pgherd itself in `revision`."""
        return Success(
            dump(
                {
                    "version": PROMETHEUS_LEVEL,
                    "revision": f"pgherd {self._version}",
                    "branch": "",
                    "buildUser": "pgherd",
                    "buildDate": "",
                    "goVersion": "",
                }
            )
        )

    async def _evaluated(self, work: Callable[[Checkpoint], Success], parameters: Parameters) -> Success:
        """Run a query in the pool; with `stats` the answer says how long it waited and worked."""
        asked_mono_s = self._clock.mono_s()
        if not parameters.text("stats"):
            return await self._pool.run(work, self._timeout_s(parameters))

        def timed(checkpoint: Checkpoint) -> Success:
            begun_mono_s = self._clock.mono_s()
            success = work(checkpoint)
            ended_mono_s = self._clock.mono_s()
            timings = {
                "evalTotalTime": ended_mono_s - begun_mono_s,
                "execQueueTime": begun_mono_s - asked_mono_s,
                "execTotalTime": ended_mono_s - asked_mono_s,
            }
            return replace(success, data=success.data[:-1] + b',"stats":' + dump({"timings": timings}) + b"}")

        return await self._pool.run(timed, self._timeout_s(parameters))

    async def _browse(
        self,
        parameters: Parameters,
        selectors: Sequence[Sequence[Matcher]],
        ask: Callable[[Sequence[Matcher], int, int], Iterable[T]],
        shape: Callable[[T], object],
    ) -> Success:
        """Ask the source for each selector and answer the sorted union, `limit` of it at most."""
        start_ms, end_ms = parameters.range_ms(-TIME_MAX_MS, TIME_MAX_MS)
        limit = parameters.limit()

        def work(checkpoint: Checkpoint) -> Success:
            union: set[T] = set()
            for matchers in selectors:
                checkpoint()
                union.update(ask(matchers, start_ms, end_ms))
            found = sorted(union)  # type: ignore[type-var]  # strings or tuples of strings
            warnings = (TRUNCATED,) if limit is not None and len(found) > limit else ()
            return Success(dump([shape(item) for item in found[:limit]]), warnings)

        return await self._pool.run(work, self._config.timeout)

    def _limits(self, lookback_ms: int, checkpoint: Checkpoint) -> Limits:
        return Limits(
            lookback_ms=lookback_ms,
            subquery_step_ms=round(self._config.subquery_step * 1000),
            samples_max=self._config.samples_max,
            points_per_series_max=self._config.points_per_series_max,
            checkpoint=checkpoint,
        )

    def _lookback_ms(self, parameters: Parameters) -> int:
        default_ms = round(self._config.lookback * 1000)
        asked_ms = parameters.duration_ms("lookback_delta", default_ms)
        return asked_ms if asked_ms > 0 else default_ms

    def _timeout_s(self, parameters: Parameters) -> float:
        """The smaller of the request's and the configured timeout."""
        asked_ms = parameters.duration_ms("timeout", round(self._config.timeout * 1000))
        return min(asked_ms / 1000, self._config.timeout)

    def _now_ms(self) -> int:
        return self._clock.wall_unix_ns() // 1_000_000


def _result(value: Value, notes: Annotations, limit: int | None, checkpoint: Checkpoint) -> Success:
    """Encode a query's value, cut to `limit` series, with what was noted about it."""
    warnings: tuple[str, ...] = ()
    if limit is not None:
        if isinstance(value, Vector) and len(value.samples) > limit:
            value, warnings = Vector(value.at_ms, value.samples[:limit]), (TRUNCATED,)
        elif isinstance(value, Matrix) and len(value.series) > limit:
            value, warnings = Matrix(value.series[:limit]), (TRUNCATED,)
    checkpoint()
    return Success(encode_result(value), (*notes.warnings, *warnings), notes.infos)
