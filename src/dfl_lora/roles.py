"""Roles: what a tensor of an adapter is. Schedules, layouts and counters speak of roles, never of names."""

from typing import Literal

Role = Literal["A", "B", "core", "head"]
ROLES: tuple[Role, ...] = ("A", "B", "core", "head")
Roles = frozenset[Role]
