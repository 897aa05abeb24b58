#!/usr/bin/env bash
# Asks a running server for everything that it is for, once: health, answers in three languages, an adapter trained
# from the shipped phrasebook, an answer with it, collected episodes. What it makes it takes away again, but for the
# episodes, which are appended to the log of the run `smoke`. Needs curl and jq.
#
#   scripts/smoke.sh [--url URL] [--source NAME] [--timeout SECONDS] [--any-language]
#
#   --url           where the server is (http://127.0.0.1:8110)
#   --source        source of the training data, by its name in mcp_connectors.yml (phrasebook)
#   --timeout       seconds that the training job may take (300)
#   --any-language  take answers in whatever language, for a model that has not learnt Hindi, Tamil and Bengali
#
# GURUKUL_API_KEY, where the server wants a key, is sent as a bearer token; it must be one with the scope
# admin, because the adapter that was trained is deleted.
# Prints a line a step. Exit codes: 0 all passed, 1 a step failed, 2 no server there, or wrong usage.
set -euo pipefail

url=http://127.0.0.1:8110
source_name=phrasebook
timeout_s=300
any_language=false

usage() {
    printf 'smoke.sh: %s\n' "$1" >&2
    sed -n 's/^#   \(scripts.*\)/usage: \1/p' "$0" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
        --url | --source | --timeout)
            [ $# -ge 2 ] && [ -n "$2" ] || usage "$1 needs a value"
            case $1 in
                --url) url=${2%/} ;;
                --source) source_name=$2 ;;
                --timeout) timeout_s=$2 ;;
            esac
            shift 2
            ;;
        --any-language) any_language=true && shift ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0" && exit 0 ;;
        *) usage "$1 is not known" ;;
    esac
done
case $timeout_s in '' | *[!0-9]*) usage "--timeout must be a number of seconds" ;; esac
for tool in curl jq; do
    command -v "$tool" >/dev/null || usage "$tool is needed and not installed"
done

place=$(mktemp -d)
adapter=smoke-$(date +%s)-$$
job=
trained=false

# Takes away what a run that failed has left on the server, without a word: the reason is told already.
tidy() {
    if [ -n "$job" ] && ! $trained; then
        # A job that is through in the meantime cannot be cancelled (409) and has left its adapter.
        request POST "/adapter/cancel/$job" >/dev/null 2>&1 && [ "$status" = 409 ] && trained=true
    fi
    if $trained; then
        request DELETE "/adapter/$adapter" >/dev/null 2>&1 || true
    fi
    rm -rf "$place"
}
trap tidy EXIT

# The key goes through a file: arguments of programs can be seen by everybody on a machine.
: >"$place/headers"
chmod 600 "$place/headers"
if [ -n "${GURUKUL_API_KEY:-}" ]; then
    printf 'authorization: Bearer %s\n' "$GURUKUL_API_KEY" >"$place/headers"
fi

failed() {
    printf 'FAIL  %s\n' "$1" >&2
    exit 1
}

passed() {
    printf 'ok    %s\n' "$1"
}

