# Builds a static binary and puts nothing else into the image.
#   docker build -t export-service --build-arg COMMIT=$(git rev-parse --short HEAD) .
ARG RUST_IMAGE=rust:1.95-alpine

FROM ${RUST_IMAGE} AS build
# Alpine's own Rust, for platforms without an official Rust image.
RUN command -v cargo || apk add --no-cache cargo gcc musl-dev
# Writes the list of crates into the binary, which `cargo audit bin` reads.
RUN cargo install --locked --no-track --root /usr/local cargo-auditable@0.7.7
WORKDIR /build
ENV RUSTFLAGS="-C target-feature=+crt-static"
# The dependencies in a separate layer, built with an empty program: they take the longest
# and change the least.
COPY .cargo .cargo
COPY Cargo.toml Cargo.lock ./
RUN mkdir src && echo 'fn main() {}' > src/main.rs && touch src/lib.rs \
    && cargo auditable build --release --locked \
    && rm -r src
COPY src src
# For --version.
ARG COMMIT
ENV EXPORT_SERVICE_COMMIT=$COMMIT
# Newer than the empty program, whatever times COPY preserves.
RUN touch src/main.rs src/lib.rs && cargo auditable build --release --locked && mkdir /data

FROM scratch
COPY --from=build /build/target/release/export-service /export-service
# Writable without a volume: a Databox mounts none.
COPY --from=build --chown=10001:10001 /data /data
ENV EXPORT_DATA_DIR=/data
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s CMD ["/export-service", "healthcheck"]
ENTRYPOINT ["/export-service"]
ARG COMMIT
LABEL databox.type="export-service" \
    org.opencontainers.image.title="export-service" \
    org.opencontainers.image.description="The only way data leaves a Databox: checks, queues and delivers exports" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.revision="$COMMIT"
