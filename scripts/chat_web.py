"""Serve a trained model: a chat page for the browser, and an API.

python -m scripts.chat_web               http://127.0.0.1:8000
python -m scripts.chat_web --port=9000
"""

from nanochat.common import run_cli
from nanochat.server import ChatWebConfig, serve

if __name__ == "__main__":
    run_cli(serve, ChatWebConfig, "chat_web")
