"""Tests on the real thing: file systems, mounts and a message bus."""
