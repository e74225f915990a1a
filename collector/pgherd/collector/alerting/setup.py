"""From configuration to receivers, routes and inhibition."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pgherd.alerts.matchers import parse_matchers
from pgherd.alerts.notify import LogReceiver, Receiver
from pgherd.alerts.notify_apprise import AppriseReceiver
from pgherd.alerts.notify_http import discord_receiver, slack_receiver, webhook_receiver
from pgherd.alerts.notify_mail import MailReceiver, MailSettings
from pgherd.alerts.routing import Inhibition, Route, Routing, Timing
from pgherd.collector.alerting.alertmanager import AlertmanagerPush
from pgherd.collector.alerting.group import GroupStatus
from pgherd.collector.alerting.silencing import Silencer, full_match
from pgherd.collector.config import AlertsConfig, ReceiverConfig, RouteConfig
from pgherd.proto.clock import Clock
from pgherd.proto.errors import ConfigError
from pgherd.proto.selectors import Matcher
from pgherd.runtime.durable import read_secret


def receivers_of(config: AlertsConfig) -> list[Receiver]:
    """Every receiver with a line in the outbox, ready. Raises ConfigError config.invalid | config.secret_unreadable."""
    names = [receiver.name for receiver in config.receivers]
    for name in names:
        if names.count(name) > 1:
            raise _invalid("alerts.receivers", f"two receivers are called {name}")
    return [_receiver(receiver, config.external_url) for receiver in config.receivers if receiver.kind != "alertmanager"]


def alertmanagers_of(
    config: AlertsConfig, status: Callable[[], Sequence[GroupStatus]], silencer: Silencer, clock: Clock
) -> list[AlertmanagerPush]:
    """The receivers that are pushed the state itself. Raises as `receivers_of`."""
    return [
        AlertmanagerPush(
            receiver.name,
            _http_url(receiver),
            status=status,
            silencer=silencer,
            clock=clock,
            timeout_s=receiver.timeout,
            external_url=config.external_url,
        )
        for receiver in config.receivers
        if receiver.kind == "alertmanager"
    ]


def routing_of(config: AlertsConfig) -> Routing:
    """Routes and defaults. Raises ConfigError config.invalid for a receiver or matcher that isn't one."""
    names = [receiver.name for receiver in config.receivers if receiver.kind != "alertmanager"]
    for name in (*config.default_receivers, *(route.receiver for route in config.routes)):
        if name not in names:
            raise _invalid("alerts.routes", f"there is no receiver {name!r} to route to; there are {', '.join(names)}")
    return Routing(
        tuple(_route(route, config) for route in config.routes),
        tuple(_route(RouteConfig(name), config) for name in config.default_receivers or names),
    )


def inhibitions_of(config: AlertsConfig) -> tuple[Inhibition, ...]:
    """Raises ConfigError config.invalid."""
    found = []
    for rule in config.inhibit:
        source, target = _matchers(rule.source, "alerts.inhibit"), _matchers(rule.target, "alerts.inhibit")
        if not source or not target:
            raise _invalid("alerts.inhibit", "source and target need a matcher each")
        found.append(Inhibition(source, target, rule.equal))
    return tuple(found)


def _route(route: RouteConfig, config: AlertsConfig) -> Route:
    def ns(own: float | None, general: float) -> int:
        return int((general if own is None else own) * 1e9)

    return Route(
        receiver=route.receiver,
        matchers=_matchers(route.matchers, "alerts.routes"),
        group_by=config.group_by if route.group_by is None else route.group_by,
        timing=Timing(
            ns(route.group_wait, config.group_wait),
            ns(route.group_interval, config.group_interval),
            ns(route.repeat_interval, config.repeat_interval),
        ),
        continue_matching=route.continue_matching,
    )


def _matchers(texts: Sequence[str], key: str) -> tuple[Matcher, ...]:
    try:
        return parse_matchers(texts, full_match)
    except ConfigError as error:
        raise _invalid(key, error.message) from error


_HTTP_RECEIVERS = {"webhook": webhook_receiver, "slack": slack_receiver, "discord": discord_receiver}


def _receiver(config: ReceiverConfig, external_url: str) -> Receiver:
    if config.kind == "log":
        return LogReceiver(config.name)
    if config.kind == "smtp":
        return MailReceiver(config.name, _mail(config), timeout_s=config.timeout, external_url=external_url)
    if config.kind == "apprise":
        return AppriseReceiver(config.name, _url(config), timeout_s=config.timeout, external_url=external_url)
    make = _HTTP_RECEIVERS[config.kind]
    return make(config.name, _http_url(config), timeout_s=config.timeout, external_url=external_url)


def _url(config: ReceiverConfig) -> str:
    url = read_secret(config.url_file) if config.url_file else config.url
    if not url:
        raise _invalid("alerts.receivers", f"receiver {config.name} needs url or url_file")
    return url


def _http_url(config: ReceiverConfig) -> str:
    url = _url(config)
    if not url.startswith(("http://", "https://")):
        raise _invalid("alerts.receivers", f"receiver {config.name} needs url or url_file with an http address")
    return url


def _mail(config: ReceiverConfig) -> MailSettings:
    mail = config.mail
    if not mail.host or not mail.sender or not mail.recipients:
        raise _invalid("alerts.receivers", f"receiver {config.name} needs mail.host, mail.sender and mail.recipients")
    password = read_secret(mail.password_file) if mail.password_file else ""
    if password and mail.security == "none":
        raise _invalid("alerts.receivers", f"receiver {config.name} would send its password in the clear")
    return MailSettings(
        host=mail.host,
        port=mail.port,
        sender=mail.sender,
        recipients=mail.recipients,
        security=mail.security,
        user=mail.user,
        password=password,
        ca_file=str(mail.ca_file) if mail.ca_file else None,
    )


def _invalid(key: str, problem: str) -> ConfigError:
    return ConfigError("config.invalid", problem, key=key)
