"""One file per checkpoint layout of another library."""
