# Sourced by the other scripts: `stage "what" command...` prints what, runs the command, prints the seconds it took.
# Its output is shown only if it fails.
stage() {
    local what=$1 start=$SECONDS log status=0
    shift
    printf '==> %-56s ' "$what"
    log=$(mktemp)
    "$@" >"$log" 2>&1 </dev/null || status=$?
    if ((status)); then
        printf 'FAILED after %d s (exit code %d)\n' $((SECONDS - start)) "$status"
        cat "$log"
    else
        printf '%4d s\n' $((SECONDS - start))
    fi
    rm -f "$log"
    return "$status"
}
