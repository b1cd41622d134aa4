# Sourced by quickstart.sh and test.sh: makes .venv beside them and installs the project with the extras given.
# Needs nothing but Python 3.11 or later. Run again after a change of pyproject.toml, it installs again.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "mlx-sf: error: needs Python 3.11 or later; install one, or set PYTHON=/path/to/python3" >&2
    return 1
}

make_env() { # make_env EXTRA,EXTRA...
    local python extras=$1 stamp
    [ "$(uname -s)" = Linux ] && extras="cpu${extras:+,$extras}"
    python=$(find_python)
    stamp="$extras $(cksum <pyproject.toml)"
    if [ ! -x .venv/bin/mlx-sf ] || [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]; then
        echo "== environment: .venv ($("$python" --version), extras: ${extras:-none})"
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
        echo "$stamp" >.venv/stamp
    fi
}
