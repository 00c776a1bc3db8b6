"""The Debian packages and the documents."""
