#!/usr/bin/env bash
# Tests under AddressSanitizer and UndefinedBehaviorSanitizer: tests/sanitizers/address.sh [pytest's arguments]
# Without arguments the whole suite, but for what is named below.  Uses the python3 of the environment
# it is called in, which must have the extra "test"; builds into a directory of its own.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
chmod 755 "$build" # the tests become other users, who must find the library
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
includes=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')
suffix=$(python3 -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
for program in handoff waiting; do
    "${CC:-cc}" -std=gnu17 -O1 -g $flags -Wall -Wextra -Wconversion -Werror -Wno-unused-function -pthread \
        "tests/sanitizers/$program.c" -o "$build/$program"
done
"$build/waiting"
"$build/handoff" 200000
cp -r .ci pyproject.toml LICENSE README.md CHANGELOG.md docs doorpool tests benchmarks examples "$build"
rm -f "$build"/doorpool/_shuttle.*.so
"${CC:-cc}" -shared -fPIC -O1 -g $flags -Wall -Wextra -Wconversion -Werror -I"$includes" \
    doorpool/_shuttle.c doorpool/_atoms.c doorpool/_batches.c doorpool/_keys.c -o "$build/doorpool/_shuttle$suffix"
# What the sanitizers say goes into files, and fails the run at the end: a test sees no more of it than that
# a child, which it may have killed, is gone.  Memory that is not there is refused, as without them; and a
# child that ends itself by a signal on purpose does.
mkdir -m 1777 "$build/reports"
export ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:handle_segv=0:handle_abort=0:log_path=$build/reports/asan"
export UBSAN_OPTIONS="print_stacktrace=1:log_path=$build/reports/ubsan"
export PYTHONMALLOC=malloc DOORPOOL_IMPL=c
preload="$("${CC:-cc}" -print-file-name=libasan.so) $("${CC:-cc}" -print-file-name=libubsan.so)"
cd "$build"
excluded=()
while read -r test; do
    excluded+=(--deselect "$test")
done < <(grep '^tests/' tests/sanitizers/excluded)
LD_PRELOAD="$preload" python3 -c "import doorpool; assert doorpool.__file__.startswith('$build'), doorpool.__file__"
code=0
LD_PRELOAD="$preload" python3 -m pytest -p no:randomly -o timeout=300 "${excluded[@]}" "${@:-tests}" || code=$?
if grep -l "ERROR: \|runtime error" reports/* 2>/dev/null; then
    cat reports/*
    code=1
fi
exit "$code"
