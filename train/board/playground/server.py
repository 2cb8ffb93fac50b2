"""Serves the page until it is interrupted. Gradio is told to ask nobody for anything."""

import errno
import importlib.util
import os
import socket
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from conf.errors import UserError
from conf.schema import PlaygroundRun
from models.pipeline import DiffusionPipeline
from train.board.playground.studio import Studio
from train.engine.metric_log import say
from train.engine.runtime import Runtime
from train.sampling.load import is_exported, load_exported, load_model
from train.sampling.requests import say_cut

if TYPE_CHECKING:  # it comes with gradio
    import uvicorn

CLOSING_S = 2  # seconds that open pages get at the end


def serve(cfg: PlaygroundRun, runtime: Runtime) -> None:
    """Load the networks, listen, and serve whoever comes.

    Raises:
        UserError: gradio is missing, the port is taken, or networks that the page cannot draw with.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the playground needs the package gradio: pip install 'latentline[playground]'")
    with listen(cfg) as listening:
        studio = Studio(partial(load_networks, cfg, runtime), runtime.precision, cfg.film_frames)
        say_cut("playground", studio.model, [], cfg)  # of a visitor's long prompt the page says so
        server = server_of(cfg, studio)
        host, port = listening.getsockname()[:2]
        say("playground", f"http://{host}:{port} has the page; Ctrl+C ends it")
        with suppress(KeyboardInterrupt):  # which it raises again when all is closed
            server.run(sockets=[listening])


def server_of(cfg: PlaygroundRun, studio: Studio) -> "uvicorn.Server":
    """A server of the page."""
    import uvicorn

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    from train.board.playground.page import application

    app = application(cfg, studio)
    return uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none", timeout_graceful_shutdown=CLOSING_S))


def load_networks(cfg: PlaygroundRun, runtime: Runtime) -> DiffusionPipeline:
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
