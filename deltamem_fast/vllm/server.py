"""One route for the OpenAI-compatible server: what a request that brought a memory along has written.

vLLM loads it only where ``VLLM_PLUGINS`` names it (entry point group ``vllm.endpoint_plugins``).
"""

from __future__ import annotations

import base64

from fastapi import APIRouter, HTTPException, Request

ROUTE = "/v1/delta_mem/take"  # under /v1, which --api-key guards
_MOST_KEYS = 1024
router = APIRouter()


@router.post(ROUTE)
async def take(request: Request):
    """{"keys": [...]} → {"states": [{"tokens": n, "delta_mem_state": base64} or null, ...]}, each once."""
    try:
        body = await request.json()
    except ValueError as error:
        raise HTTPException(400, f"body: got what is no JSON ({error})") from error
    keys = body.get("keys") if isinstance(body, dict) else None
    if not isinstance(keys, list) or len(keys) > _MOST_KEYS or not all(isinstance(key, str) for key in keys):
        raise HTTPException(400, f"keys: allowed a list of {_MOST_KEYS} strings at most")
    engine = request.app.state.delta_mem_engine
    taken = (await engine.collective_rpc("delta_mem_take", args=(keys,)))[0]
    states = [
        None if found is None else {"tokens": found[0], "delta_mem_state": base64.b64encode(found[1]).decode("ascii")}
        for found in taken
    ]
    return {"states": states}


class MemoryEndpoint:
    """What vLLM makes of the entry point."""

    name = "deltamem_fast"
    required_tasks = ("generate",)

    def attach_router(self, app) -> None:
        app.include_router(router)

    async def init_state(self, engine_client, state, args) -> None:
        state.delta_mem_engine = engine_client
