# syntax=docker/dockerfile:1
# One static binary and nothing else, or two: the daemon, and the notifier. Build for several platforms at once:
#   docker buildx build --platform linux/amd64,linux/arm64,linux/arm/v7 .
# The build runs on the builder's own platform and cross-compiles.
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
# One per line: not every builder takes several.
ARG TARGETOS
ARG TARGETARCH
ARG TARGETVARIANT
ARG VERSION=unknown
ARG COMMIT=unknown
RUN GOOS=$TARGETOS GOARCH=$TARGETARCH GOARM=${TARGETVARIANT#v} CGO_ENABLED=0 \
    go build -trimpath -buildvcs=false \
      -ldflags "-s -w -X github.com/imagewolf/imagewolf/internal/build.version=$VERSION -X github.com/imagewolf/imagewolf/internal/build.commit=$COMMIT" \
      -o /out/ ./cmd/imagewolf ./cmd/imagewolf-notifier

# The notifier: docker build --target notifier. /var/lib/imagewolf-notifier is to
# be a volume that the user below may write to, and /etc/imagewolf has the settings.
FROM scratch AS notifier
LABEL org.opencontainers.image.source="https://github.com/imagewolf/imagewolf" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /out/imagewolf-notifier /imagewolf-notifier
COPY LICENSE /LICENSE
USER 65532:65532
EXPOSE 7950/tcp
ENTRYPOINT ["/imagewolf-notifier"]
CMD ["run"]

FROM scratch
LABEL org.opencontainers.image.source="https://github.com/imagewolf/imagewolf" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /out/imagewolf /imagewolf
COPY LICENSE /LICENSE
# The daemon writes into containerd's content directory and unpacks layers into
# its snapshots: it runs as root, with containerd's root, /run/containerd and
# /run/imagewolf mounted at the same paths as on the host.
EXPOSE 7946/tcp 7946/udp 7947/tcp
ENTRYPOINT ["/imagewolf"]
CMD ["daemon"]
