"""The collector's composition root: builds every part, connects them, runs them, ends them in order.

Part of one herd = one state directory, held by a lock. A part that fails takes the process down: a collector that
half works is worse than one that its supervisor restarts, and nothing acknowledged is lost by that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

import grpc
import grpc.aio
import uvicorn
from fastapi import APIRouter, Depends

from pgherd.alerts.load import load_rules
from pgherd.alerts.model import Group
from pgherd.collector.alerting.evaluation import Evaluator
from pgherd.collector.alerting.herd import HeartbeatSeries, herd_facts
from pgherd.collector.alerting.notifier import Notifier
from pgherd.collector.alerting.outbox import OutboxWorker
from pgherd.collector.alerting.query import promql_query
from pgherd.collector.alerting.recorded import RecordedSeries
from pgherd.collector.alerting.setup import alertmanagers_of, inhibitions_of, receivers_of, routing_of
from pgherd.collector.alerting.silencing import Silencer
from pgherd.collector.api.alerts import alerts_router, prometheus_alerts_router
from pgherd.collector.api.app import http_app
from pgherd.collector.api.auth import Authenticator, require
from pgherd.collector.api.control import control_router
from pgherd.collector.api.identity import identity_router
from pgherd.collector.api.prometheus import prometheus_router
from pgherd.collector.api.query_pool import QueryPool
from pgherd.collector.api.serving import EXCHANGE_TIMEOUT_S, REQUEST_TIMEOUT_S, OwnedServer, strangers_server
from pgherd.collector.api.silences import silences_router
from pgherd.collector.api.socketpeer import PeerCredentialProtocol
from pgherd.collector.config import CollectorConfig, IngestConfig
from pgherd.collector.control.dispatch import Dispatcher
from pgherd.collector.control.herd import Herd
from pgherd.collector.control.ledger import Ledger
from pgherd.collector.control.session import ControlService, SessionSettings
from pgherd.collector.control.views import Views
from pgherd.collector.exposition import collector_families
from pgherd.collector.forward.forwarder import Forwarder
from pgherd.collector.identity.ca import CertificateAuthority
from pgherd.collector.identity.enrol import enrolment_app
from pgherd.collector.identity.enrolment import Enrolment
from pgherd.collector.identity.gate import HTTP_SERVICES, OTLP_HTTP, PeerGate, PeerInterceptor
from pgherd.collector.identity.peer import Peer, current_peer
from pgherd.collector.identity.registry import StoredStandings
from pgherd.collector.identity.server import ServerCertificate
from pgherd.collector.ingest.admit import AdmitLimits, Said
from pgherd.collector.ingest.http import otlp_app, otlp_server
from pgherd.collector.ingest.quota import Quota
from pgherd.collector.ingest.service import MetricsService, ServiceSettings
from pgherd.collector.listeners import BoundedListener, ConnectionLimits, raise_descriptor_limit, tcp_listener, unix_listener
from pgherd.collector.listeners import Limits as ConnectionShares
from pgherd.collector.replication.series import LagSeries
from pgherd.collector.setup import Layout
from pgherd.promql.engine import Limits
from pgherd.promql.parse import parse
from pgherd.proto.clock import Clock
from pgherd.proto.control.v1 import control_pb2_grpc
from pgherd.proto.enrolment import join_address, split_address
from pgherd.proto.errors import PreconditionError
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.durable import exclusive_lock, private_directory
from pgherd.runtime.logging import get_logger
from pgherd.storage.control.store import ControlStore
from pgherd.storage.series.database import DatabaseSettings
from pgherd.storage.series.store import SeriesSettings, SeriesStore
from pgherd.storage.series.writer import WriterSettings

_log = get_logger(__name__)

# Hygiene: a connection is renewed now and then, so that nothing depends on one that lives for ever.
_CONNECTION_AGE_MAX_S = 1800
_HANDSHAKE_TIMEOUT_S = 20  # a connection without TLS is nobody's
_STOP_GRACE_S = 3.0


def load_groups(config: CollectorConfig) -> tuple[Group, ...]:
    """All alert rules, checked. Raises ConfigError rules.invalid | config.unreadable."""

    def check(expression: str) -> None:
        parse(expression)

    alerts = config.alerts
    return load_rules(alerts.rule_files, builtin=alerts.builtin_rules, interval_s=alerts.interval, check_expression=check)


def _quota(config: IngestConfig) -> Quota:
    return Quota(float(config.points_per_second), float(config.bytes_per_second), config.burst)


@dataclass(frozen=True, slots=True)
class _Stores:
    control: ControlStore
    series: SeriesStore
    forwarder: Forwarder


@contextlib.contextmanager
def _stores(config: CollectorConfig, clock: Clock) -> Iterator[_Stores]:
    """Both stores, open, under the state directory's lock. Raises what opening raises, ConfigError config.invalid."""
    layout = Layout(config.state_directory)
    private_directory(layout.root)  # whoever can write there can replace the CA
    with exclusive_lock(layout.lock, f"the collector's state directory {layout.root}"), contextlib.ExitStack() as stack:
        control = ControlStore.open(layout.control, create=False)
        stack.callback(control.close)
        settings = SeriesSettings(
            database=DatabaseSettings(memory_limit_bytes=config.series.memory_limit, threads=config.series.threads),
            writer=WriterSettings(
                series_max=config.series.series_max,
                series_per_owner_max=config.ingest.series_per_sender,
                retention_s=config.series.retention,
            ),
            select_samples_max=config.query.samples_max,
        )
        forwarder = Forwarder.open(layout.forward, config.forward, clock)
        stack.callback(forwarder.close)
        series = SeriesStore.open(layout.series, settings, clock, forwarder.tap if forwarder.is_used else None)
        stack.callback(series.close)
        yield _Stores(control, series, forwarder)


