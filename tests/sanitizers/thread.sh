#!/usr/bin/env bash
# The hand-off alone, and by which rules it waits, under ThreadSanitizer: tests/sanitizers/thread.sh [calls]
# (-Wno-tsan: it does not know fences.  Those are for parking only; the bytes are guarded by the state.)
set -euo pipefail
cd "$(dirname "$0")"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
for program in handoff waiting; do
    "${CC:-cc}" -std=gnu17 -O1 -g -fsanitize=thread -Wall -Wextra -Wconversion -Werror -Wno-unused-function -Wno-tsan \
        -pthread "$program.c" -o "$build/$program"
done
setarch "$(uname -m)" -R "$build/waiting"
setarch "$(uname -m)" -R "$build/handoff" "${1:-1000000}"
