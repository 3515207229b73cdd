"""Targets: a package per runtime that models are lowered to; phones: places where artifacts are measured."""
