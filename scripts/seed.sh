# Shared by the seed's entry points: the command, and paths that come from a variable or a flag.

# need FLAG VARIABLE MEANING ARGS...: fails with a sentence where a path is neither set nor given as a flag.
need() {
    local flag=$1 variable=$2 meaning=$3
    shift 3
    [[ -n "${!variable:-}" || " $* " == *" --$flag"[\ =]* || " $* " == *" --${flag//_/-}"[\ =]* ]] && return
    echo "$(basename "$0"): set $variable or give --$flag: $meaning." >&2
    exit 2
}

run() {
    local here
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    if [[ -x "$here/.venv/bin/dfl-lora" ]]; then exec "$here/.venv/bin/dfl-lora" "$@"; fi
    exec dfl-lora "$@"
}
