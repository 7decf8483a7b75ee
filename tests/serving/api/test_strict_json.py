"""What is not JSON by the standard, or nested without measure, is refused where it is read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sharewell.serving.api.strict_json import MAX_DEPTH, JsonResponse, StrictRequest


async def parsed(body: bytes) -> Any:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return await StrictRequest({"type": "http", "headers": [], "method": "POST"}, receive).json()  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": NaN}', b'{"a": Infinity}', b'"\\ud800"', b'"\xff"', b"{", b"{} {}", b'{"a": 01}', b"'a'", b"",
        b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
        b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1),
        b"[" * 100_000,
    ],
)  # fmt: skip
async def test_what_is_not_json_is_a_decode_error(body: bytes) -> None:
    with pytest.raises(json.JSONDecodeError):
        await parsed(body)


async def test_deep_and_wide_bodies_within_the_bound_are_read() -> None:
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert json.dumps(await parsed(deep)).encode() == deep
    assert await parsed(b"[" + b",".join([b"{}"] * 1000) + b"]") == [{}] * 1000


def test_float32_survives_the_way_to_json_and_back() -> None:
    import numpy as np

    values = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    back = np.array(json.loads(bytes(JsonResponse({"v": values}).body))["v"], np.float32)
    assert (back == values).all()
