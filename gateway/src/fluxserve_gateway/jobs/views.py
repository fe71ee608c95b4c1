"""A job as its owner sees it."""

from __future__ import annotations

from typing import Any

from fluxserve_gateway.jobs.store import QUEUED, RUNNING, Job


def describe(job: Job, ahead: int | None = None) -> dict[str, Any]:
    """Write a job as JSON has it.

    Args:
        job: the job.
        ahead: how many jobs are before it, if that was counted.
    """
    cancelling = job.status == RUNNING and job.cancelling
    return {
        "id": job.id,
        "object": "job",
        "status": "cancelling" if cancelling else job.status,
        "model": job.model,
        "operation": job.request["echo"]["operation"],
        "created_at": int(job.created),
        "started_at": _seconds(job.started),
        "completed_at": _seconds(job.ended),
        "expires_at": _seconds(job.expires),
        "queue_position": ahead if job.status == QUEUED else None,
        "step": job.step,
        "steps": job.steps,
        "error": job.error,
        "result": _result(job),
    }


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)


def _result(job: Job) -> dict[str, Any] | None:
    if job.result is None:
        return None
    pictures = enumerate(job.result["data"])
    data = [{"seed": each["seed"], "url": f"/v1/jobs/{job.id}/images/{number}"} for number, each in pictures]
    return {**job.result, "data": data}
