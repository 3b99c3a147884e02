#!/usr/bin/env bash
# Runs fuzz targets, each for so many seconds, one after the other: fuzz/run.sh SECONDS TARGET...
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=$1
shift
mkdir -p "fuzz/artifacts"
for target in "$@"; do
    log="fuzz/artifacts/$target.log"
    echo "$target: from $(date -u '+%F %T') for $seconds s, log in $log"
    if ! cargo +nightly fuzz run "$target" -- \
        -dict="fuzz/dictionaries/$target.dict" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -detect_leaks=0 -print_final_stats=1 >"$log" 2>&1; then
        echo "$target: FAILED"
        tail -n 30 "$log"
        exit 1
    fi
    echo "$target: clean until $(date -u '+%F %T'), $(grep -h 'number_of_executed_units' "$log" | tr -s ' ')"
done
