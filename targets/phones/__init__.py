"""Phones: places where artifacts are measured."""
