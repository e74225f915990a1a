"""Proofs of the rules about who leads a cluster and who follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from support.link import Link
from support.postgres import Fleet, Pair
from support.proving import Node, Proving, proving
from support.waiting import wait_until

pytestmark = [pytest.mark.pg, pytest.mark.fault, pytest.mark.slow, pytest.mark.peers, pytest.mark.timeout(240)]

SHORTENED = {"RoleChanged": {"[5m]": "[10s]"}}


@dataclass
class Site:
    """`steady` is mended after each fault; the others are for one promotion each."""

    herd: Proving
    steady: Pair
    link: Link
    split: Pair
    promoted: Pair
    failed_over: Pair


@pytest.fixture(scope="module")
def site(postgres_fleet: Fleet) -> Iterator[Site]:
    pairs = {name: postgres_fleet.pair() for name in ("steady", "split", "promoted", "failed_over")}
    steady = pairs["steady"]
    with Link(steady.primary.port) as link, proving(SHORTENED) as herd:
        conninfo = f"host=127.0.0.1 port={link.port} user=postgres application_name=standby"
        steady.standby.set(primary_conninfo=conninfo)
        nodes = [
            Node(f"{name}-{role}", name, server)
            for name, pair in pairs.items()
            for role, server in (("primary", pair.primary), ("standby", pair.standby))
        ]
        herd.agent("watcher", nodes)
        wait_until(lambda: len(herd.query("pgherd_replication_broken == 0")) == 4, 40, "four standbys known to stream", 0.2)
        yield Site(herd, link=link, **pairs)
    for pair in pairs.values():
        pair.standby.stop()
        pair.primary.stop()


def test_no_primary(site: Site) -> None:
    """The primary is killed, and nobody promotes the standby; then it is started again."""
    labels = {"cluster": "steady", "severity": "critical"}
    site.steady.primary.kill()
    site.herd.fires("NoPrimary", **labels)
    site.steady.primary.start()
    site.herd.resolves("NoPrimary", **labels)


def test_no_primary_after_a_failover(site: Site) -> None:
    """The primary is killed for good and the standby promoted: over, without anybody taking the dead node out."""
    labels = {"cluster": "failed_over", "severity": "critical"}
    site.failed_over.primary.kill()
    site.herd.fires("NoPrimary", **labels)
    site.failed_over.standby.promote()
    site.herd.resolves("NoPrimary", **labels)
    assert "failed_over-primary" not in site.herd.up()


def test_multiple_primaries(site: Site) -> None:
    """A standby is promoted beside a primary that lives; the old one is stopped (nobody can tell then) and comes back as a standby."""
    labels = {"cluster": "split", "severity": "critical"}
    site.split.standby.promote()
    row = site.herd.fires("MultiplePrimaries", **labels)
    assert row["value"] == 2
    site.split.primary.stop()
    wait_until(lambda: site.herd.state("MultiplePrimaries", **labels) == "unknown", 60, "a doubt", 0.2)
    (site.split.primary.data_directory / "standby.signal").touch()
    site.split.primary.start()
    site.herd.resolves("MultiplePrimaries", **labels)


def test_role_changed(site: Site) -> None:
    """The primary is stopped and the standby promoted: an event, over after its window."""
    labels = {"node": "promoted-standby", "cluster": "promoted", "severity": "warning"}
    site.promoted.primary.stop()
    site.promoted.standby.promote()
    site.herd.fires("RoleChanged", **labels)
    site.herd.resolves("RoleChanged", **labels)


def test_replication_broken(site: Site) -> None:
    """The link is cut while the primary is idle: no lag would show it."""
    labels = {"node": "steady-standby", "severity": "critical"}
    site.link.cut()
    site.herd.fires("ReplicationBroken", **labels)
    site.link.mend()
    site.herd.resolves("ReplicationBroken", **labels)


def test_sync_standby_missing(site: Site) -> None:
    """The only synchronous standby is stopped: commits would hang."""
    labels = {"node": "steady-primary", "severity": "critical"}
    site.steady.primary.set(synchronous_standby_names="standby")
    site.steady.standby.stop()
    site.herd.fires("SyncStandbyMissing", **labels)
    site.steady.standby.start()
    site.herd.resolves("SyncStandbyMissing", **labels)
    site.steady.primary.set(synchronous_standby_names="")
