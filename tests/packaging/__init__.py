"""The Debian package and the documents."""
