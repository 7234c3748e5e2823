"""Serving a page of Gradio from this computer: no request goes anywhere else."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from concat_ensemble.errors import argument, describe_error

CLOSING_SECONDS = 1  # a browser that shows the page keeps a connection open


def require_gradio() -> None:
    """Import Gradio with its analytics and its tunnel switched off. Raises ValueError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the page needs more ({error}); pip install 'concat-ensemble[app]'.") from error


def serve_page(page: Any, host: str, port: int, on_start: Callable[[str], None]) -> None:
    """Serve a `gradio.Blocks` until SIGINT or SIGTERM, which take effect when all connections are closed.

    Args:
        host, port: Where to listen; 0 for any free port.
        on_start: Called with the address once the page is there.

    Raises:
        ValueError: for an address that cannot be used, such as a port that something else listens on.
    """
    import uvicorn
    from fastapi import FastAPI
    from gradio import mount_gradio_app

    from concat_ensemble.reporting.image_page import page_settings

    listening = _listen(host, port)
    name, number = listening.getsockname()[:2]
    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    mount_gradio_app(application, page, "/", server_name=host, server_port=number, **page_settings())
    page.has_launched = True  # else Gradio lets any program name a file of this computer as if it had uploaded it
    settings = uvicorn.Config(
        application, log_level="error", access_log=False, timeout_graceful_shutdown=CLOSING_SECONDS, ws="none"
    )
    address = f"http://[{name}]:{number}" if ":" in name else f"http://{name}:{number}"
    with listening:
        application.router.on_startup.append(lambda: on_start(address))
        uvicorn.Server(settings).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        problem = f"{argument('host', host)} and {argument('port', port)} cannot be used ({describe_error(error)})"
        raise ValueError(f"{problem}; name another {argument('port')}, or 0 for any that is free.") from error
