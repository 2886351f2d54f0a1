#!/usr/bin/env bash
# A run of cai_jax on one machine, which goes on when you close the terminal.
#
#   docs/launching/vm.sh start CONFIG WORKDIR [--config.FIELD=VALUE ...]
#   docs/launching/vm.sh watch WORKDIR    # the output; Ctrl-C ends only the watching
#   docs/launching/vm.sh stop WORKDIR     # SIGTERM: the run keeps its work. The same start continues it
#
# Start it in the folder of the repository and in the environment that cai_jax is installed in.
set -euo pipefail

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

# Print the process id of the run in a folder, if it is alive.
running() {
  local pid
  pid="$(cat "$1/vm.pid" 2>/dev/null)" || return 1
  grep -qz launch.py "/proc/$pid/cmdline" 2>/dev/null && echo "$pid"
}

[ $# -ge 2 ] || usage
command="$1"
case "$command" in
  start)
    [ $# -ge 3 ] || usage
    config="$2" workdir="$3"
    shift 3
    mkdir -p "$workdir"
    if pid="$(running "$workdir")"; then
      echo "$workdir: process $pid is running" >&2
      exit 1
    fi
    setsid python launch.py --config="$config" --workdir="$workdir" "$@" \
      </dev/null >>"$workdir/vm.log" 2>&1 &
    echo $! >"$workdir/vm.pid"
    echo "process $! writes to $workdir/vm.log"
    ;;
  watch)
    tail -n 50 -F "$2/vm.log"
    ;;
  stop)
    if ! pid="$(running "$2")"; then
      echo "$2: nothing is running" >&2
      exit 1
    fi
    kill -TERM "$pid"
    while running "$2" >/dev/null; do sleep 1; done
    tail -n 1 "$2/vm.log"
    ;;
  *) usage ;;
esac
