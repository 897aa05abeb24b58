# Recipes for people; .ci/run is what decides. `just` alone lists them.

_default:
    @just --list

# What CI checks, without the tests
check:
    cargo fmt --check
    cargo clippy --release --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps

# Format, and apply what clippy can apply
fix:
    cargo fmt
    cargo clippy --release --all-targets --fix --allow-dirty --allow-staged

# All tests; `just test parity` those with that word in their name
test *FILTER:
    cargo test --release {{FILTER}}

# The same through cargo-nextest: each test in its own process, slow ones named
nextest *FILTER:
    cargo nextest run --release {{FILTER}}

# Look at changed insta snapshots and accept them one by one (needs cargo-insta)
snap:
    cargo insta test --release --review

# The documentation of every item, in the browser
doc:
    cargo doc --release --no-deps --document-private-items --open

# Licences, advisories, forbidden crates, spelling (needs cargo-deny and typos)
deny:
    cargo deny check
    typos

# Try to break a reader of strangers' bytes for a minute: `just fuzz csv` (jsonl, csv, readme; needs cargo-fuzz)
fuzz TARGET *ARGS:
    RUSTC_BOOTSTRAP=1 cargo fuzz run --sanitizer none {{TARGET}} -- -max_total_time=60 {{ARGS}}

# Answer over HTTP: `just serve --model ./my-model`
serve *ARGS:
    cargo run --release -- serve {{ARGS}}

# Measure: `just bench generate --model ./my-model`
bench *ARGS:
    cargo run --release -- bench {{ARGS}}

# Check the build for an NVIDIA card (needs nvcc)
gpu:
    cargo clippy --release --features cuda --all-targets -- -D warnings
