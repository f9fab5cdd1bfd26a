#!/bin/sh
# Sets up an emulator that runs the aarch64 build of onnxruntime and counts the instructions it executes.
#
#   sh setup.sh [FOLDER]        default: onnxcompress/emulator in the user's cache folder
#
# For Debian 12 on x86-64 with gcc. Nothing is installed: packages are unpacked into FOLDER (about 0.4 GB) with
# apt's lists and state kept there, too. Debian's qemu-user is used because it is linked dynamically and so can
# load a plugin; the statically linked builds of backports cannot.
# The one header the plugin needs (GPL-2+) comes from Debian's source package of the same qemu; it is not shipped.
set -eu
here=$(dirname "$(readlink -f "$0")")
folder=${1:-${ONNXCOMPRESS_EMULATOR:-${XDG_CACHE_HOME:-$HOME/.cache}/onnxcompress/emulator}}
onnxruntime=${ONNXRUNTIME_VERSION:-1.32.0}
numpy=${NUMPY_VERSION:-2.4.6}
python=${PYTHON:-python3}
export DEBIAN_FRONTEND=noninteractive

mkdir -p "$folder"
folder=$(readlink -f "$folder")
apt=$folder/apt
mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/state" "$apt/sources.list.d" "$apt/debs" "$apt/source"

# apt's own configuration, with sources of source packages, leaving the host's alone
for list in /etc/apt/sources.list.d/*.sources; do
    [ -e "$list" ] && sed 's/^Types: deb$/Types: deb deb-src/' "$list" > "$apt/sources.list.d/$(basename "$list")"
done
: > "$apt/sources.list"
if [ -e /etc/apt/sources.list ]; then
    sed -n 's/^deb \(.*\)/deb \1\ndeb-src \1/p' /etc/apt/sources.list > "$apt/sources.list"
fi
private() {
    apt-get -q -o Dir::Etc::sourcelist="$apt/sources.list" -o Dir::Etc::sourceparts="$apt/sources.list.d" \
        -o Dir::State="$apt/state" -o Dir::State::lists="$apt/lists" -o Dir::State::status=/dev/null \
        -o Dir::Cache="$apt/cache" -o Debug::NoLocking=1 -o APT::Sandbox::User=root "$@"
}

echo "1/4 emulator"
private update > /dev/null
(cd "$apt/debs" && private download qemu-user libcapstone4 liburing2 libglib2.0-0 libgnutls30 libnuma1)
for package in "$apt"/debs/*.deb; do dpkg-deb -x "$package" "$folder/qemu"; done

echo "2/4 Python for arm64"
arm() { private -o APT::Architecture=arm64 -o APT::Architectures::=arm64 "$@"; }
arm update > /dev/null
arm -y --no-install-recommends -d install \
    python3.11 libpython3.11-stdlib libstdc++6 libgomp1 libgcc-s1 zlib1g libffi8 libssl3 > /dev/null
for package in "$apt"/cache/archives/*.deb; do dpkg-deb -x "$package" "$folder/root"; done

echo "3/4 onnxruntime $onnxruntime for aarch64"
"$python" -m pip install -q --upgrade --target "$folder/site" --no-deps --only-binary=:all: --implementation cp \
    --python-version 311 --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux2014_aarch64 \
    "onnxruntime==$onnxruntime" "numpy==$numpy" protobuf flatbuffers packaging typing_extensions

echo "4/4 plugin"
(cd "$apt/source" && private source --download-only qemu > /dev/null &&
    tar -xf qemu_*.orig.tar.xz --wildcards --strip-components=3 '*/include/qemu/qemu-plugin.h')
gcc -O2 -Wall -fPIC -shared -I "$apt/source" -o "$folder/libclasses.so" "$here/classes.c"

cat > "$folder/run" <<'END'
#!/bin/sh
# run CPU PREFIX COUNTS SCRIPT ARGUMENTS...   a Python script on an emulated core, instructions counted
here=$(dirname "$(readlink -f "$0")")
cpu=$1 prefix=$2 counts=$3
shift 3
export LD_LIBRARY_PATH="$here/qemu/usr/lib/x86_64-linux-gnu:$here/qemu/lib/x86_64-linux-gnu"
exec "$here/qemu/usr/bin/qemu-aarch64" -cpu "$cpu" -L "$prefix" -plugin "$here/libclasses.so,out=$counts" \
    -U LD_LIBRARY_PATH -E PYTHONHOME="$here/root/usr" -E PYTHONPATH="$here/site" -E PYTHONDONTWRITEBYTECODE=1 \
    -E OMP_NUM_THREADS=1 -E OPENBLAS_NUM_THREADS=1 "$here/root/usr/bin/python3.11" "$@"
END
chmod +x "$folder/run"

rm -rf "$apt"
echo "done: $folder"
[ "$folder" = "${XDG_CACHE_HOME:-$HOME/.cache}/onnxcompress/emulator" ] || echo "export ONNXCOMPRESS_EMULATOR=$folder"