class Collector:
    """Everything that runs, built from a configuration. `serve` runs it until `stop` is set."""

    def __init__(
        self, config: CollectorConfig, ca: CertificateAuthority, stores: _Stores, groups: tuple[Group, ...], clock: Clock
    ) -> None:
        self._config = config
        self._ca = ca
        self._clock = clock
        self.stores = stores
        control, series = stores.control, stores.series
        self.herd = Herd(control, clock, heartbeat_interval_s=config.grpc.heartbeat_interval)
        self.dispatcher = Dispatcher(Ledger(control, clock), self.herd)
        self.gate = PeerGate(ca.certificate_pem, ca.trust_domain, StoredStandings(control), clock)
        self.control_service = ControlService(
            self.dispatcher,
            SessionSettings(collector_version=version("pgherd"), heartbeat_interval_s=config.grpc.heartbeat_interval),
            clock,
            current_peer,
        )
        limits = AdmitLimits(
            request_bytes_max=config.grpc.request_bytes_max,
            future_max_s=config.series.future_max,
            past_max_s=config.series.past_max,
        )
        self.ingest = MetricsService(
            series,
            current_peer=current_peer,
            owns=self._owns,
            clock=clock,
            settings=ServiceSettings(limits=limits, quota=_quota(config.ingest)),
        )
        self.enrolment = Enrolment(control, ca, clock, config.enrol.certificate_lifetime, config.enrol.renewal_grace)
        self.certificate = ServerCertificate(ca, Layout(config.state_directory).tls, config.enrol.names, clock)
        self.queries = QueryPool(clock, config.query.concurrency)
        self.outbox = OutboxWorker(control, receivers_of(config.alerts), clock)
        self.silencer = Silencer(control, clock)
        recorded = RecordedSeries(series, series.append)
        query = promql_query(
            recorded,
            clock,
            timeout_s=config.query.timeout,
            limits=Limits(
                lookback_ms=round(config.query.lookback * 1000),
                subquery_step_ms=round(config.query.subquery_step * 1000),
                samples_max=config.query.samples_max,
            ),
        )
        self.evaluator = Evaluator(
            groups=groups,
            store=control,
            query=query,
            facts=herd_facts(control, self.herd, query),
            clock=clock,
            recorded=recorded,
            external_url=config.alerts.external_url,
            committed=self._alerts_changed,
        )
        self.notifier = Notifier(
            status=self.evaluator.status,
            store=control,
            routing=routing_of(config.alerts),
            silencer=self.silencer,
            inhibitions=inhibitions_of(config.alerts),
            clock=clock,
            posted=self.outbox.wake,
        )
        self.alertmanagers = alertmanagers_of(config.alerts, self.evaluator.status, self.silencer, clock)
        self.heartbeats = HeartbeatSeries(control, self.herd, series, clock, interval_s=min(10.0, config.alerts.interval))
        self.lag = LagSeries(control, self.herd, series, clock)

    def _alerts_changed(self) -> None:
        self.notifier.wake()
        for push in self.alertmanagers:
            push.wake()

    def _owns(self, agent_id: str, said: Said) -> bool:
        """Whether a node is this agent's: what hello claimed, live or as stored."""
        return self.herd.owns(agent_id, said)

    def _routers(self) -> list[APIRouter]:
        config = self._config
        _, enrol_port = split_address(config.enrol.listen)
        prometheus = APIRouter(prefix="/prometheus", dependencies=[Depends(require("viewer"))], tags=["prometheus"])
        prometheus.include_router(
            prometheus_router(self.stores.series, self.queries, config.query, self._clock, version("pgherd"))
        )
        return [
            control_router(self.dispatcher, Views(self.stores.control, self.herd), require),
            identity_router(
                self.enrolment,
                self.gate,
                enrol_host=config.enrol.names[0],
                enrol_port=enrol_port,
                token_lifetime_s=config.enrol.token_lifetime,
            ),
            alerts_router(self.evaluator, self.silencer, self._clock, require),
            silences_router(self.silencer, require, self._alerts_changed),
            prometheus_alerts_router(self.evaluator, require),
            prometheus,
        ]

    def _ready(self) -> dict[str, bool]:
        return {"series store": self.stores.series.gauges().is_writable}

    def _http_server(self) -> OwnedServer:
        config = self._config.http
        authenticator = Authenticator(self.stores.control, self._clock, frozenset(config.socket_uids), config.anonymous_read)
        families = collector_families(
            self.stores.series,
            self.ingest,
            self.herd,
            self.gate,
            self.evaluator,
            self.outbox,
            self.notifier,
            self.alertmanagers,
            self.stores.forwarder,
        )
        app = http_app(
            authenticator,
            self._routers(),
            ready=self._ready,
            notes=self.stores.series.notes,
            families=families,
            shipments=self.stores.series.shipments,
        )

        class Protocol(PeerCredentialProtocol):
            exchange_timeout_s = max(EXCHANGE_TIMEOUT_S, self._config.query.timeout + REQUEST_TIMEOUT_S)

        return OwnedServer(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(_STOP_GRACE_S),
            )
        )

    def _otlp_server(self) -> OwnedServer:
        def admit(certificate_pem: bytes | None) -> Awaitable[Peer]:
            return self.gate.admit(certificate_pem, OTLP_HTTP, HTTP_SERVICES)

        app = otlp_app(self.ingest, admit, request_bytes_max=self._config.grpc.request_bytes_max)
        return otlp_server(app, self.certificate.ssl_context(mutual=True))

    def _otlp_listener(self, sockets: contextlib.ExitStack, share: ConnectionLimits) -> list[BoundedListener]:
        """No listener when the port is turned off."""
        if not self._config.otlp.listen:
            return []
        listener = tcp_listener(self._config.otlp.listen, "otlp.listen", share)
        return [sockets.enter_context(contextlib.closing(listener))]

    @contextlib.asynccontextmanager
    async def _grpc_server(self, connections_max: int) -> AsyncIterator[None]:
        server = grpc.aio.server(
            interceptors=[PeerInterceptor(self.gate)],
            options=[
                ("grpc.so_reuseport", 0),  # a second collector on the port must fail, not share it
                ("grpc.max_receive_message_length", self._config.grpc.request_bytes_max + 1024),
                ("grpc.max_connection_age_ms", _CONNECTION_AGE_MAX_S * 1000),
                ("grpc.max_connection_age_grace_ms", 30_000),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_TIMEOUT_S * 1000),
                ("grpc.max_allowed_incoming_connections", connections_max),
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),  # its session ended long before: only the connection is left
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.max_concurrent_streams", 64),  # of one connection: ours need two
            ],
        )
        control_pb2_grpc.add_ControlServicer_to_server(self.control_service, server)  # type: ignore[no-untyped-call]
        server.add_generic_rpc_handlers((self.ingest.handler(),))
        try:
            server.add_secure_port(self._config.grpc.listen, self.certificate.grpc_credentials())
        except RuntimeError as error:
            raise PreconditionError(
                "state.locked",
                f"grpc.listen: can't listen on {self._config.grpc.listen}",
                hint="see who listens there (ss -ltnp)",
            ) from error
        await server.start()
        try:
            yield
        finally:
            await server.stop(_STOP_GRACE_S)
            self.ingest.close()

    async def serve(self, stop: asyncio.Event, started: Callable[[], None] = lambda: None) -> None:
        """Run until `stop` is set, then end: no new work, the running finished, the stores closed by the caller."""
        config, shares = self._config, ConnectionShares.of(raise_descriptor_limit())
        _, grpc_port = split_address(config.grpc.listen)
        http = self._http_server()
        app = enrolment_app(self.enrolment, grpc_address=join_address(config.enrol.names[0], grpc_port), clock=self._clock)
        enrol = strangers_server(app, self.certificate.ssl_context())
        otlp = self._otlp_server()
        await asyncio.to_thread(self.evaluator.restore)
        await asyncio.to_thread(self.silencer.load)
        with contextlib.ExitStack() as sockets:
            http_listener = tcp_listener(config.http.listen, "http.listen", shares.http, loopback_only=True)
            tcp = sockets.enter_context(contextlib.closing(http_listener))
            local = sockets.enter_context(unix_listener(config.socket, shares.local))
            public = sockets.enter_context(contextlib.closing(tcp_listener(config.enrol.listen, "enrol.listen", shares.enrol)))
            foreign = self._otlp_listener(sockets, shares.otlp)
            async with self._grpc_server(shares.grpc), asyncio.TaskGroup() as tasks:
                loops = [
                    tasks.create_task(coroutine, name=name)
                    for name, coroutine in (
                        ("dispatcher", self.dispatcher.run()),
                        ("evaluator", self.evaluator.run()),
                        ("notifier", self.notifier.run()),
                        ("outbox", self.outbox.run()),
                        *((f"alertmanager {push.name}", push.run()) for push in self.alertmanagers),
                        ("heartbeats", self.heartbeats.run()),
                        ("replication lag", self.lag.run()),
                        ("certificate", self.certificate.keep_fresh()),
                        ("forward", self.stores.forwarder.run()),
                    )
                ]
                servers = [
                    tasks.create_task(http.serve(sockets=[tcp, local])),
                    tasks.create_task(enrol.serve(sockets=[public])),
                    *(tasks.create_task(otlp.serve(sockets=[listener])) for listener in foreign),
                ]
                started()
                await stop.wait()
                _log.info("collector.stopping")
                http.should_exit = enrol.should_exit = otlp.should_exit = True
                await asyncio.wait(servers, timeout=2 * _STOP_GRACE_S)
                for loop in loops:
                    loop.cancel()
        self.queries.close()


def run(config: CollectorConfig) -> int:
    """Serve a herd until SIGTERM or SIGINT. Raises what opening and binding raise."""
    clock = SystemClock()
    ca = CertificateAuthority.load(Layout(config.state_directory).ca)
    groups = load_groups(config)
    with _stores(config, clock) as stores:
        asyncio.run(_serve(Collector(config, ca, stores, groups, clock)))
    return 0


async def _serve(collector: Collector) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def started() -> None:
        _log.info("collector.started", pid=os.getpid(), version=version("pgherd"))

    await collector.serve(stop, started)
