#!/usr/bin/env bash
# Proves the CPU image of the Dockerfile where no container engine runs: lays its stages out as a root file system, by
# the Dockerfile's own lines, with a binary that was built already, and runs that as a container would be run: as the
# image's user, with its environment, entry point and health check, read-only but for its volume and /tmp, in network,
# process and mount namespaces of its own. Asks it for an answer and stops it with the image's stop signal.
#
#   scripts/rootfs.sh target/release/gurukul
#
# Wants root, mmdebstrap (or debootstrap), jq and curl, and Debian's packages from the network. The binary must run on
# the Debian of the image. ROOTFS_MIRROR names another archive than http://deb.debian.org/debian.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
mirror=${ROOTFS_MIRROR:-http://deb.debian.org/debian}

fail() {
    printf 'rootfs.sh: %s\n' "$1" >&2
    exit 1
}

say() {
    printf '%4d s  %s\n' "$SECONDS" "$1"
}

# ---- the Dockerfile as instructions

# One instruction a line: comments gone, continued lines joined.
instructions() {
    awk '/^[ \t]*#/ { next }
         { line = line $0 }
         /\\$/ { sub(/\\$/, " ", line); next }
         line !~ /^[ \t]*$/ { print line }
         { line = "" }' "$root/Dockerfile"
}

declare -A arg=()
# ${NAME} by the arguments that were declared before the first stage.
resolved() {
    local text=$1 name
    for name in "${!arg[@]}"; do
        text=${text//"\${$name}"/${arg[$name]}}
    done
    printf '%s\n' "$text"
}

# The instructions of the last stage with those of the stages that it stands on before it; the first line names the
# image that the chain begins with.
chain() {
    local -A from=() body=()
    local instruction rest stage=
    while read -r instruction rest; do
        case $instruction in
            ARG) [ -n "$stage" ] || { arg[${rest%%=*}]=${rest#*=} && arg[CPU]=1; } ;;
            FROM)
                rest=$(resolved "$rest")
                stage=${rest##* AS }
                from[$stage]=${rest%% *}
                ;;
            *) body[$stage]+="$instruction $rest"$'\n' ;;
        esac
    done < <(instructions)
    local lines=
    while [ -n "${from[$stage]:-}" ]; do
        lines=${body[$stage]:-}$lines
        stage=${from[$stage]}
    done
    printf 'IMAGE %s\n%s' "$stage" "$lines"
}

# ---- laying it out

# Runs a command in the root file system as its root, with the way to the network that this machine has.
inside() {
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive \
        chroot "$image" /bin/sh -ec "cd '$workdir'; $1"
}

debian() {
    local suite
    case $1 in
        debian:12*) suite=bookworm ;;
        debian:13*) suite=trixie ;;
        *) fail "the image begins with $1; only debian:12 and debian:13 are known here" ;;
    esac
    if command -v mmdebstrap >/dev/null; then
        mmdebstrap --quiet --variant=minbase "$suite" "$image" "$mirror"
    elif command -v debootstrap >/dev/null; then
        debootstrap --variant=minbase "$suite" "$image" "$mirror" >/dev/null
    else
        fail "neither mmdebstrap nor debootstrap is installed"
    fi
    # As an engine does while it builds; taken away again below.
    cp /etc/resolv.conf /etc/hosts "$image/etc/"
    grep -hs '^Acquire::' /etc/apt/apt.conf.d/* >"$image/etc/apt/apt.conf.d/99-this-machine" || true
}

# copy SOURCE... TARGET, with what comes from another stage as the binary that was given.
copy() {
    local words=("$@") from=$root target source
    if [[ ${words[0]} == --from=* ]]; then
        [ "${words[0]}" = --from=build ] || fail "nothing is known of COPY ${words[0]}"
        from=
        words=("${words[@]:1}")
    fi
    target=${words[-1]}
    case $target in
        /*) target=$image$target ;;
        *) target=$image$workdir/${target#./} ;;
    esac
    for source in "${words[@]:0:${#words[@]}-1}"; do
        if [ -z "$from" ]; then
            [ "$source" = /out/gurukul ] || fail "the stage build makes no $source"
            install -D -m 755 "$binary" "$target"
        elif [ -d "$root/$source" ]; then
            mkdir -p "$target" && cp -r "$root/$source/." "$target"
        elif [[ $target == */ ]]; then
            mkdir -p "$target" && cp "$root/$source" "$target"
        else
            install -D -m "$(stat -c %a "$root/$source")" "$root/$source" "$target"
        fi
    done
}

workdir=/
environment=(PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
entrypoint='[]' command='[]' health='[]' user=0:0 volume='' stop=TERM port=''

lay_out() {
    local instruction rest words
    while read -r instruction rest; do
        case $instruction in
            IMAGE) debian "$rest" ;;
            LABEL) ;;
            RUN) inside "$rest" >"$place/run.log" 2>&1 || fail "RUN $rest: $(tail -n 20 "$place/run.log")" ;;
            WORKDIR) workdir=$rest && mkdir -p "$image$rest" ;;
            COPY) read -ra words <<<"$rest" && copy "${words[@]}" ;;
            ENV) read -ra words <<<"$rest" && environment+=("${words[@]}") ;;
            USER) user=$rest ;;
            VOLUME) volume=$rest ;;
            EXPOSE) port=$rest ;;
            STOPSIGNAL) stop=${rest#SIG} ;;
            HEALTHCHECK) health=${rest#* CMD } ;;
            ENTRYPOINT) entrypoint=$rest ;;
            CMD) command=$rest ;;
            *) fail "the instruction $instruction is not known here" ;;
        esac
        [ "$instruction" = LABEL ] || say "$instruction ${rest:0:90}"
    done < <(chain)
    rm -f "$image/etc/apt/apt.conf.d/99-this-machine"
    [ -n "$volume" ] && [ -n "$port" ] || fail "the image has no VOLUME or no EXPOSE"
    [ "${user%%:*}" != 0 ] || fail "the image runs as root"
}

