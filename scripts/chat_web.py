"""Talk to a trained model in the browser.

python -m scripts.chat_web               http://127.0.0.1:8000
python -m scripts.chat_web --port=9000
"""

import asyncio
import socket
from dataclasses import dataclass
from typing import Annotated

import tyro
import uvicorn

from nanochat.common import UserError, run_cli
from nanochat.server import Service, create_app, load_chat_model


@dataclass(frozen=True)
class ChatWebConfig:
    port: Annotated[int, tyro.conf.arg(aliases=["-p"])] = 8000
    """TCP port; 0: any free one."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything else than 127.0.0.1 opens the model to the network: there is no password."""
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = ""
    """The stage to talk to: base, mid, sft or rl; empty: the best that exists."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.6
    """Where the page's slider starts; 0: always the most probable token."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50
    """Choose among this many tokens; 0: among all."""
    max_tokens: int = 512
    """Longest reply, in tokens."""
    tag: str = ""
    """Model, such as d20; empty: the deepest."""
    step: int = -1
    """Checkpoint; -1: the last."""
    device: str = ""
    """cuda, mps or cpu; empty: the fastest present."""
    compile: bool = False
    """Compile the decode step: the first reply has to wait for it. Meant for GPUs."""


def listen(host: str, port: int) -> socket.socket:
    "Take the port before the model is loaded, or say that it is taken."
    server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on {host}:{port} ({reason}): choose another --port"
        ) from None
    return server


def main(config: ChatWebConfig) -> None:
    server = listen(config.host, config.port)
    where = config.source, config.device, config.tag, config.step
    engine, name = load_chat_model(*where, compiled=config.compile)
    options = (config.temperature, config.top_k, config.max_tokens)
    local = config.host in ("127.0.0.1", "localhost")
    app = create_app(
        Service(engine, name, *options), ("127.0.0.1", "localhost") if local else ("*",)
    )
    print(f"{name}, {engine.model.num_params():,} parameters")
    print(f"open http://{config.host}:{server.getsockname()[1]}  (Ctrl-C stops it)")
    web = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    asyncio.run(web.serve(sockets=[server]))


if __name__ == "__main__":
    run_cli(main, ChatWebConfig, "chat_web")
