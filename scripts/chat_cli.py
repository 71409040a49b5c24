"""Talk to a trained model in the terminal.

python -m scripts.chat_cli                       a conversation; /clear starts over, /quit ends it
python -m scripts.chat_cli -p "What is a noun?"  one reply
"""

from nanochat.chat_cli import ChatCliConfig, chat
from nanochat.common import run_cli

if __name__ == "__main__":
    run_cli(chat, ChatCliConfig, "chat_cli")
