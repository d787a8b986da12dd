#!/bin/sh
# Provide Chromium where there is none: from the distribution, or from npm into .chromium/. Never a reason to fail.
VERSION=147 # of the npm package, which is that of Chromium
cd "$(dirname "$0")/.." || exit 0

for name in chromium chromium-browser google-chrome google-chrome-stable .chromium/bin/chromium; do
    command -v "$name" >/dev/null 2>&1 && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing Chromium from the distribution"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } >/dev/null 2>&1 && exit 0
fi

unpack() { # FILE: a brotli-compressed file of the package to standard output
    node -e 'const { createReadStream } = require("fs"), { createBrotliDecompress } = require("zlib");
        createReadStream(process.argv[1]).pipe(createBrotliDecompress()).pipe(process.stdout)' "$1"
}

from_npm() { # complete in another folder, then renamed, so that an interrupted download is repeated
    root="$PWD/.chromium"
    rm -rf .chromium .chromium.partial && mkdir -p .chromium.partial/bin .chromium.partial/lib && cd .chromium.partial &&
        npm pack --silent --fetch-retries=1 "@sparticuz/chromium@$VERSION" >/dev/null && tar -xzf ./*.tgz && rm ./*.tgz &&
        unpack package/bin/chromium.br >chromium && chmod +x chromium &&
        unpack package/bin/al2023.tar.br | tar -xf - -C lib && unpack package/bin/swiftshader.tar.br | tar -xf - -C lib &&
        unpack package/bin/fonts.tar.br | tar -xf - && rm -r package || return 1
    cat >fonts.conf <<END
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir>$root/fonts</dir>
  <dir>/usr/share/fonts</dir>
  <cachedir>$root/cache</cachedir>
</fontconfig>
END
    cat >bin/chromium <<END
#!/bin/sh
export LD_LIBRARY_PATH="$root/lib/lib:$root/lib" FONTCONFIG_FILE="$root/fonts.conf"
exec "$root/chromium" "\$@"
END
    chmod +x bin/chromium && cd .. && mv .chromium.partial .chromium
}

if command -v npm >/dev/null 2>&1 && command -v tar >/dev/null 2>&1 && [ "$(uname -sm)" = "Linux x86_64" ]; then
    echo "downloading Chromium into .chromium/ (npm package @sparticuz/chromium)"
    (from_npm) && .chromium/bin/chromium --version >/dev/null 2>&1 && exit 0
    rm -rf .chromium .chromium.partial
fi
echo "no Chromium, and it cannot be installed from here (as root: apt-get install chromium); its tests are skipped"
