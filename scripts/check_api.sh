#!/usr/bin/env bash
# Checks the HTTP interface of a built binary from outside, each with a server of its own in a scratch folder:
# docs/postman_collection.json by newman, the OpenAPI document by openapi-spec-validator, and what the document promises
# by Schemathesis (tests/schemathesis.toml). Wants these three on the PATH, with curl and jq.
#
#   scripts/check_api.sh target/release/gurukul
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

fail() {
    printf 'check_api.sh: %s\n' "$1" >&2
    exit 1
}

[ $# -eq 1 ] && [ -x "$1" ] || fail "give the path of the built binary"
binary=$(realpath "$1")
for tool in curl jq newman openapi-spec-validator schemathesis; do
    command -v "$tool" >/dev/null || fail "$tool is not on the PATH; CONTRIBUTING.md says where it comes from"
done

place=$(mktemp -d)
server=
# With a key, so that what is said of keys is checked as well.
key=a-key-for-the-check-of-the-interface
stop() {
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
        wait "$server" || fail "the server ended with $?: $(tail -n 20 "$place/server.log")"
        server=
    fi
}
trap 'kill ${server:-} 2>/dev/null || true; rm -rf "$place"' EXIT

# Starts a server in a new data folder; sets `url`.
start() {
    rm -rf "$place/data"
    mkdir "$place/data"
    (cd "$place" && GURUKUL_API_KEYS="check=$key" exec "$binary" serve --port 0 --data-dir data) >"$place/server.out" 2>"$place/server.log" &
    server=$!
    url=
    for _ in $(seq 300); do
        url=$(sed -n 's/.*listening on \(http:[^ ]*\).*/\1/p' "$place/server.log" | head -n 1)
        if [ -n "$url" ] || ! kill -0 "$server" 2>/dev/null; then
            break
        fi
        sleep 0.1
    done
    [ -n "$url" ] || fail "the server does not start: $(tail -n 20 "$place/server.log")"
}

# No matter what was asked, nothing in the server may have failed.
unharmed() {
    curl -sf "$url/health" >/dev/null || fail "after $1 the server is not healthy"
    if grep -E 'panicked| ERROR ' "$place/server.log"; then
        fail "after $1 the server's log has failures"
    fi
}

ln -s "$root/assets" "$place/assets"
cp -r "$root/configs" "$place/configs"

start
printf -- '-- newman\n'
timeout 180 newman run "$root/docs/postman_collection.json" -e "$root/docs/postman_environment.json" \
    --env-var "baseUrl=$url" --env-var "apiKey=$key" --color off --reporter-cli-no-success-assertions >"$place/newman.log" ||
    fail "newman: $(cat "$place/newman.log")"
tail -n 20 "$place/newman.log"
unharmed newman

printf -- '-- openapi-spec-validator\n'
curl -sf "$url/openapi.json" >"$place/openapi.json"
openapi-spec-validator --schema 3.1 "$place/openapi.json"
stop

# Any source of the connectors file may be asked for: here there is one, and it is small.
head -n 40 "$root/assets/phrasebook/train.jsonl" >"$place/small.jsonl"
cat >"$place/configs/mcp_connectors.yml" <<'YAML'
sources:
  phrasebook: {type: local, path: small.jsonl, template: translation, fields: {source: en, target: hi}, target_language: hi}
YAML
start
cd "$place"

# ask CONFIG SECONDS [ARGUMENT...]: Schemathesis, with its summary on stdout.
ask() {
    local config=$1 seconds=$2
    shift 2
    GURUKUL_API_KEY=$key timeout "$seconds" schemathesis --config-file "$config" run "$url/openapi.json" "$@" >schemathesis.log ||
        fail "schemathesis: $(cat schemathesis.log)"
    sed -n '/= SUMMARY =/,$p' schemathesis.log
    unharmed schemathesis
}

printf -- '-- schemathesis\n'
ask "$root/tests/schemathesis.toml" 240

# What it makes up names no job, no file and no adapter. Once more with those that are there.
printf -- '-- schemathesis with names that exist\n'
post() {
    curl -sf "$url$1" -H "x-api-key: $key" -H 'content-type: application/json' -d "$2"
}
job=$(post /adapter/train-lite '{"source": "phrasebook", "adapter_name": "known", "max_samples": 8}' | jq -r .job_id)
printf '{"prompt": "Good morning.", "completion": "सुप्रभात।"}\n' >rows.jsonl
file=$(curl -sf "$url/v1/files" -H "x-api-key: $key" -F purpose=fine-tune -F file=@rows.jsonl | jq -r .id)
tuning=$(post /v1/fine_tuning/jobs "{\"model\": \"gurukul-demo\", \"training_file\": \"$file\"}" | jq -r .id)
for _ in $(seq 300); do
    [ "$(curl -sf "$url/v1/fine_tuning/jobs/$tuning" -H "x-api-key: $key" | jq -r .status)" != succeeded ] || break
    sleep 0.2
done
{
    cat "$root/tests/schemathesis.toml"
    printf '[parameters]\n'
    printf '"path.job_id" = "%s"\n"path.file_id" = "%s"\n"path.fine_tuning_job_id" = "%s"\n' "$job" "$file" "$tuning"
    printf '"path.name" = "known"\n"path.id" = "gurukul-demo"\n'
} >known.toml
ask known.toml 120 --max-examples 5 --include-path-regex '\{(job_id|file_id|fine_tuning_job_id|name|id)\}'
stop
printf 'check_api.sh: all passed in %d s\n' "$SECONDS"
