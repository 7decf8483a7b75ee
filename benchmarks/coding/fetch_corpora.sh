#!/bin/sh
# Download and unpack (not install) the Debian packages whose texts the benchmarks of this folder compress.
#   sh benchmarks/coding/fetch_corpora.sh ~/.cache/sharewell-corpora
set -eu
mkdir -p "$1/x"
cd "$1"
for package in linux-doc-6.1 dict-gcide bible-kjv-text bible-kjv; do
    apt-get download "$package"
    mkdir -p "x/$package"
    dpkg -x "$package"_*.deb "x/$package"
done
