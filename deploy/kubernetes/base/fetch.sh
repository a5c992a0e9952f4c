# Bring the model repository that MODEL_SHA256 names from object storage to $MODELS/repository, or fail.
# A repository is one archive under its own hash, because object storage keeps no empty folders.
set -eu
archive=$MODELS/repository.tar
rm -rf "$MODELS/repository" "$archive"
rclone copyto "$MODEL_STORE/$MODEL_SHA256.tar" "$archive"
echo "$MODEL_SHA256  $archive" | sha256sum -c -
mkdir "$MODELS/repository"
tar -xf "$archive" -C "$MODELS/repository"
rm "$archive"
