"""Pictures and their files: bytes to pixels, and pixels to PNG, JPEG, WebP or raw bytes."""
