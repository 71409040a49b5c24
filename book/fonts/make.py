"""Cut the fonts for scripts that Typst's own fonts lack down to what the book prints.

    apt-get install fonts-noto-cjk fonts-noto-color-emoji fonts-noto-core
    python book/fonts/make.py

Run it again when tests/test_house.py says that a character has no glyph. Noto is under the
SIL Open Font License (OFL.txt beside this file).
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "dev"))
from check import characters_of_the_book

PYFTSUBSET = str(Path(sys.executable).parent / "pyftsubset")
NOTO = Path("/usr/share/fonts")
SOURCES = {  # output: (Debian's file, number of the face in it)
    "cjk.otf": ("opentype/noto/NotoSansCJK-Regular.ttc", "2"),
    "emoji.ttf": ("truetype/noto/NotoColorEmoji.ttf", "0"),
    "devanagari.ttf": ("truetype/noto/NotoSansDevanagari-Regular.ttf", "0"),
    "arabic.ttf": ("truetype/noto/NotoNaskhArabic-Regular.ttf", "0"),
}
# A margin, so that a new example does not need a new font each time.
MORE = "你好世界大语言模型中文字我是学生日本東京こんにちは世界안녕하세요 नमस्ते مرحبا 👋🌍🚀✅❌🎉🙂😀🤖🔥🇫🇷👩‍🚀👨‍👩‍👧‍👦❤️👍🏽"

if __name__ == "__main__":
    text = "".join(sorted(characters_of_the_book() | set(MORE)))
    for name, (file, face) in SOURCES.items():
        subprocess.run(
            [
                *(PYFTSUBSET, str(NOTO / file), f"--font-number={face}"),
                *(f"--text={text}", "--ignore-missing-unicodes", "--no-hinting"),
                f"--output-file={HERE / name}",
            ],
            check=True,
        )
        print(name, (HERE / name).stat().st_size, "bytes")
