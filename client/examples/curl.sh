#!/bin/sh
# One picture with curl and jq:   sh curl.sh "a red apple" apple.png
# URL (default http://localhost:8000) is the server's HTTP address.
#
# The request is plain JSON. The picture must come back in Triton's binary form: as JSON, its bytes would be
# mangled into text. The answer is then a JSON head, whose length stands in the header
# Inference-Header-Content-Length, and behind it the tensors that were asked for with "binary_data", each
# BYTES element with its length before it, 4 bytes, little-endian.
set -eu
prompt=${1:-a fox on a blue background}
file=${2:-fox.png}
url=${URL:-http://localhost:8000}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

jq -n --arg prompt "$prompt" '{
  id: "curl-\(now | floor)",
  inputs: [
    {name: "prompt", datatype: "BYTES", shape: [1], data: [$prompt]},
    {name: "num_inference_steps", datatype: "INT32", shape: [1], data: [20]},
    {name: "seed", datatype: "INT64", shape: [1], data: [7]}
  ],
  outputs: [
    {name: "images", parameters: {binary_data: true}},
    {name: "seeds"}, {name: "image_size"}, {name: "timings"}
  ]
}' > "$work/request"

status=$(curl -sS -o "$work/answer" -D "$work/headers" -w '%{http_code}' \
  -H 'Content-Type: application/json' --data-binary "@$work/request" "$url/v2/models/flux/infer")
if [ "$status" != 200 ]; then
  echo "HTTP $status: $(cat "$work/answer")" >&2
  exit 1
fi

head=$(tr -d '\r' < "$work/headers" | awk -F': ' 'tolower($1) == "inference-header-content-length" {print $2}')
head -c "$head" "$work/answer" | jq -c '.outputs[] | select(.data) | {(.name): .data}'
tail -c "+$((head + 4 + 1))" "$work/answer" > "$file" # one picture: all that follows its length is the file
echo "$file"
