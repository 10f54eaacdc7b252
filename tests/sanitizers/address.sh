#!/usr/bin/env bash
# Tests under AddressSanitizer and UndefinedBehaviorSanitizer: tests/sanitizers/address.sh [pytest's arguments]
# Without arguments the tests of the raw layer.  Uses the python3 of the environment
# it is called in, which must have the extra "test"; builds into a directory of its own.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
includes=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')
suffix=$(python3 -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
"${CC:-cc}" -std=gnu17 -O1 -g $flags -Wall -Wextra -Wconversion -Werror -Wno-unused-function -pthread \
    tests/sanitizers/handoff.c -o "$build/handoff"
"$build/handoff" 200000
cp -r pyproject.toml README.md doorpool tests benchmarks examples "$build"
rm -f "$build"/doorpool/_shuttle.*.so
"${CC:-cc}" -shared -fPIC -O1 -g $flags -Wall -Wextra -Wconversion -Werror -I"$includes" \
    doorpool/_shuttle.c doorpool/_atoms.c doorpool/_batches.c -o "$build/doorpool/_shuttle$suffix"
export LD_PRELOAD="$("${CC:-cc}" -print-file-name=libasan.so) $("${CC:-cc}" -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc DOORPOOL_IMPL=c
cd "$build"
python3 -c "import doorpool; assert doorpool.__file__.startswith('$build'), doorpool.__file__"
python3 -m pytest -p no:randomly -o timeout=300 "${@:-tests/raw}"
