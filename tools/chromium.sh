#!/usr/bin/env bash
# Chromium for the browser tests: the one that is there, else Debian's package.
set -euo pipefail
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then echo "== browser: $(command -v "$name")"; exit 0; fi
done
sudo=""; [ "$(id -u)" = 0 ] || sudo=sudo
command -v apt-get >/dev/null || { echo "no Chromium found and no apt-get to install it with: install Chromium and try again" >&2; exit 1; }
echo "== browser: installing chromium from Debian's packages"
$sudo apt-get update -qq
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
