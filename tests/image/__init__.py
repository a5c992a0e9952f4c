"""The steps of the CPU image in a bare Debian; run by make image-check."""
