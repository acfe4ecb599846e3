#!/usr/bin/env bash
# Make what the pipeline needs on one machine: Java 17 or newer, the jobs environment .venv and the Airflow
# environment .venv-airflow. Quick when all is there; run it again after any interruption.
#
#   PYTHON=/path/to/python3.11 infra/local/setup.sh     choose the interpreter
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$root"
logs=.crane/logs

say() { printf 'setup  %s\n' "$*" >&2; }

stop() {
    printf 'setup  failed: %s\n       Remedy: %s\n' "$1" "$2" >&2
    exit 2
}

# May this user install system packages without being asked for a password?
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo "$@"
    else
        return 1
    fi
}

python_fits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
        if command -v "$candidate" >/dev/null && python_fits "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    stop "no Python 3.11, 3.12 or 3.13 with the venv module" \
        "install one (Debian, Ubuntu: sudo apt-get install python3 python3-venv) or name it: PYTHON=... make setup"
}

# Major version of a java program, 0 when it does not run.
java_major() {
    local version
    version="$("$1" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1)" || true
    printf '%s' "${version:-0}"
}

java_fits() {
    local program="${JAVA_HOME:+$JAVA_HOME/bin/}java"
    command -v "$program" >/dev/null && [ "$(java_major "$program")" -ge 17 ]
}

install_java() {
    local log=$logs/setup-java.log
    if command -v apt-get >/dev/null; then
        command="apt-get install --yes openjdk-17-jre-headless"
        say "java: apt-get installs openjdk-17-jre-headless, log in $log"
        as_root apt-get update >"$log" 2>&1 && as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get install --yes --no-install-recommends openjdk-17-jre-headless >>"$log" 2>&1
    elif command -v dnf >/dev/null; then
        command="dnf install --assumeyes java-17-openjdk-headless"
        say "java: dnf installs java-17-openjdk-headless, log in $log"
        as_root dnf install --assumeyes java-17-openjdk-headless >"$log" 2>&1
    elif command -v brew >/dev/null; then
        command="brew install openjdk@17"
        say "java: brew installs openjdk@17, log in $log"
        brew install openjdk@17 >"$log" 2>&1
    else
        command="the system's package manager, or https://adoptium.net"
        return 1
    fi
}

ensure_java() {
    java_fits && return
    local command="" hint="then make setup again"
    if [ -n "${JAVA_HOME:-}" ]; then
        stop "JAVA_HOME=$JAVA_HOME is no Java 17 or newer" "point it at one, or unset it to use the java of PATH"
    fi
    if ! install_java; then
        [ "$command" = "brew install openjdk@17" ] || command="sudo $command"
        stop "no Java 17 or newer, and it could not be installed from here" "$command; $hint"
    fi
    java_fits || stop "Java was installed but is not in PATH" "export JAVA_HOME=<its folder>; $hint"
}

# environment FOLDER LABEL REQUIREMENT...: make a virtual environment, unless it was made from this pyproject.toml.
environment() {
    local folder=$1 label=$2 log=$logs/setup-$2.log
    shift 2
    local stamp=$folder/.crane-setup
    local identity
    identity="$("$python" -c 'import hashlib, sys
print(hashlib.sha256(open("pyproject.toml", "rb").read() + "\0".join(sys.argv[1:]).encode()).hexdigest())' \
        "$python" "$root" "$*")"
    if [ -x "$folder/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$identity" ]; then
        return
    fi
    local started=$SECONDS
    say "$label: installing into $folder, log in $log"
    rm -f "$stamp"
    if ! [ -x "$folder/bin/python" ] || ! "$folder/bin/python" -c '' 2>/dev/null; then
        rm -rf "$folder"
        "$python" -m venv "$folder"
    fi
    # `pip install --group` needs 25.1.
    if ! { "$folder/bin/python" -m pip install --upgrade 'pip>=25.1' &&
        "$folder/bin/python" -m pip install "$@"; } 2>&1 </dev/null | tee "$log" | progress "$label"; then
        tail -n 15 "$log" >&2
        stop "pip could not install the $label environment" "read $log, mend the cause, make setup again"
    fi
    printf '%s\n' "$identity" >"$stamp"
    say "$label: done in $((SECONDS - started)) s"
}

# One line every few packages of pip's output.
progress() {
    awk -v label="$1" '
        /^Collecting/ { if (++count % 25 == 0) { printf "setup  %s: %d packages found\n", label, count; fflush() } }
        /^Installing collected/ { printf "setup  %s: unpacking\n", label; fflush() }' >&2
}

mkdir -p "$logs"
python="$(find_python)"
ensure_java
environment .venv jobs --editable '.[cpu,dev]'
environment .venv-airflow airflow --group airflow
