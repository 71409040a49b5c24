#!/usr/bin/env bash
# Set up .venv; a second run has nothing to do and needs no network.
#
#   bash dev/setup.sh run    everything the pipeline needs (speedrun.sh calls this)
#   bash dev/setup.sh dev    the same, plus tests, linters, JupyterLab and the book (make calls this)
#
# Exit code 2 means that a system package is missing; the last lines say what to type.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

level=${1:-dev}
venv=$PWD/.venv
python=$venv/bin/python
rust_needed=1.83 # the oldest compiler that PyO3 accepts

say() { printf '\033[1m[setup]\033[0m %s\n' "$*" >&2; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# ---- 1. Is there anything to do? The stamp is a hash of everything the installation used.
key() {
    cat pyproject.toml requirements/*.txt dev/setup.sh rustbpe/Cargo.* \
        $(find rustbpe/src -name '*.rs' | LC_ALL=C sort) | cksum
}
imports() { # checks that the modules exist: a stamp may outlive what it stands for
    local modules='"torch", "tyro", "rustbpe", "nanochat"'
    [ "$level" = run ] || modules="$modules, \"nbdev\", \"pytest\", \"myst_nb\", \"jupyterlab\""
    printf 'from importlib.util import find_spec as f\nassert all(map(f, [%s]))' "$modules"
}
fresh() {
    local stamp=$venv/.stamp-$1
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(key)" ]
}
# The book needs Python 3.11; the package does not, so on 3.10 the extra installs nothing.
if { fresh "$level" || fresh dev; } && "$python" -c "$(imports)" 2>/dev/null; then
    exit 0
fi
case $level in
    run) extras="[data]" ;;
    dev) extras="[dev,book,lab,data]" ;;
    *) fail "unknown level '$level': dev/setup.sh takes 'run' or 'dev'" ;;
esac
began=$SECONDS

# ---- 2. System packages: install them if root, otherwise say how.
need() { # need WHAT PACKAGE... : what is missing, then the Debian packages
    local what=$1
    shift
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        say "installing $* ($what is missing)"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -qq --no-install-recommends "$@"; } >/dev/null \
            || fail "$what is missing and 'apt-get install $*' failed"
    elif command -v apt-get >/dev/null; then
        fail "$what is missing. Run:  sudo apt-get install -y $*"
    else
        fail "$what is missing: install it (on Debian the packages are: $*)"
    fi
}

usable() { # whether an interpreter runs (shims may not) and is Python 3.10 to 3.13
    "$1" -c 'import sys; assert (3, 10) <= sys.version_info[:2] <= (3, 13)' 2>/dev/null
}
find_python() {
    local name
    for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python3.10; do
        if usable "$name"; then
            command -v "$name"
            return
        fi
    done
    return 1
}

if ! "$python" -c "" 2>/dev/null; then
    base=$(find_python) || { need "Python 3.10 to 3.13" python3 python3-venv; base=$(find_python); } \
        || fail "no Python 3.10 to 3.13 found: set PYTHON=/path/to/python3.12"
    version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$base" -c "import ensurepip, venv" 2>/dev/null \
        || need "the venv module of Python $version" "python$version-venv"
    say "creating .venv with Python $version"
    "$base" -m venv --clear "$venv"
fi
command -v cc >/dev/null || need "a C compiler" gcc libc6-dev

# bubblewrap sandboxes the generated programs of HumanEval. All else works without it.
if [ "$(uname)" = Linux ] && ! command -v bwrap >/dev/null; then
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        say "installing bubblewrap"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -qq --no-install-recommends bubblewrap; } >/dev/null \
            || say "HumanEval will be skipped, because bubblewrap is missing"
    else
        say "HumanEval will be skipped without bubblewrap: sudo apt-get install -y bubblewrap"
    fi
fi

# ---- 3. uv, inside the virtual environment.
if ! "$python" -m uv --version >/dev/null 2>&1; then
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
    pin=$(grep -h '^uv==' requirements/*.txt | cut -d' ' -f1)
    say "installing ${pin:-uv}"
    "$python" -m pip install -q --disable-pip-version-check "${pin:-uv}"
fi

# ---- 4. Rust: from the path, from rustup, or from Debian.
recent() { # recent CARGO : whether it is at least $rust_needed
    local have
    have=$("$1" --version 2>/dev/null | cut -d' ' -f2) || return 1
    [ "$(printf '%s\n%s\n' "$rust_needed" "$have" | sort -V | head -n1)" = "$rust_needed" ]
}
candidate() { # candidate PACKAGE : whether Debian's newest version is recent enough
    local v
    v=$(apt-cache policy "$1" 2>/dev/null | sed -n 's/ *Candidate: *//p')
    [ -n "$v" ] && [ "$v" != "(none)" ] && dpkg --compare-versions "$v" ge "$rust_needed"
}
export PATH="$PATH:$HOME/.cargo/bin"
if ! recent cargo; then
    packages=""
    if command -v apt-get >/dev/null; then
        [ "$(id -u)" != 0 ] || apt-get update -qq >/dev/null 2>&1 || true
        # Debian keeps an old `cargo` and a newer `cargo-web`, which it needs for browsers;
        # their version numbers follow different schemes, so compare rustc's.
        for suffix in "" -web; do
            if candidate "rustc$suffix"; then
                packages="rustc$suffix cargo$suffix"
                break
            fi
        done
    fi
    # shellcheck disable=SC2086 # two words on purpose
    if [ -n "$packages" ]; then
        need "Rust $rust_needed or newer" $packages
        hash -r
    fi
    recent cargo || fail "Rust $rust_needed or newer is missing. Run:
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y
and then this command again."
fi

# ---- 5. The package, its crate, and pinned versions of everything else.
size=""
compgen -G "$venv/lib/python3*/site-packages/torch" >/dev/null \
    || size=" (some 3 GB, most of it PyTorch)"
say "installing nanochat$extras$size"
install() {
    "$python" -m uv pip install --python "$python" -q "$@" \
        --constraint requirements/constraints.txt --constraint requirements/torch.txt \
        -e ".$extras"
}
# Without a network, the second attempt uses what was downloaded before.
install || { say "trying again without the network" && install --offline; }
if [ "$level" = dev ]; then
    cargo fetch -q --locked --manifest-path rustbpe/Cargo.toml
    # The names of nbdev's commands before version 3, which many people still type.
    for tool in export test clean; do
        ln -sf "nbdev-$tool" "$venv/bin/nbdev_$tool"
    done
fi

# ---- 6. Write the stamp.
key >"$venv/.stamp-$level"
say "ready in $((SECONDS - began)) s"
