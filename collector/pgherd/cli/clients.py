"""`pgherd clients`: certificates for foreign OTLP clients. The private key is made here and stays here."""

from __future__ import annotations

from pathlib import Path

import click

from pgherd.cli.main import CliContext
from pgherd.cli.revocation import end_identity
from pgherd.cli.verb import duration_s, moment, show, verb
from pgherd.proto.errors import ConfigError
from pgherd.runtime.durable import publish
from pgherd.runtime.render import emit_json


@click.group()
def clients() -> None:
    """Certificates for foreign OTLP clients."""


@clients.command("ls")
@verb
def list_clients(context: CliContext) -> None:
    """List the clients that certificates were issued for."""
    rows = context.client.get("/api/v1/clients")["items"]
    for row in rows:
        row["issued"], row["valid_until"] = moment(row["issued_unix_ns"]), moment(row["not_after_unix_ns"])
    columns = [("name", "CLIENT"), ("id", "ID"), ("status", "STATUS"), ("issued", "ISSUED"), ("valid_until", "VALID UNTIL")]
    show(context, rows, columns)


@clients.command()
@click.argument("client")
@click.option("--reason", default="", help="Kept in the audit.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@verb
def revoke(context: CliContext, client: str, reason: str, yes: bool) -> None:
    """End CLIENT's identity (name or id) for good and cut its connections."""
    end_identity(context, "client", context.client.get("/api/v1/clients")["items"], client, reason=reason, yes=yes)


@clients.command()
@click.argument("name")
@click.option(
    "--directory", type=click.Path(path_type=Path), default=Path(), help="Where client.key, client.crt and ca.crt go."
)
@click.option("--lifetime", default="30d", show_default=True)
@verb
def issue(context: CliContext, name: str, directory: Path, lifetime: str) -> None:
    """Make a key and have the herd's CA sign a certificate for the OTLP client NAME."""
    from pgherd.runtime.keys import new_key

    lifetime_s = duration_s("--lifetime", lifetime)
    files = {kind: directory / kind for kind in ("client.key", "client.crt", "ca.crt")}
    taken = next((path for path in files.values() if path.exists()), None)
    if taken:
        raise ConfigError("usage.invalid", f"{taken} exists", hint="choose another --directory")
    key = new_key()
    body = {"name": name, "csr": key.request_pem, "lifetime_s": lifetime_s}
    answer = context.client.post("/api/v1/clients", body)
    directory.mkdir(parents=True, exist_ok=True)
    publish(files["client.key"], key.key_pem)
    publish(files["client.crt"], answer["certificate"].encode("ascii"), mode=0o644)
    publish(files["ca.crt"], answer["ca"].encode("ascii"), mode=0o644)
    if context.json:
        emit_json({key: answer[key] for key in ("client_id", "serial", "not_after_unix_ns")} | {"directory": str(directory)})
    else:
        click.echo(f"issued to {name} ({answer['client_id']})")
        click.echo(
            f"client.key, client.crt and ca.crt are in {directory.absolute()}; valid until {moment(answer['not_after_unix_ns'])}"
        )
