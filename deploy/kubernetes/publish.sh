#!/bin/sh
# Upload the model repository $1 to the rclone remote $2 as one archive under its hash, and print the hash.
set -eu
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
# Equal repositories give equal archives.
tar --create --dereference --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
    --directory "$1" --file "$archive" .
sum=$(sha256sum "$archive")
sum=${sum%% *}
rclone copyto "$archive" "$2/$sum.tar"
echo "$sum"
