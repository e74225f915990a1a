"""opentelemetry-sdk with its own exporter and nothing of ours, told where to send by its environment alone.

foreign_exporter.py grpc|http: records the same things twice, exporting after each time; prints what export said.
"""

from __future__ import annotations

import sys

from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, PeriodicExportingMetricReader


def exporter(protocol: str) -> MetricExporter:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as Grpc

        return Grpc()
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as Http

    return Http()


def temperature(_options: CallbackOptions) -> list[Observation]:
    return [Observation(21.5, {"room": "server"})]


def main() -> None:
    provider = MeterProvider([PeriodicExportingMetricReader(exporter(sys.argv[1]), export_interval_millis=3_600_000)])
    meter = provider.get_meter("shop")
    orders = meter.create_counter("orders", unit="{order}")
    queue = meter.create_up_down_counter("queue.length")
    latency = meter.create_histogram("checkout.latency", unit="s", explicit_bucket_boundaries_advisory=[0.1, 1.0])
    meter.create_observable_gauge("temperature", callbacks=[temperature], unit="Cel")
    for _ in range(2):
        orders.add(3, {"shop.id": "a"})
        queue.add(2)
        for seconds in (0.05, 0.5, 2.0):
            latency.record(seconds)
        print(provider.force_flush(20_000))
    provider.shutdown()


if __name__ == "__main__":
    main()