# ---- running it

# start KEYS COMMAND...: as the container's user with its environment, and with these API keys.
start() {
    local keys=$1
    shift
    exec env -i "${environment[@]}" "GURUKUL_API_KEYS=$keys" \
        chroot --userspec="$user" "$image" /bin/sh -c "cd '$workdir' && exec \"\$@\"" sh "$@"
}

run() {
    local server words
    ip link set lo up
    mount --bind "$image" "$image"
    mount --bind "$place/volume" "$image$volume"
    mount -o remount,bind,ro "$image"
    mount -t proc proc "$image/proc"
    mount -t tmpfs tmpfs "$image/tmp"
    chown "$user" "$place/volume"

    # A binary from before there were keys listens on all addresses only when told so.
    local has_keys=false
    if [[ $("$binary" serve --help) == *--api-keys-file* ]]; then
        has_keys=true
        say 'without keys it does not start'
        mapfile -t words < <(jq -r '.[]' <<<"$entrypoint$command")
        (start '' "${words[@]}") >"$place/refused.log" 2>&1 && fail 'it starts without API keys'
        grep -q GURUKUL_API_KEYS "$place/refused.log" || fail "$(cat "$place/refused.log")"
    else
        environment+=(GURUKUL_INSECURE_NO_AUTH=true)
    fi

    mapfile -t words < <(jq -r '.[]' <<<"$entrypoint$command")
    say "starts: ${words[*]} as $user"
    (start "rootfs=$key" "${words[@]}") >"$place/server.log" 2>&1 &
    server=$!
    trap 'kill -KILL ${server:-} 2>/dev/null || true' EXIT

    mapfile -t words < <(jq -r '.[]' <<<"$health")
    for _ in $(seq 120); do
        kill -0 "$server" 2>/dev/null || fail "it ended: $(cat "$place/server.log")"
        ! (start "rootfs=$key" "${words[@]}") >"$place/health.log" 2>&1 || break
        sleep 0.5
    done
    (start "rootfs=$key" "${words[@]}") || fail "the health check fails: $(cat "$place/health.log" "$place/server.log")"
    say "its health check passes: ${words[*]}"
    [ "$(stat -c %u "/proc/$server")" = "${user%%:*}" ] || fail 'it runs as another user'

    local url=http://127.0.0.1:$port question='{"prompt": "Translate to Hindi: Where is the school?", "do_sample": false}'
    if $has_keys; then
        [ "$(curl -s -o /dev/null -w '%{http_code}' "$url/generate-lite" -H 'content-type: application/json' -d "$question")" = 401 ] ||
            fail 'it answers without a key'
    fi
    curl -sf "$url/generate-lite" -H "authorization: Bearer $key" -H 'content-type: application/json' -d "$question" \
        >"$place/answer.json" || fail "it does not answer: $(cat "$place/server.log")"
    say "it answers: $(jq -r .generated_text "$place/answer.json")"
    jq -e '.generated_text == "स्कूल कहाँ है?"' "$place/answer.json" >/dev/null || fail "$(cat "$place/answer.json")"
    GURUKUL_API_KEY=$key "$root/scripts/smoke.sh" --url "$url" >"$place/smoke.log" 2>&1 || fail "$(cat "$place/smoke.log")"
    say 'scripts/smoke.sh passes: it trains from the phrasebook of the image into its volume'

    kill -"$stop" "$server"
    local code=0
    wait "$server" || code=$?
    [ "$code" = 0 ] || fail "SIG$stop: it ended with $code: $(tail -n 20 "$place/server.log")"
    say "SIG$stop ends it with 0"
    [ -f "$place/volume/gurukul.db" ] || fail 'its volume has no gurukul.db'
}

# ----

if [ "${1:-}" = --run ]; then
    # In the namespaces now, with everything known that was laid out.
    # shellcheck source=/dev/null
    . "$2"
    run
    exit 0
fi

[ $# -eq 1 ] && [ -x "$1" ] || fail 'give the path of the built binary'
[ "$(id -u)" = 0 ] || fail 'needs root, to lay out files of other owners and to change the root'
for tool in jq curl ip unshare; do
    command -v "$tool" >/dev/null || fail "$tool is not installed"
done
binary=$(realpath "$1")
place=$(mktemp -d)
chmod 755 "$place"
trap 'rm -rf --one-file-system "$place"' EXIT
image=$place/image
mkdir "$image" "$place/volume"
key=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')

lay_out
strip "$image/usr/local/bin/gurukul" 2>/dev/null || true
say "laid out: $(du -sm "$image" | cut -f1) MB, of which the binary $(du -m "$image/usr/local/bin/gurukul" | cut -f1) MB"
declare -p binary place image key workdir environment entrypoint command health user volume stop port root >"$place/known"
unshare --net --mount --pid --fork --kill-child --mount-proc "$0" --run "$place/known"
printf 'rootfs.sh: all passed in %d s\n' "$SECONDS"
