# The store's server as an ordinary user: its image alone would own the volume as root.
ARG IMAGE=quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z
FROM ${IMAGE}
USER 0
RUN mkdir -p /data && chown 10001:10001 /data
USER 10001:10001
