"""All hostile requests."""

from __future__ import annotations

from tests.unit.api.hostile import bodies, chat_fields, other_fields, pictures

TABLE = [*chat_fields.ROWS, *other_fields.ROWS, *bodies.ROWS, *pictures.ROWS]
