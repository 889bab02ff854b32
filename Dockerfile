# An image with Gatehouse, from a checkout:
#   docker build -t gatehouse .
FROM caddy:2.11.9-builder AS builder
COPY . /gatehouse
WORKDIR /gatehouse
RUN xcaddy build v2.11.9 --with github.com/caddy-gatehouse/gatehouse@v0.0.0=. --output /usr/bin/caddy

FROM caddy:2.11.9
COPY --from=builder /usr/bin/caddy /usr/bin/caddy
