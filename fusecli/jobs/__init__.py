"""fuse and verify on files: what the commands call, one function each."""
