"""Several pictures at once with asyncio, four in flight: `python async_many.py "a fox" "an owl" "a bear"`."""

import asyncio
import sys

from fluxserve_client import AsyncClient, FluxserveError, QueueFull


async def draw(client: AsyncClient, turn: asyncio.Semaphore, prompt: str) -> None:
    """Draw one picture into "<prompt>.png", waiting for a turn and while the server's queue is full."""
    async with turn:
        while True:
            try:
                result = await client.generate(prompt, timeout=300)
                break
            except QueueFull:
                await asyncio.sleep(1)
    path = result.save(f"{prompt.replace(' ', '-')}.png")
    print(f"{path}: seed {result.seed}, {result.timings.total:.0f} ms")


async def main(prompts: list[str]) -> None:
    """Draw all of them; the first error cancels the others, on the server too."""
    turn = asyncio.Semaphore(4)
    async with AsyncClient("grpc://localhost:8001") as client, asyncio.TaskGroup() as tasks:
        for prompt in prompts:
            tasks.create_task(draw(client, turn, prompt))


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1:] or ["a fox", "an owl", "a bear"]))
    except ExceptionGroup as errors:
        ours, others = errors.split(FluxserveError)
        if others is not None or ours is None:
            raise
        sys.exit("\n".join(str(error) for error in ours.exceptions))
