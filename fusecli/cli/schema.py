"""`fusecli schema`."""

from __future__ import annotations

import json

import typer


def schema() -> None:
    """Print the JSON schema of a spec, for editors that check YAML while you type."""
    from fusecli.spec.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
