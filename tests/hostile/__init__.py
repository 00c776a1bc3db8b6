"""Hostile clients, users, trees and mounts."""
