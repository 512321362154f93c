"""The verb that serves models over HTTP."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from kdlora.cli.app import Json, print_json, verb
from kdlora.deploy import Runtime

if TYPE_CHECKING:
    from kdlora.deploy.serving import Model


@dataclass(frozen=True)
class Serve:
    """What `kdlora serve` is told; the fields after `runtime` but the last are those of `Limits`."""

    models: Annotated[list[str], Argument(help="Model folders, experiments or Hub ids. NAME=FOLDER names one.")]
    host: Annotated[str, Option(help="Address to listen at. 0.0.0.0: all of this machine's.")] = "127.0.0.1"
    port: Annotated[int, Option(help="Port. 0: any free one.", min=0, max=65535)] = 8000
    threads: Annotated[int | None, Option(help="CPU threads of each model. Default: one per core.")] = None
    runtime: Annotated[Runtime, Option(help="auto: the fastest when kdlora benchmark measured it here.")] = (
        "onnxruntime"
    )
    waiting: Annotated[int, Option(help="Texts that may wait for a model. Beyond, the answer is 503.")] = 1024
    texts: Annotated[int, Option(help="Largest number of texts in one request.")] = 256
    characters: Annotated[int, Option(help="Largest number of characters in one text.")] = 20_000
    body_bytes: Annotated[int, Option(help="Largest request, in bytes.")] = 1_000_000
    as_json: Json = False


@verb(Serve)
def serve(options: Serve) -> None:
    """Serve models over HTTP: /predict, /health and /metrics. SIGTERM ends it when what has begun is answered.

    Example: kdlora serve runs/reviews --port 8000

    Example: kdlora serve film=runs/reviews topic=runs/topics --host 0.0.0.0
    """
    from kdlora.deploy.serving import Limits, describe
    from kdlora.deploy.serving import serve as serve_models

    def ready(address: str, models: Mapping[str, Model]) -> None:
        if options.as_json:
            print_json({"address": address, "models": {name: describe(one) for name, one in models.items()}})
        else:
            print("\n".join(f"{name}: {model!r}" for name, model in models.items()))
            print(f"listening at {address}")
        sys.stdout.flush()

    limits = Limits(**{name: getattr(options, name) for name in Limits.__dataclass_fields__})
    serve_models(
        options.models,
        host=options.host,
        port=options.port,
        threads=options.threads,
        runtime=options.runtime,
        limits=limits,
        ready=ready,
    )
