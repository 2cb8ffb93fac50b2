"""Serves the page until it is interrupted. Gradio is told to ask nobody for anything."""

import errno
import importlib.util
import os
import socket
from pathlib import Path

from conf.errors import UserError
from conf.schema import PlaygroundRun
from models.pipeline import DiffusionPipeline
from train.board.playground.studio import Studio
from train.engine.journal import say
from train.engine.runtime import Runtime
from train.evaluation.exported import is_exported, load_exported
from train.evaluation.sampling import load_model


def run(cfg: PlaygroundRun, runtime: Runtime) -> None:
    """Load the networks, listen, and serve whoever comes.

    Raises:
        UserError: gradio is missing, the port is taken, or networks that the page cannot draw with.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the playground needs the package gradio: pip install 'latentline[playground]'")
    with listen(cfg) as listening:
        studio = Studio(load(cfg, runtime), runtime.precision, cfg.film_frames)
        server = served(cfg, studio)
        host, port = listening.getsockname()[:2]
        say("playground", f"http://{host}:{port} has the page; Ctrl+C ends it")
        server.run(sockets=[listening])


def load(cfg: PlaygroundRun, runtime: Runtime) -> DiffusionPipeline:
    """The networks of a run, or of a folder in diffusers' format."""
    if is_exported(cfg.run_dir):
        return load_exported(cfg.run_dir, runtime.device, cfg.tile)
    return load_model(cfg, runtime.device)


def listen(cfg: PlaygroundRun) -> socket.socket:
    """A socket of this address and port."""
    try:
        return socket.create_server((cfg.host, cfg.port))
    except socket.gaierror:
        raise UserError(f"host={cfg.host}: no address of this machine; 127.0.0.1 is its own") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port={cfg.port}: another program listens there; set another one, or port=0") from None
        raise UserError(f"host={cfg.host}, port={cfg.port}: cannot listen there ({error.strerror})") from None


def served(cfg: PlaygroundRun, studio: Studio):  # type: ignore[no-untyped-def]  # -> uvicorn.Server
    """A server of the page; without gradio's analytics, links to share it, and record of what visitors did."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    import gradio
    import uvicorn
    from fastapi import FastAPI

    from train.board.playground.page import THEME, build

    app = gradio.mount_gradio_app(
        FastAPI(),
        build(cfg, studio),
        path="",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=THEME,
        css_paths=Path(__file__).parent / "html" / "page.css",
    )
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
