"""`remask serve`: an OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from remask.cli.options import with_flags
from remask.cli.progress import log_to_stderr
from remask.scheduler.errors import InvalidRequest
from remask.server.options import ENGINE_DEFAULTS, ServerOptions, with_key


@with_flags(
    defaults=ENGINE_DEFAULTS,
    engine_except=["model"],
    sampling_except=["seed", "trace", "n", "logprobs"],
    server=ServerOptions,
)
def serve(
    model: Annotated[str, typer.Argument(help="Checkpoint directory, or 'tiny'.")] = "tiny",
    *,
    engine: dict[str, Any],
    sampling: dict[str, Any],
    server: dict[str, Any],
) -> None:
    """Serve a model with OpenAI's protocol, and a page on which a canvas fills.

    Sampling flags are the defaults of requests that do not set them. If no key is set, every client that
    reaches the port may use the model.
    """
    log_to_stderr()
    options = ServerOptions(**with_key(server))
    options.check()

    from remask.options import EngineOptions

    parsed = EngineOptions.parse(model=model, **engine)
    try:
        from remask.server.run import serve as run
    except ImportError as error:
        raise InvalidRequest("serve", error.name, "is not installed; pip install 'remask[server]'") from None
    run(
        parsed,
        options,
        sampling,
        lambda address: typer.echo(f"remask: serves {model} at {address}", err=True),
    )