# request METHOD PATH [BODY]: sets `status`, leaves the answer in $place/body. A server that is busy (429) is asked
# again, as its Retry-After says, five times at most. Returns 1 where nothing answers, with curl's reason in `reason`.
request() {
    local arguments=(-sS --max-time 120 -X "$1" -H "@$place/headers" -D "$place/answer" -o "$place/body" -w '%{http_code}')
    if [ $# -ge 3 ]; then
        arguments+=(-H 'content-type: application/json' --data-binary "$3")
    fi
    local wait try
    for try in 1 2 3 4 5 6; do
        : >"$place/body"
        if ! status=$(curl "${arguments[@]}" "$url$2" 2>"$place/reason"); then
            reason=$(cat "$place/reason")
            return 1
        fi
        [ "$status" = 429 ] && [ "$try" -lt 6 ] || return 0
        wait=$(tr -d '\r' <"$place/answer" | sed -n 's/^[Rr]etry-[Aa]fter: *\([0-9][0-9]*\)$/\1/p' | tail -n 1)
        [ "${wait:-1}" -le 30 ] || wait=30
        sleep "${wait:-1}"
    done
}

# expect STEP STATUS METHOD PATH [BODY]: a request that must be answered with that status.
expect() {
    local step=$1 wanted=$2
    shift 2
    request "$@" || failed "$step: $1 $url$2: $reason"
    if [ "$status" != "$wanted" ]; then
        failed "$step: $1 $2 answered $status, not $wanted: $(jq -r '.error.message // .' "$place/body" 2>/dev/null || head -c 300 "$place/body")"
    fi
}

# holds STEP FILTER: the answer must be JSON for which this jq filter gives true.
holds() {
    jq -e "$2" "$place/body" >/dev/null 2>&1 || failed "$1: the answer is not as promised ($2): $(head -c 600 "$place/body")"
}

body() {
    jq -r "$1" "$place/body"
}

# answers LANGUAGE PROMPT [ADAPTER]: a prompt that must be answered with some text in the language.
answers() {
    local step="generate in $1${3:+ with the adapter}" text=generated_text
    $any_language && text=raw_text
    expect "$step" 200 POST /generate-lite "$(jq -n --arg language "$1" --arg prompt "$2" --arg adapter "${3:-}" \
        '{prompt: $prompt, language: $language, adapter: $adapter, max_new_tokens: 40, do_sample: false}')"
    holds "$step" ".$text | type == \"string\" and length > 0"
    holds "$step" '.usage.completion_tokens >= 1 and (.finish_reason == "stop" or .finish_reason == "length")'
    if [ -n "${3:-}" ]; then
        holds "$step" ".adapter == \"$3\" and .adapter_generation >= 1"
    fi
    passed "$step: $(body ".$text" | tr '\n' ' ')"
}

if ! request GET /health; then
    printf 'FAIL  health: no server at %s: %s\n' "$url" "$reason" >&2
    exit 2
fi
[ "$status" = 200 ] || failed "health: $url/health answered $status: $(head -c 300 "$place/body")"
holds health '.status == "ok"'
passed "health: $(body '"\(.model.id) on \(.device), version \(.version)"')"

answers hindi 'Translate to Hindi: Where is the school?'
answers tamil 'Translate to Tamil: I need water.'
answers bengali 'Translate to Bengali: Where is the river?'

expect train 202 POST /adapter/train-lite "$(jq -n --arg source "$source_name" --arg adapter "$adapter" '{
    source: $source, adapter_name: $adapter, max_samples: 64,
    overrides: {r: 4, lora_alpha: 8, epochs: 1, batch_size: 8, gradient_accumulation_steps: 1, max_seq_length: 128}}')"
job=$(body .job_id)
passed "train: job $job accepted"

deadline=$((SECONDS + timeout_s))
while :; do
    expect poll 200 GET "/adapter/status/$job"
    case $(body .status) in
        completed) break ;;
        failed | cancelled) failed "poll: the job is $(body .status): $(body '.error // .message')" ;;
    esac
    [ "$SECONDS" -lt "$deadline" ] || failed "poll: the job has not ended after $timeout_s s; --timeout gives it more"
    sleep 1
done
trained=true
holds poll '.metrics.step >= 1 and .metrics.step == .metrics.total_steps'
passed "poll: $(body '"\(.metrics.step) steps, loss \(.metrics.loss)"')"

answers hindi 'Translate to Hindi: Where is the school?' "$adapter"

expect collect 200 POST /rl/collect "$(jq -n --arg adapter "$adapter" \
    '{prompt: "Translate to Hindi: I need water.", episodes: 2, adapter: $adapter, run_id: "smoke", max_new_tokens: 20}')"
holds collect '.status == "completed" and (.episode_ids | length == 2) and (.rewards | length == 2)'
passed "collect: $(body '"\(.episode_ids | length) episodes with rewards \(.rewards | map(tostring) | join(", ")) in \(.output_path)"')"

expect delete 200 DELETE "/adapter/$adapter"
trained=false
job=
expect delete 404 GET "/adapter/$adapter"
passed "delete: $adapter is gone"
