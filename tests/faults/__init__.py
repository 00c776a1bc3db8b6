"""Crashes, full disks, failing disks and damage."""
